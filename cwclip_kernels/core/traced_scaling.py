"""Under torch.compile: scaling by coefficients or norms that are known already, each as one operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..components.membership import Components
from ..thresholds import Threshold
from ..thresholds.by_pattern import settled
from ..thresholds.constant import MaxNorm
from . import run, traced
from .formula import ClipRule
from .loss_scale import LossScale
from .options import Options
from .plan import home_of


def scale_(
    tensors: Sequence[Tensor], components: Components, coefs: Tensor, options: Options, scale: LossScale
) -> None:
    """``ClipSession.scale_``."""
    grads, text = traced.present(tensors, components)
    if grads:
        with torch.no_grad():
            inverse = traced.inverse_of(scale, grads[0].device)
            torch.ops.cwclip_kernels.component_scale_(
                grads, text, coefs.detach(), inverse, options.rule.zero_fill, options.backend
            )


def clip_with_norms_(
    tensors: Sequence[Tensor],
    components: Components,
    norms: Tensor,
    max_norm: MaxNorm,
    options: Options,
    scale: LossScale,
) -> tuple[Tensor, Tensor, Tensor]:
    """``ClipSession.clip_with_norms_``."""
    rule = options.rule
    cap = settled(max_norm)
    threshold = cap if isinstance(cap, Threshold) else None
    grads, text = traced.present(tensors, components)
    device = grads[0].device if grads else home_of(tensors)
    with torch.no_grad():
        norms = norms.detach()
        caps = traced.caps_for(tensors, components, cap, options, scale, device, norms.to(device))
        added = rule.norm_type, *traced.eps_of(cap, rule)
        if grads:
            inverse = traced.inverse_of(scale, device)
            norms, coefs, used = torch.ops.cwclip_kernels.component_clip_with_norms_(
                grads, text, norms, *caps, inverse, *added, options.nonfinite, options.backend
            )
        else:
            norms = norms.to(device, torch.promote_types(norms.dtype, torch.float32))
            coefs, used = torch.ops.cwclip_kernels.component_coefficients(
                text, norms, *caps, *added, options.nonfinite
            )
        if threshold is not None:
            threshold.update_(norms, coefs)
    return norms, coefs, used


# The operators themselves, which Dynamo doesn't look into.


def _component_scale_(
    grads: list[Tensor],
    components: str,
    coefs: Tensor,
    inv_scale: Tensor | None,
    zero_fill: bool,
    backend: str | None,
) -> None:
    plans = traced.plans_for(grads, components)
    plan, found = plans.get(list(grads), grads, 2.0, backend)
    factors = run.factors_of(coefs, len(plan.components.names), plan.device, LossScale.of(inv_scale, None))
    run.apply_(plan, found, factors, ClipRule(nonfinite="zero" if zero_fill else "propagate"))


def _component_clip_with_norms_(
    grads: list[Tensor],
    components: str,
    norms: Tensor,
    caps: Tensor | None,
    patterns: str,
    values: list[float],
    inv_scale: Tensor | None,
    norm_type: float,
    eps: float,
    exempt: list[int],
    nonfinite: str,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    plan, found = traced.plans_for(grads, components).get(list(grads), grads, norm_type, backend)
    norms = run.known_norms(norms, plan)
    given = components, norms, caps, patterns, values, norm_type, eps, exempt, nonfinite
    coefs, used = traced.component_coefficients(*given)
    factors = run.factors_of(coefs, len(norms), plan.device, LossScale.of(inv_scale, None))
    run.apply_(plan, found, factors, ClipRule(norm_type, eps, nonfinite))
    return norms.clone(), coefs, used  # an operator may not return its input


def _fake_component_clip_with_norms_(
    grads: list[Tensor],
    components: str,
    norms: Tensor,
    caps: Tensor | None,
    patterns: str,
    *others: object,
) -> tuple[Tensor, Tensor, Tensor]:
    like, _, used = traced.fake_outcome(grads, components, caps, patterns)
    found = torch.empty_like(like, dtype=torch.promote_types(norms.dtype, like.dtype))
    return found, torch.empty_like(found), used


traced.define("cwclip_kernels::component_scale_", _component_scale_, lambda *_: None, ("grads",))
traced.define(
    "cwclip_kernels::component_clip_with_norms_",
    _component_clip_with_norms_,
    _fake_component_clip_with_norms_,
    ("grads",),
)
