"""One call carried out: a plan, the gradients of this step, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends.registry import BACKENDS
from ..thresholds.base import StepCaps
from . import formula
from .bucket import Bucket, Found, narrowed
from .checks import values_of
from .formula import ClipRule, neutral, wide_dtype
from .loss_scale import UNSCALED, LossScale
from .plan import ClipPlan


def norms_of(plan: ClipPlan, found: Sequence[Found], norm_type: float) -> Tensor:
    """The K norms, gradients untouched. No host sync."""
    return _norms(plan, found, power_sums(plan, found, norm_type), norm_type)


def clip_(
    plan: ClipPlan,
    found: Sequence[Found],
    policy: StepCaps,
    rule: ClipRule,
    raise_nonfinite: bool,
    loss_scale: LossScale = UNSCALED,
) -> tuple[Tensor, Tensor, Tensor]:
    """Clips in place; norms before and coefficients, both [K], and the caps. Syncs for ``raise_nonfinite`` only.

    One bucket takes its backend's fused path. Anything else goes in two steps, power sums first: several
    devices or backends, a sparse gradient with duplicate indices (measured coalesced, scaled as it is), errors on
    non-finite norms, which must come before the first write, and caps that depend on the norms.
    """
    order = rule.norm_type
    tells = loss_scale.found_inf is None or sums_tell_nonfinite(order)
    in_steps = plan.sparse or raise_nonfinite or policy.needs_norms or order <= 0 or not tells
    if len(plan.buckets) == 1 and not in_steps:
        bucket, (own, addresses) = plan.buckets[0], found[0]
        targets = own if bucket.plain else _targets(bucket, own, order)
        caps = policy.caps(bucket.device, None)
        torch.autograd.graph.increment_version(own)
        norms, coefs = BACKENDS[bucket.backend].clip_(bucket, targets, caps, rule, loss_scale, addresses)
        return norms, coefs, caps
    sums = power_sums(plan, found, order)
    norms = _norms(plan, found, sums, order, loss_scale)
    if raise_nonfinite:
        _raise_if_nonfinite(plan, norms, order)
    caps = policy.caps(plan.device, norms if policy.needs_norms else None)
    coefs = formula.coefficients(norms, caps, rule)
    if not tells:
        sums = power_sums(plan, found, math.inf)
    loss_scale.report(sums)
    scale_(plan, found, loss_scale.factors(coefs), rule)
    return norms, coefs, caps


def sums_tell_nonfinite(norm_type: float) -> bool:
    """Whether a power sum is inf or NaN just where an element is: those of other orders overflow, or lose an inf."""
    return norm_type in (1.0, 2.0, math.inf)


def power_sums(plan: ClipPlan, found: Sequence[Found], norm_type: float) -> Tensor:
    """Power sums of the K components over all buckets, in ``wide_dtype``."""
    sums: Tensor | None = None
    for bucket, (own, addresses) in zip(plan.buckets, found, strict=True):
        sources = _sources(bucket, own, norm_type)
        part = BACKENDS[bucket.backend].power_sums(bucket, sources, norm_type, addresses).to(plan.device)
        sums = part if sums is None else formula.merge(sums, part, norm_type)
    if sums is None:
        shape = (len(plan.components.names),)
        return torch.full(shape, neutral(norm_type), dtype=wide_dtype(plan.device), device=plan.device)
    return sums


def scale_(plan: ClipPlan, found: Sequence[Found], factors: Tensor, rule: ClipRule) -> None:
    """g <- factor * g in place, by the K components' factors."""
    targets = [_targets(bucket, own, rule.norm_type) for bucket, (own, _) in zip(plan.buckets, found, strict=True)]
    for own, _ in found:
        torch.autograd.graph.increment_version(own)
    for bucket, tensors, (_, addresses) in zip(plan.buckets, targets, found, strict=True):
        BACKENDS[bucket.backend].scale_(bucket, tensors, factors.to(bucket.device), rule.zero_fill, addresses)


def has_elements(plan: ClipPlan, found: Sequence[Found]) -> list[bool]:
    """Of each component, whether it has any gradient's element: what a norm of negative order can't tell."""
    grads = {
        i: g
        for bucket, (own, _) in zip(plan.buckets, found, strict=True)
        for i, g in zip(bucket.positions, own, strict=True)
    }
    has = [False] * len(plan.components.names)
    for position, component, box in plan.components.members:
        grad = grads.get(position)
        has[component] = has[component] or (grad is not None and narrowed(grad, box).numel() > 0)
    return has


def _norms(
    plan: ClipPlan, found: Sequence[Found], sums: Tensor, norm_type: float, loss_scale: LossScale = UNSCALED
) -> Tensor:
    """The K norms, of components without elements 0, rounded to what the user gets."""
    norms = loss_scale.unscaled(formula.root(sums, norm_type)).to(plan.norm_dtype)
    if norm_type < 0:  # the root of an empty sum is inf there
        norms[[c for c, has in enumerate(has_elements(plan, found)) if not has]] = 0.0
    return norms


def _raise_if_nonfinite(plan: ClipPlan, norms: Tensor, norm_type: float) -> None:
    finite = norms.isfinite().tolist()  # the one host sync, asked for by the caller
    if not all(finite):
        bad = [name for name, ok in zip(plan.components.names, finite, strict=True) if not ok]
        raise RuntimeError(nonfinite_message(bad, len(finite), norm_type))


def nonfinite_message(bad: Sequence[str], count: int, norm_type: float) -> str:
    """What the error says of these components."""
    shown = ", ".join(map(repr, bad[:8])) + (f" and {len(bad) - 8} more" if len(bad) > 8 else "")
    return (
        f"The norm of order {norm_type:g} is non-finite for {len(bad)} of {count} components: {shown}. "
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
