"""One call carried out: a plan, the gradients of this step, and nothing else."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import formula
from .caps import CapPolicy
from .dispatch import BACKENDS
from .formula import UNSCALED, ClipRule, LossScale, wide_dtype
from .plan import Bucket, ClipPlan, Gradients, narrowed, values_of


def norms_of(plan: ClipPlan, grads: Gradients, norm_type: float) -> Tensor:
    """The K norms, gradients untouched. No host sync."""
    sources = [_sources(b, b.pick(grads), norm_type) for b in plan.buckets]
    return _norms(plan, grads, _power_sums(plan, sources, norm_type), norm_type)


def clip_(
    plan: ClipPlan,
    grads: Gradients,
    policy: CapPolicy,
    rule: ClipRule,
    raise_nonfinite: bool,
    loss_scale: LossScale = UNSCALED,
) -> tuple[Tensor, Tensor, Tensor]:
    """Clips in place; norms before and coefficients, both [K], and the caps. Syncs for ``raise_nonfinite`` only.

    One bucket takes its backend's fused path. Anything else goes in two steps, power sums first: several
    devices or backends, a sparse gradient with duplicate indices (measured coalesced, scaled as it is), errors on
    non-finite norms, which must come before the first write, and caps that depend on the norms.
    """
    picked = [b.pick(grads) for b in plan.buckets]
    targets = [_targets(b, own, rule.norm_type) for b, own in zip(plan.buckets, picked, strict=True)]
    in_steps = plan.sparse or raise_nonfinite or policy.needs_norms or rule.norm_type <= 0
    if loss_scale.found_inf is not None and not _sums_tell_nonfinite(rule.norm_type):
        in_steps = True
    if len(plan.buckets) == 1 and not in_steps:
        bucket = plan.buckets[0]
        caps = policy.caps(bucket.device, None)
        torch.autograd.graph.increment_version(picked[0])
        norms, coefs = BACKENDS[bucket.backend].clip_(bucket, targets[0], caps, rule, loss_scale)
        policy.update_(norms, coefs)
        return norms, coefs, caps
    sources = targets
    if plan.sparse:
        sources = [_sources(b, own, rule.norm_type) for b, own in zip(plan.buckets, picked, strict=True)]
    sums = _power_sums(plan, sources, rule.norm_type)
    norms = _norms(plan, grads, sums, rule.norm_type, loss_scale)
    if raise_nonfinite:
        _raise_if_nonfinite(plan, norms, rule.norm_type)
    caps = policy.caps(plan.device, norms if policy.needs_norms else None)
    coefs = formula.coefficients(norms, caps, rule)
    if loss_scale.found_inf is not None and not _sums_tell_nonfinite(rule.norm_type):
        sums = _power_sums(plan, sources, math.inf)
    loss_scale.report(sums)
    factors = loss_scale.factors(coefs)
    for own in picked:
        torch.autograd.graph.increment_version(own)
    for bucket, tensors in zip(plan.buckets, targets, strict=True):
        BACKENDS[bucket.backend].scale_(bucket, tensors, factors.to(bucket.device), rule.zero_fill)
    policy.update_(norms, coefs)
    return norms, coefs, caps


def _sums_tell_nonfinite(norm_type: float) -> bool:
    """Whether a power sum is inf or NaN just where an element is: those of other orders overflow, or lose an inf."""
    return norm_type in (1.0, 2.0, math.inf)


def _power_sums(plan: ClipPlan, sources: list[list[Tensor]], norm_type: float) -> Tensor:
    """Power sums of the K components over all buckets, in ``wide_dtype``."""
    sums: Tensor | None = None
    for bucket, tensors in zip(plan.buckets, sources, strict=True):
        part = BACKENDS[bucket.backend].power_sums(bucket, tensors, norm_type).to(plan.device)
        sums = part if sums is None else formula.merge(sums, part, norm_type)
    if sums is None:
        return torch.zeros(len(plan.components.names), dtype=wide_dtype(plan.device), device=plan.device)
    return sums


def _norms(
    plan: ClipPlan, grads: Gradients, sums: Tensor, norm_type: float, loss_scale: LossScale = UNSCALED
) -> Tensor:
    """The K norms, of components without elements 0, rounded to what the user gets."""
    norms = loss_scale.unscaled(formula.root(sums, norm_type)).to(plan.norm_dtype)
    if norm_type < 0:  # the root of an empty sum is inf there
        measured = {
            c for i, c, box in plan.components.members() if (g := grads[i]) is not None and narrowed(g, box).numel()
        }
        norms[[c for c in range(len(plan.components.names)) if c not in measured]] = 0.0
    return norms


def _raise_if_nonfinite(plan: ClipPlan, norms: Tensor, norm_type: float) -> None:
    finite = norms.isfinite().tolist()  # the one host sync, asked for by the caller
    if all(finite):
        return
    bad = [name for name, ok in zip(plan.components.names, finite, strict=True) if not ok]
    shown = ", ".join(map(repr, bad[:8])) + (f" and {len(bad) - 8} more" if len(bad) > 8 else "")
    raise RuntimeError(
        f"The norm of order {norm_type:g} is non-finite for {len(bad)} of {len(finite)} components: {shown}. "
        "No gradient was changed. nonfinite='propagate', 'zero' or 'skip' goes on without this error."
    )


def _targets(bucket: Bucket, own: list[Tensor], norm_type: float) -> list[Tensor]:
    """What is scaled of the bucket's own gradients: strided tensors on their memory."""
    return own if bucket.plain else [_memory(values_of(g), norm_type) for g in own]


def _sources(bucket: Bucket, own: list[Tensor], norm_type: float) -> list[Tensor]:
    """What is measured: as the targets, but duplicate indices of sparse gradients added up."""
    if bucket.plain:
        return own
    return _targets(bucket, [g.coalesce() if g.is_sparse else g for g in own], norm_type)


def _memory(grad: Tensor, norm_type: float) -> Tensor:
    """Without lazy conjugation or sign, and for p = 2 complex as pairs of reals: same norm, same scaling."""
    if grad.is_conj():
        grad = grad.conj()
    if grad.is_neg():
        grad = torch._neg_view(grad)
    return torch.view_as_real(grad) if grad.is_complex() and norm_type == 2.0 else grad
