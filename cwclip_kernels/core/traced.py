"""Under torch.compile: a whole call as one operator.

Caches, locks and kernels are nothing Dynamo can trace, and functionalization has to be told what is written. So
while a function is being traced, the public functions come here: the gradients that are there, and all that is static
about the call, go to one operator whose schema says that it writes those gradients. When the compiled function runs,
that operator goes the way of any other call, through plan and backends, to the same bits.
"""

from __future__ import annotations

import math
from ast import literal_eval
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..components.membership import Components
from ..thresholds import Threshold
from ..thresholds.base import StepCaps
from ..thresholds.constant import MaxNorm, checked_cap, checked_pattern
from . import run
from .caps import fixed_caps
from .checks import WIDE_DTYPES, check_gradient, was_frozen
from .formula import ClipRule, wide_dtype
from .loss_scale import UNSCALED, LossScale
from .options import Options
from .plan import Plans

# ------------------------------------------------------------------------------------------------------------
# What Dynamo traces
# ------------------------------------------------------------------------------------------------------------


def clip_(
    tensors: Sequence[Tensor],
    components: Components,
    max_norm: MaxNorm,
    options: Options,
    scale: LossScale = UNSCALED,
) -> tuple[Tensor, Tensor, Tensor]:
    """Clips the tensors' gradients in place, while being traced: norms before and coefficients, [K] each, and caps.

    A number or mapping as ``max_norm`` becomes part of the compiled function; a tensor is read whenever that runs.
    What ``thresholds`` compute is traced too; those that want norms cost one more reading of the gradients.

    Raises:
        TypeError, ValueError: a cap or a gradient that isn't what it should be.
    """
    rule, backend, inv_scale = options.rule, options.backend, scale.inverse
    grads, text = _present(tensors, components)
    device = grads[0].device if grads else tensors[0].device if tensors else torch.device("cpu")
    threshold = max_norm if isinstance(max_norm, Threshold) else None
    eps = rule.eps if threshold is None or threshold.adds_eps else 0.0
    if threshold is not None:
        _check(threshold, tensors)
    with torch.no_grad():
        if threshold is not None:
            norms = None
            if threshold.needs_norms:
                norms = norms_of(tensors, components, rule.norm_type, backend)
                norms = norms if inv_scale is None else norms * inv_scale
            max_norm = threshold.caps(device, norms)
        caps, patterns, values = _split(max_norm)
        if grads:
            policy = "error" if options.raise_nonfinite else rule.nonfinite
            inverse = _as_tensor(inv_scale, device)
            norms, coefs, caps_used = torch.ops.cwclip_kernels.component_clip_(
                grads, text, caps, patterns, values, inverse, scale.found_inf, rule.norm_type, eps, policy, backend
            )
        else:
            norms = _no_norms(tensors, components)
            coefs = torch.ones_like(norms)
            caps_used = torch.full((), math.inf, dtype=wide_dtype(device), device=device)
        if threshold is not None:
            threshold.update_(norms, coefs)
    return norms, coefs, caps_used


def _check(threshold: Threshold, tensors: Sequence[Tensor]) -> None:
    """Raises if the threshold can't be traced, or was bound to parameters in another state.

    Dynamo traces anew where they change.
    """
    if threshold.untraceable is not None:
        raise RuntimeError(f"max_norm: {threshold.untraceable}")
    trained = tuple(t.requires_grad or t.grad is not None for t in tensors)
    if threshold.setting.trained != (() if all(trained) else trained):
        raise RuntimeError(
            "max_norm: parameters have been frozen or unfrozen since the threshold was bound to them; clip once "
            "outside of the compiled function, and then call it again"
        )


def refuse_ranks(spread: bool) -> None:
    """Raises RuntimeError for what takes other ranks: their order of calls is not the compiler's to change."""
    if spread:
        raise RuntimeError(
            "parameters: components that are spread over ranks can't be clipped in a compiled function; compile the "
            "model, and clip outside"
        )


def _as_tensor(inv_scale: float | Tensor | None, device: torch.device) -> Tensor | None:
    if inv_scale is None or isinstance(inv_scale, Tensor):
        return inv_scale
    return torch.full((), inv_scale, dtype=wide_dtype(device), device=device)


def norms_of(tensors: Sequence[Tensor], components: Components, norm_type: float, backend: str | None) -> Tensor:
    """Norms [K] of the tensors' gradients, while being traced."""
    grads, text = _present(tensors, components)
    if not grads:
        return _no_norms(tensors, components)
    with torch.no_grad():
        norms: Tensor = torch.ops.cwclip_kernels.component_norms(grads, text, norm_type, backend)
    return norms


def _split(max_norm: MaxNorm) -> tuple[Tensor | None, list[str], list[float]]:
    """The cap as operators take it: a tensor, or one number for each pattern, or one number and no pattern."""
    if isinstance(max_norm, Tensor):
        return max_norm.detach(), [], []
    if not isinstance(max_norm, Mapping):
        return None, [], [checked_cap(max_norm, "max_norm")]
    patterns = [checked_pattern(pattern) for pattern in max_norm]
    return None, patterns, [checked_cap(value, f"max_norm[{pattern!r}]") for pattern, value in max_norm.items()]


