"""Clipping out of place in plain torch operations, which autograd and ``torch.func``'s transforms go through.

For gradients with a graph of their own (``create_graph=True``) and inside of ``grad`` and ``vmap``: what is clipped
depends on the gradient by its coefficient as well,

    d(coef_c * g) = coef_c * dg + g * d(coef_c),  coef_c = cap_c / (norm_c + eps) where that is below 1

Caps are constants. Some ten launches a gradient; everywhere else the kernels do the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..components.membership import Components
from ..thresholds.base import StepCaps
from . import run
from .bucket import narrowed
from .checks import norm_dtype_of
from .formula import ClipRule, wide_dtype
from .loss_scale import LossScale
from .modes import constant_when_traced


def clipped(
    grads: Sequence[Tensor | None],
    components: Components,
    policy: StepCaps,
    rule: ClipRule,
    raise_nonfinite: bool,
    loss_scale: LossScale,
) -> tuple[list[Tensor | None], Tensor, Tensor]:
    """Clipped gradients, with their graph, and norms before and coefficients, [K] each, without one."""
    present = [g for g in map(grads.__getitem__, sorted(components.clipped)) if g is not None]
    device = next((g.device for g in (*present, *grads) if g is not None), torch.device("cpu"))
    scale = loss_scale.on(device)
    dtype, order = norm_dtype_of(present), rule.norm_type
    with torch.no_grad():
        found = scale.unscaled(_norms(grads, components, order, device), order).detach().to(dtype)
        fixed, caps = run.coefficients_of(found, components.names, policy, rule, raise_nonfinite)
        if scale.found_inf is not None and present:
            finite = torch.stack([g.isfinite().all().to(device) for g in present]).all()
            scale.found_inf.masked_fill_(~finite, 1.0)
    # Where nothing is clipped, and where a policy decides, the coefficient is a constant. There even the norm's
    # operands are replaced, since autograd multiplies what isn't chosen by 0, which makes NaN of inf.
    follows = fixed != 1
    if rule.nonfinite in ("zero", "skip"):
        follows = follows & found.isfinite()
    norms = scale.unscaled(_norms(grads, components, order, device, follows), order).to(dtype)
    eps = rule.eps if policy.eps is None else policy.eps(caps.device)
    padded = torch.where(follows, norms.to(caps.dtype) + eps, 1.0)
    coefs = torch.where(follows, (torch.where(follows, caps, 0.0) / padded).to(norms.dtype), fixed)
    factors = scale.factors(coefs)
    new = list(grads)
    for position in sorted(components.clipped):
        grad = grads[position]
        if grad is not None:
            own = [(component, place) for i, component, place in components.members if i == position]
            new[position] = _scaled(grad, own, factors.to(grad.device), rule.zero_fill)
    loss_scale.deliver(scale)
    return [g if g is not old or g is None else g.clone() for g, old in zip(new, grads, strict=True)], found, fixed


def _norms(
    grads: Sequence[Tensor | None],
    components: Components,
    norm_type: float,
    device: torch.device,
    follows: Tensor | None = None,
) -> Tensor:
    """The K norms in ``wide_dtype``, each of all its pieces at once; those that don't follow the gradients of ones.

    At once, since the norm of a piece that is zero has no second derivative where that of the whole has one.
    """
    wide = wide_dtype(device)
    parts: list[list[Tensor]] = [[] for _ in components.names]
    for position, component, place in components.members:
        grad = grads[position]
        piece = None if grad is None else narrowed(grad, place)
        if piece is not None and piece.numel():
            values = piece.to(torch.complex128).abs() if piece.is_complex() else piece
            parts[component].append(values.reshape(-1).to(device, wide))
    zero = torch.zeros((), dtype=wide, device=device)
    norms = []
    for component, own in enumerate(parts):
        whole = torch.cat(own) if len(own) > 1 else own[0] if own else None
        if whole is not None and follows is not None:
            whole = torch.where(follows[component], whole, 1.0)
        norms.append(zero if whole is None else torch.linalg.vector_norm(whole, norm_type))
    return torch.stack(norms) if norms else zero.expand(0)


def _scaled(
    grad: Tensor, own: Sequence[tuple[int, tuple[tuple[int, int, int], ...]]], factors: Tensor, zero_fill: bool
) -> Tensor:
    """A gradient times the factors of its components, half precisions multiplied in float32."""
    # A complex product would make NaN of inf + 0j.
    values = torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    new = wide.clone()
    for component, place in own:
        factor = factors[component].to(wide.dtype)
        piece = narrowed(wide, place) * factor
        if zero_fill:
            piece = torch.where(factor == 0, torch.zeros_like(piece), piece)
        narrowed(new, place).copy_(piece)
    new = new.to(values.dtype)
    return torch.view_as_complex(new) if grad.is_complex() else new


@constant_when_traced  # when the levels are those of the function
def is_transformed() -> bool:
    """Whether this call is inside of a function that ``torch.func`` transforms."""
    level = getattr(torch._C._functorch, "maybe_current_level", None)
    return level is not None and level() is not None


def has_tangent(grads: Sequence[Tensor | None]) -> bool:
    """Whether any of them is a dual tensor of forward-mode differentiation."""
    if forward_ad._current_level < 0:
        return False
    return any(grad is not None and _tangent(grad) is not None for grad in grads)


def _tangent(grad: Tensor) -> Tensor | None:
    unpacked: tuple[Tensor, Tensor | None] = forward_ad.unpack_dual(grad)  # type: ignore[no-untyped-call]
    return unpacked[1]
