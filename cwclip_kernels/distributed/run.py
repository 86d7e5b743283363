"""One call over several ranks: measured here, added up over ranks, scaled here.

A rank whose own part fails (a gradient that can't be clipped, a backend that refuses) still joins all collectives of
the call, with NaN, before it raises: the others don't wait in vain, and see norms of NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import formula, run
from ..core.bucket import Found
from ..core.checks import WithoutData
from ..core.formula import ClipRule, wide_dtype
from ..core.loss_scale import UNSCALED, LossScale
from ..core.plan import ClipPlan, Plans
from ..thresholds.base import StepCaps
from .local import Held
from .reduction_plan import Spread


@dataclass(frozen=True)
class Job:
    """What a call needs to know beside its arguments.

    Attributes:
        spread: of the components over ranks.
        planner: of ``spread.local``.
        backend: the user's choice or None.
        home: device of the sums and the results.
    """

    spread: Spread
    planner: Plans
    backend: str | None
    home: torch.device


@dataclass
class _Part:
    """This rank's part of the measurement.

    Attributes:
        sums: power sums of ``spread.local``, for each order asked for.
        measured: where there are elements; for negative orders only.
        failure: why there are NaN instead.
    """

    sums: dict[float, Tensor]
    measured: Tensor | None = None
    plan: ClipPlan | None = None
    found: Sequence[Found] = ()
    held: Held | None = None
    loss_scale: LossScale = UNSCALED
    failure: Exception | None = None


def clip_(
    job: Job,
    tensors: Sequence[Tensor],
    policy: StepCaps,
    rule: ClipRule,
    raise_nonfinite: bool,
    scaled: LossScale,
) -> tuple[Tensor, Tensor, Tensor]:
    """Clips what is held here of each gradient: norms before and coefficients, [K] each, and the caps.

    Syncs with the host for ``raise_nonfinite`` only.
    """
    spread, order = job.spread, rule.norm_type
    tells = run.sums_tell_nonfinite(order)
    orders = [order] if tells or not scaled.found_inf is not None else [order, math.inf]
    part = _measure(job, tensors, lambda: spread.gradients(tensors), orders, scaled, writes=True)
    sums = spread.whole(part.sums[order], part.measured, order)
    norms = part.loss_scale.unscaled(formula.root(sums, order)).to(spread.norm_dtype(tensors))
    bad, count = spread.nonfinite(norms) if raise_nonfinite else ([], 0)
    if scaled.found_inf is not None:
        if not tells:
            sums = spread.whole(part.sums[math.inf], None, math.inf)
        found = spread.any_anywhere(~sums.isfinite().all())
        part.loss_scale.report(torch.where(found > 0, math.inf, 0.0))
    caps = policy.caps(job.home, norms if policy.needs_norms else None)
    coefs = formula.coefficients(norms, caps, rule)
    if part.failure is not None:
        raise part.failure
    if bad:
        raise RuntimeError(run.nonfinite_message(bad, count, order))
    assert part.plan is not None and part.held is not None  # noqa: PT018  # as nothing failed
    factors = spread.local_factors(part.loss_scale.factors(coefs))
    run.scale_(part.plan, part.found, factors, rule)
    part.held.touched()
    scaled.deliver(part.loss_scale)
    return norms, coefs, caps


def norms_of(job: Job, tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """The K norms of the tensors' gradients, which stay as they are."""
    return _norms(job, _measure(job, tensors, lambda: job.spread.gradients(tensors), [norm_type]), tensors, norm_type)


def norms_of_values(job: Job, tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """The K norms of the tensors themselves."""
    part = _measure(job, tensors, lambda: Held(job.spread.values(tensors), []), [norm_type])
    return _norms(job, part, tensors, norm_type)


def _measure(
    job: Job,
    tensors: Sequence[Tensor],
    read: Callable[[], Held],
    orders: Sequence[float],
    scaled: LossScale = UNSCALED,
    *,
    writes: bool = False,
) -> _Part:
    """Measures what is here. Whatever goes wrong is in the result, not raised: the others are to be met first."""
    try:
        held = read()
        if writes:
            held.check_not_leaves()
        get = job.planner.get if writes else job.planner.measured
        plan, found = get(held.local, tensors, orders[0], job.backend)
        # Not to the first gradient's device: where parameters lie on several, that may be another on each rank.
        sums = {order: run.power_sums(plan, found, order).to(job.home) for order in orders}
        measured = None
        if orders[0] < 0:
            measured = torch.tensor(run.has_elements(plan, found), dtype=torch.bool, device="cpu").to(job.home)
        return _Part(sums, measured, plan, found, held, scaled.on(job.home))
    except WithoutData:
        raise  # on all ranks, where parameters are fake: nothing is computed anywhere
    except Exception as failure:
        count = (len(job.spread.local.names),)
        nan = torch.full(count, math.nan, dtype=wide_dtype(job.home), device=job.home)
        measured = torch.ones(count, dtype=torch.bool, device=job.home) if orders[0] < 0 else None
        return _Part({order: nan.clone() for order in orders}, measured, failure=failure)


def _norms(job: Job, part: _Part, tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    sums = job.spread.whole(part.sums[norm_type], part.measured, norm_type)
    if part.failure is not None:
        raise part.failure
    return formula.root(sums, norm_type).to(job.spread.norm_dtype(tensors))
