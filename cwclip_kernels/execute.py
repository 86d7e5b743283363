"""One call carried out: a plan, the gradients of this step, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from . import formula
from .caps import Caps
from .dispatch import BACKENDS
from .formula import ClipRule
from .plan import Bucket, ClipPlan, Gradients, values_of


def norms_of(plan: ClipPlan, grads: Gradients, norm_type: float) -> Tensor:
    """The K norms, gradients untouched. No host sync."""
    return _norms(plan, grads, [_sources(b, b.pick(grads), norm_type) for b in plan.buckets], norm_type)


def clip_(
    plan: ClipPlan, grads: Gradients, caps: Caps, rule: ClipRule, raise_nonfinite: bool
) -> tuple[Tensor, Tensor]:
    """Clips in place; norms before and coefficients, both [K]. Syncs with the host for ``raise_nonfinite`` only.

    One bucket takes its backend's fused path. Anything else goes in two steps, power sums first: several
    devices or backends, a sparse gradient with duplicate indices (measured coalesced, scaled as it is), and
    errors on non-finite norms, which must come before the first write.
    """
    picked = [b.pick(grads) for b in plan.buckets]
    targets = [_targets(b, own, rule.norm_type) for b, own in zip(plan.buckets, picked, strict=True)]
    if len(plan.buckets) == 1 and not plan.sparse and not raise_nonfinite and rule.norm_type > 0:
        bucket = plan.buckets[0]
        torch.autograd.graph.increment_version(picked[0])
        norms, coefs = BACKENDS[bucket.backend].clip_(bucket, targets[0], caps.on(bucket.device), rule)
        return norms, coefs
    sources = targets
    if plan.sparse:
        sources = [_sources(b, own, rule.norm_type) for b, own in zip(plan.buckets, picked, strict=True)]
    norms = _norms(plan, grads, sources, rule.norm_type)
    if raise_nonfinite:
        _raise_if_nonfinite(plan, norms, rule.norm_type)
    coefs = formula.coefficients(norms, caps.on(plan.device), rule)
    for own in picked:
        torch.autograd.graph.increment_version(own)
    for bucket, tensors in zip(plan.buckets, targets, strict=True):
        BACKENDS[bucket.backend].scale_(bucket, tensors, coefs.to(bucket.device), rule.zero_fill)
    return norms, coefs


def _norms(plan: ClipPlan, grads: Gradients, sources: list[list[Tensor]], norm_type: float) -> Tensor:
    if not plan.buckets:
        return torch.zeros(len(plan.components.names), dtype=plan.norm_dtype, device=plan.device)
    sums: Tensor | None = None
    for bucket, tensors in zip(plan.buckets, sources, strict=True):
        part = BACKENDS[bucket.backend].power_sums(bucket, tensors, norm_type).to(plan.device)
        sums = part if sums is None else formula.merge(sums, part, norm_type)
    assert sums is not None  # for mypy: there is a bucket
    norms = formula.root(sums, norm_type).to(plan.norm_dtype)
    if norm_type < 0:  # the root of an empty sum is inf there
        measured = {c for g, c in zip(grads, plan.components.index, strict=True) if g is not None and g.numel()}
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
