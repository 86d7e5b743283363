"""One call carried out on this rank: a plan, and the gradients of this step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..arguments import some_of
from ..backends.registry import AT_ONCE, BACKENDS, FUSED
from ..thresholds.base import StepCaps
from . import formula
from .bucket import Bucket, Found, narrowed
from .checks import values_of
from .formula import ClipRule, neutral, wide_dtype
from .loss_scale import UNSCALED, LossScale
from .plan import ClipPlan, Plans


class Update(Protocol):
    """What is done with a call's coefficients instead of scaling gradients: an optimizer's step."""

    def prepare(self, buckets: Sequence[Bucket], found: Sequence[Found]) -> None:
        """Called before anything is written; raises RuntimeError if the named backend can't do it."""

    def clip_and_apply_(
        self,
        bucket: Bucket,
        grads: list[Tensor],
        caps: Tensor,
        rule: ClipRule,
        loss_scale: LossScale,
        addresses: bytes | None,
    ) -> tuple[Tensor, Tensor] | None:
        """Norms and coefficients [K], and the update, in one pass; None, and nothing done, if that isn't possible."""

    def apply_(
        self, bucket: Bucket, grads: list[Tensor], factors: Tensor, zero_fill: bool, addresses: bytes | None
    ) -> None:
        """The update from gradients times their components' factors [K], which are on the bucket's device."""


def norms_of(
    plan: ClipPlan, found: Sequence[Found], norm_type: float, sums: Tensor | None = None, scale: LossScale = UNSCALED
) -> Tensor:
    """The K norms, from the gradients or their power sums; changes nothing. No host sync."""
    sums = power_sums(plan, found, norm_type) if sums is None else sums
    norms = scale.unscaled(formula.root(sums, norm_type), norm_type).to(plan.norm_dtype)
    if norm_type < 0:  # where there are no elements, the root of the sum is inf
        norms[[c for c, has in enumerate(has_elements(plan, found)) if not has]] = 0.0
    return norms


def measure(plan: ClipPlan, found: Sequence[Found], norm_type: float, loss_scale: LossScale = UNSCALED) -> Tensor:
    """The K norms of the unscaled gradients, and whether any is inf or NaN; gradients stay as they are."""
    sums = power_sums(plan, found, norm_type)
    norms = norms_of(plan, found, norm_type, sums, loss_scale)
    _report(plan, found, norm_type, sums, loss_scale)
    return norms


def _report(plan: ClipPlan, found: Sequence[Found], norm_type: float, sums: Tensor, loss_scale: LossScale) -> None:
    """Sets ``found_inf``, if there is one; measures anew where these sums don't tell."""
    if loss_scale.found_inf is not None:
        loss_scale.report(sums if sums_tell_nonfinite(norm_type) else power_sums(plan, found, math.inf))