def _present(tensors: Sequence[Tensor], components: Components) -> tuple[list[Tensor], str]:
    """The gradients that count, and their components as text: Dynamo guards on which there are.

    Text, because an operator takes no objects, and 400 strings cost it three times what one long string does.
    """
    grads: list[Tensor] = []
    names: list[str] = []
    moved: dict[int, int] = {}
    problems = dict(components.problems)
    clipped, cut = components.clipped, components.cut
    for position, tensor in enumerate(tensors):
        grad, name = tensor.grad, components.tensor_names[position]
        if grad is None or position not in clipped:
            continue
        if position in problems:
            raise was_frozen(name, problems[position])
        # Here, because the operator may get a copy, which shows no longer what is wrong with the original.
        check_gradient(grad, name, cut=position in cut)
        moved[position] = len(grads)
        grads.append(grad)
        names.append(name)
    members = tuple((moved[position], *rest) for position, *rest in components.members if position in moved)
    return grads, repr((components.names, tuple(names), members, (), components.aliases, components.spellings))


def _no_norms(tensors: Sequence[Tensor], components: Components) -> Tensor:
    return torch.zeros(len(components.names), device=tensors[0].device if tensors else "cpu", dtype=torch.float32)


# ------------------------------------------------------------------------------------------------------------
# The operators
# ------------------------------------------------------------------------------------------------------------


def _component_clip_(
    grads: list[Tensor],
    components: str,
    caps: Tensor | None,
    patterns: list[str],
    values: list[float],
    inv_scale: Tensor | None,
    found_inf: Tensor | None,
    norm_type: float,
    eps: float,
    nonfinite: str,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    plan, found = _plans_for(grads, components).get(list(grads), grads, norm_type, backend)
    if caps is None:
        fixed = _fixed_of(components, tuple(patterns), tuple(values))
    else:
        fixed = fixed_caps(caps, plan.components)
    scale = LossScale.of(inv_scale, found_inf)
    scale_here = scale.on(plan.device)
    rule = ClipRule(norm_type, eps, nonfinite)
    norms, coefs, used = run.clip_(plan, found, fixed, rule, nonfinite == "error", scale_here)
    scale.deliver(scale_here)
    return norms, coefs, used.clone()  # what an operator returns must be new


def _component_norms(grads: list[Tensor], components: str, norm_type: float, backend: str | None) -> Tensor:
    plan, found = _plans_for(grads, components).measured(list(grads), grads, norm_type, backend)
    return run.norms_of(plan, found, norm_type)


def _plans_for(grads: list[Tensor], components: str) -> Plans:
    # The first gradient tells apart models whose parameters came without names, that is numbered alike.
    first = grads[0]
    return _plans(components, first.device, first.dtype, first.shape)


@lru_cache(maxsize=64)
def _plans(components: str, device: torch.device, dtype: torch.dtype, shape: torch.Size) -> Plans:
    return Plans(_read(components))


@lru_cache(maxsize=64)
def _fixed_of(components: str, patterns: tuple[str, ...], values: tuple[float, ...]) -> StepCaps:
    max_norm = dict(zip(patterns, values, strict=True)) if patterns or not values else values[0]
    return fixed_caps(max_norm, _read(components))


@lru_cache(maxsize=64)
def _read(components: str) -> Components:
    return Components(*literal_eval(components))


def _fake_component_clip_(
    grads: list[Tensor],
    components: str,
    caps: Tensor | None,
    patterns: list[str],
    values: list[float],
    inv_scale: Tensor | None,
    found_inf: Tensor | None,
    norm_type: float,
    eps: float,
    nonfinite: str,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    norms = _fake_component_norms(grads, components, norm_type, backend)
    shape = (norms.shape if patterns or not values else ()) if caps is None else caps.shape
    return norms, torch.empty_like(norms), norms.new_empty(shape, dtype=wide_dtype(norms.device))


def _fake_component_norms(grads: list[Tensor], components: str, norm_type: float, backend: str | None) -> Tensor:
    wide = any(g.dtype in WIDE_DTYPES for g in grads)
    return grads[0].new_empty(len(_read(components).names), dtype=torch.float64 if wide else torch.float32)


# Not in CUDA graphs that inductor captures: plans and caps stay on the device from call to call, and would lie in the
# memory of the graph that happened to be captured first.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)

# Its registrations live as long as this does.
_library = torch.library.Library("cwclip_kernels", "FRAGMENT")  # type: ignore[no-untyped-call]

for _signature, _operator, _fake in (
    (
        "component_clip_(Tensor(a!)[] grads, str components, Tensor? caps, str[] patterns, float[] values, "
        "Tensor? inv_scale, Tensor(b!)? found_inf, float norm_type, float eps, str nonfinite, str? backend) "
        "-> (Tensor norms, Tensor coefs, Tensor caps)",
        _component_clip_,
        _fake_component_clip_,
    ),
    (
        "component_norms(Tensor[] grads, str components, float norm_type, str? backend) -> Tensor",
        _component_norms,
        _fake_component_norms,
    ),
):
    _name = _library.define(_signature, tags=_TAGS)  # type: ignore[no-untyped-call]
    _library.impl(_name, _operator, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"cwclip_kernels::{_name}", _fake, lib=_library)
