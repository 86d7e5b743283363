"""One call over several ranks: power sums measured here, added up over ranks, gradients scaled here.

If this rank fails before the collectives of the call (a gradient can't be clipped, a backend refuses) it still takes
part in them, with NaN, and raises afterwards: the other ranks don't wait for it, and get norms of NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
from .local import LocalGradients
from .reduction_plan import ReductionPlan


@dataclass
class DistributedCall:
    """One call for these parameters, made by all ranks that share one of them."""

    reductions: ReductionPlan
    plans: Plans  # of reductions.local
    tensors: Sequence[Tensor]  # the parameters
    home: torch.device  # of the sums and the results
    backend: str | None  # the user's choice
    update: run.Update | None = None  # what is done instead of scaling gradients
    writes: bool = True  # whether gradients are to be scaled; False where only norms or coefficients are asked for
    _measured: tuple[ClipPlan, Sequence[Found], LocalGradients] | None = None
    _loss_scale: LossScale = UNSCALED
    _failure: Exception | None = None  # of this rank

    def clip_(
        self, policy: StepCaps, rule: ClipRule, raise_nonfinite: bool, scaled: LossScale
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Clips what this rank holds of each gradient: norms before and coefficients, [K] each, and the caps.

        Syncs with the host for ``raise_nonfinite`` only.
        """
        norms, coefs, caps = self.measure(policy, rule, raise_nonfinite, scaled)
        assert self._measured is not None  # since nothing failed
        plan, found, grads = self._measured
        run.apply_(plan, found, self.factors(coefs), rule, self.update)
        if self.update is None:
            grads.touched()
        scaled.deliver(self._loss_scale)
        return norms, coefs, caps

    def factors(self, coefs: Tensor) -> Tensor:
        """After ``measure``: the factor of the gradients in each component of ``reductions.local``."""
        return self.reductions.rows.to_local(self._loss_scale.factors(coefs))

    def factor_of_unclipped(self, coefs: Tensor) -> Tensor:
        """After ``measure``: the factor of the gradients in no component, which are unscaled at the most: [1]."""
        return self._loss_scale.factors(coefs.new_ones(1))

    def measure(
        self, policy: StepCaps, rule: ClipRule, raise_nonfinite: bool, scaled: LossScale
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Norms, coefficients and caps, and nothing written yet, on any rank; raises what failed on this rank."""
        order = rule.norm_type
        norms = self._norms(order, scaled)
        bad, count = self.reductions.nonfinite(norms) if raise_nonfinite else ([], 0)
        caps = policy.caps(self.home, norms if policy.needs_norms else None)
        coefs = policy.coefficients(norms, caps, rule)
        if self._failure is not None:
            raise self._failure
        if bad:
            raise RuntimeError(run.nonfinite_message(bad, count, order))
        return norms, coefs, caps

    def norms(self, norm_type: float, scaled: LossScale = UNSCALED, *, of_parameters: bool = False) -> Tensor:
        """The K norms of the tensors' gradients, or of the tensors themselves; these aren't changed."""
        norms = self._norms(norm_type, scaled, of_parameters=of_parameters)
        if self._failure is not None:
            raise self._failure
        scaled.deliver(self._loss_scale)
        return norms

    def _norms(self, order: float, scaled: LossScale, *, of_parameters: bool = False) -> Tensor:
        """The K norms, unscaled, and ``found_inf``; a failure of this rank is kept, not raised."""
        needs_maximum = scaled.found_inf is not None and not run.sums_tell_nonfinite(order)
        sums = self._power_sums([order, math.inf] if needs_maximum else [order], scaled, of_parameters=of_parameters)
        if scaled.found_inf is not None:
            found_inf = self.reductions.is_true_anywhere(~sums[-1].isfinite().all())
            self._loss_scale.report(torch.where(found_inf > 0, math.inf, 0.0))
        norms = self._loss_scale.unscaled(formula.root(sums[0], order), order)
        return norms.to(self.reductions.norm_dtype(self.tensors))

    def _power_sums(self, orders: Sequence[float], scaled: LossScale, *, of_parameters: bool) -> list[Tensor]:
        """Power sums [K] over all ranks, for each order. A failure of this rank is kept, not raised."""
        has_elements: Tensor | None = None
        try:
            grads = (self.reductions.values if of_parameters else self.reductions.gradients)(self.tensors)
            is_written = self.update is None and self.writes
            if is_written:
                grads.check_not_leaves()
            self._loss_scale = scaled.on(self.home)
            get = self.plans.get if is_written else self.plans.measured
            plan, found = get(grads.local, self.tensors, orders[0], self.backend)
            if self.update is not None:
                self.update.prepare(plan.buckets, found)
            # To the home device: that of the first gradient may be another one on each rank.
            own = [run.power_sums(plan, found, order).to(self.home) for order in orders]
            if orders[0] < 0:
                here = run.has_elements(plan, found)
                has_elements = torch.tensor(here, dtype=torch.bool, device="cpu").to(self.home)
            self._measured = plan, found, grads
        except WithoutData:
            raise  # on all ranks alike, since parameters without data are so everywhere
        except Exception as failure:
            self._failure, self._loss_scale = failure, UNSCALED
            shape, home = (len(self.reductions.local.names),), self.home
            own = [torch.full(shape, math.nan, dtype=wide_dtype(home), device=home) for _ in orders]
            has_elements = torch.ones(shape, dtype=torch.bool, device=home) if orders[0] < 0 else None
        needed = [has_elements if order < 0 else None for order in orders]
        return list(map(self.reductions.sum_over_ranks, own, needed, orders))