def clip_(
    plan: ClipPlan,
    found: Sequence[Found],
    policy: StepCaps,
    rule: ClipRule,
    raise_nonfinite: bool,
    loss_scale: LossScale = UNSCALED,
    update: Update | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Clips in place; norms before and coefficients, both [K], and the caps. Syncs for ``raise_nonfinite`` only.

    With an ``update`` that is what is done instead of scaling, and gradients stay as they are.

    One bucket takes its backend's fused path, if there is one. Anything else takes two steps, power sums first:
    several devices or backends, a sparse gradient with duplicate indices (measured coalesced, scaled as it is),
    errors on non-finite norms, which must come before the first write, caps that depend on the norms, and components
    that differ in ``eps``.
    """
    order = rule.norm_type
    in_steps = plan.sparse or raise_nonfinite or _takes_steps(policy, rule, loss_scale)
    fused = FUSED.get(plan.buckets[0].backend) if len(plan.buckets) == 1 and not in_steps else None
    if fused is not None:
        bucket, (own, addresses) = plan.buckets[0], found[0]
        targets = own if bucket.plain else _targets(bucket, own, order)
        caps = policy.caps(bucket.device, None)
        if update is None:
            torch.autograd.graph.increment_version(own)
            norms, coefs = fused.clip_(bucket, targets, caps, rule, loss_scale, addresses)
            return norms, coefs, caps
        outcome = update.clip_and_apply_(bucket, targets, caps, rule, loss_scale, addresses)
        if outcome is not None:
            return *outcome, caps
    sums = power_sums(plan, found, order)
    norms = norms_of(plan, found, order, sums, loss_scale)
    coefs, caps = coefficients_of(norms, plan.components.names, policy, rule, raise_nonfinite)
    _report(plan, found, order, sums, loss_scale)
    apply_(plan, found, loss_scale.factors(coefs), rule, update)
    return norms, coefs, caps


def clip_at_once_(
    plans: Plans,
    parameters: tuple[Tensor, ...],
    policy: StepCaps,
    rule: ClipRule,
    backend: str | None,
    loss_scale: LossScale = UNSCALED,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """What ``clip_`` does in a steady training loop, in one native call: it looks at the gradients, and clips them.

    None, and nothing is changed, if that isn't possible. A threshold's ``caps`` may have been called all the same.
    """
    if _takes_steps(policy, rule, loss_scale):
        return None
    for i, plan in enumerate(plans.clipped_before(rule.norm_type, backend)):
        bucket = plan.at_once
        if bucket is None:
            continue
        used = loss_scale if loss_scale is UNSCALED else loss_scale.on(bucket.device)
        caps = policy.caps(bucket.device, None)
        outcome = AT_ONCE[bucket.backend].clip_at_once_(bucket, parameters, caps, rule, used)
        if outcome is not None:
            if i:
                plans.prefer(plan, rule.norm_type, backend)
            if used is not loss_scale:
                loss_scale.deliver(used)
            return *outcome, caps
    return None


def _takes_steps(policy: StepCaps, rule: ClipRule, loss_scale: LossScale) -> bool:
    """Whether norms must be known before the first gradient is written, whatever the gradients are."""
    tells = loss_scale.found_inf is None or sums_tell_nonfinite(rule.norm_type)
    return policy.needs_norms or policy.eps is not None or rule.norm_type <= 0 or not tells


def sums_tell_nonfinite(norm_type: float) -> bool:
    """Whether power sums are inf or NaN exactly where an element is; other orders' overflow, or lose an inf."""
    return norm_type in (1.0, 2.0, math.inf)


def power_sums(plan: ClipPlan, found: Sequence[Found], norm_type: float) -> Tensor:
    """Power sums of the K components over all buckets, in ``wide_dtype``."""
    parts: list[Tensor] = []
    for bucket, (own, addresses) in zip(plan.buckets, found, strict=True):
        sources = _targets(bucket, own, norm_type, coalesce=True)
        parts.append(BACKENDS[bucket.backend].power_sums(bucket, sources, norm_type, addresses).to(plan.device))
    if len(parts) == 1:
        return parts[0]
    shape, device = (len(plan.components.names),), plan.device
    nothing = torch.full(shape, neutral(norm_type), dtype=wide_dtype(device), device=device)
    return formula.merged(torch.stack([*parts, nothing], -1), norm_type)


def apply_(
    plan: ClipPlan, found: Sequence[Found], factors: Tensor, rule: ClipRule, update: Update | None = None
) -> None:
    """g <- factor * g in place, by the K components' factors; or the update from these products."""
    for bucket, (own, addresses) in zip(plan.buckets, found, strict=True):
        here = factors.to(bucket.device)
        if update is not None:
            update.apply_(bucket, own, here, rule.zero_fill, addresses)
            continue
        targets = _targets(bucket, own, rule.norm_type)
        torch.autograd.graph.increment_version(own)
        BACKENDS[bucket.backend].scale_(bucket, targets, here, rule.zero_fill, addresses)


def has_elements(plan: ClipPlan, found: Sequence[Found]) -> list[bool]:
    """Of each component, whether its gradients have any element; norms of negative order don't tell."""
    pairs = zip(plan.buckets, found, strict=True)
    grads = {i: g for bucket, (own, _) in pairs for i, g in zip(bucket.positions, own, strict=True)}
    has = [False] * len(plan.components.names)
    for position, component, place in plan.components.members:
        has[component] |= position in grads and narrowed(grads[position], place).numel() > 0
    return has


def coefficients_of(
    norms: Tensor, names: Sequence[str], policy: StepCaps, rule: ClipRule, raise_nonfinite: bool
) -> tuple[Tensor, Tensor]:
    """Coefficients and caps from the norms of the components of these names."""
    if raise_nonfinite:
        finite = norms.isfinite().tolist()  # the one host sync, asked for by the caller
        if not all(finite):
            bad = [name for name, ok in zip(names, finite, strict=True) if not ok]
            raise RuntimeError(nonfinite_message(bad, len(finite), rule.norm_type))
    caps = policy.caps(norms.device, norms if policy.needs_norms else None)
    return policy.coefficients(norms, caps, rule), caps


def known_norms(norms: Tensor, plan: ClipPlan) -> Tensor:
    """Norms [K] that the caller gave, as a call with this plan measures them; more precise ones stay so."""
    return formula.moved(norms, plan.device, torch.promote_types(norms.dtype, plan.norm_dtype))


def factors_of(coefs: Tensor, count: int, device: torch.device, loss_scale: LossScale) -> Tensor:
    """What gradients on the device are multiplied by, [count], from coefficients [] or [count] and the loss scale."""
    wide = formula.moved(coefs, device).expand(count).contiguous()
    return loss_scale.on(device).factors(wide)


def nonfinite_message(bad: Sequence[str], count: int, norm_type: float) -> str:
    """The error that names these of ``count`` components."""
    return (
        f"The norm of order {norm_type:g} is non-finite for {len(bad)} of {count} components: {some_of(bad, 8)}. "
        "No gradient was changed. nonfinite='propagate', 'zero' or 'skip' goes on without this error."
    )


def _targets(bucket: Bucket, own: list[Tensor], norm_type: float, *, coalesce: bool = False) -> list[Tensor]:
    """The strided tensors that a backend reads or scales; ``coalesce`` adds up duplicate indices, for measuring."""
    if bucket.plain:
        return own
    return [_memory(values_of(g.coalesce() if coalesce and g.is_sparse else g), norm_type) for g in own]


def _memory(grad: Tensor, norm_type: float) -> Tensor:
    """Without lazy conjugation or sign, and for p = 2 complex as pairs of reals: same norm, same scaling."""
    if grad.is_conj():
        grad = grad.conj()
    if grad.is_neg():
        grad = torch._neg_view(grad)
    return torch.view_as_real(grad) if grad.is_complex() and norm_type == 2.0 else grad
