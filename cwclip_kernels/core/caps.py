"""Caps for one set of parameters: fixed ones, or those of a threshold that is bound to their components."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..backends import native
from ..components.membership import Components
from ..distributed import local
from ..distributed.reduction_plan import ReductionPlan
from ..distributed.run import DistributedCall
from ..thresholds import Fixed, Setting, Threshold
from ..thresholds.base import StepCaps, caps_of
from ..thresholds.constant import checked_cap
from . import run
from .checks import has_no_data
from .formula import ClipRule, wide_dtype
from .identity import Owner, ids_of
from .plan import Plans, home_of


def trained_of(tensors: Sequence[Tensor]) -> tuple[bool, ...]:
    """Which of the parameters are trained; () if all are."""
    if False not in [t.requires_grad for t in tensors]:  # faster than asking for each gradient as well
        return ()
    trained = tuple(map(local.is_trained, tensors))
    return () if all(trained) else trained


def fixed_caps(
    max_norm: float | Tensor | Mapping[str, float], components: Components, everywhere: tuple[str, ...] | None = None
) -> StepCaps:
    """Caps that are the same at every step, or read from a tensor; checked, and patterns matched.

    ``everywhere`` are the names of the components of all ranks, where other ranks have others.
    """
    if not isinstance(max_norm, Tensor | Mapping):
        checked_cap(max_norm, "max_norm")
    fixed = Fixed(max_norm)
    names, others = components.names, (components.spellings, components.aliases, everywhere)
    fixed.bind(Setting(names, (), math.nan, math.nan, torch.device("cpu"), torch.Tensor, (), *others))
    return StepCaps(fixed.adds_eps, fixed.needs_norms, fixed.caps)


class BoundThreshold:
    """A threshold bound to components. Between calls it keeps neither the threshold nor the parameters alive.

    A threshold that doesn't learn may serve other parameters in between, with the same component names.
    """

    def __init__(
        self, threshold: Threshold, components: Components, reductions: ReductionPlan | None, rule: ClipRule
    ) -> None:
        if threshold.needs_all_components and reductions is not None and reductions.has_stages:
            raise ValueError(
                f"max_norm: {threshold} looks at all components together, of which each rank of "
                "pp_mesh has others; use a threshold that looks at each by itself"
            )
        self._threshold = weakref.ref(threshold)
        self._components = components
        self._reductions = reductions
        self._rule = rule
        self._plans = Plans(components if reductions is None else reductions.local, "the parameter")
        self._measure: Callable[[], Tensor] | None = None  # while caps are computed
        self._form: object = None
        self._setting: Setting | None = None
        self._eps_on: dict[torch.device, tuple[tuple[bool, ...], Tensor]] = {}

    def is_for(self, threshold: Threshold, rule: ClipRule) -> bool:
        """Whether a call with this threshold and rule can use it."""
        own = self._rule
        return self._threshold() is threshold and (own.norm_type, own.eps) == (rule.norm_type, rule.eps)

    def for_call(self, threshold: Threshold, tensors: Sequence[Tensor]) -> StepCaps:
        """Binds the threshold again if parameters were frozen, unfrozen or given shapes since the last call."""
        form = trained_of(tensors), native.form_of(list(tensors))
        if self._setting is None or form != self._form:
            self._form, self._setting = form, self._make_setting(tensors)
        self.bind_again(threshold)
        return self.measuring(threshold, partial(self._norms_of, tensors))

    def bind_again(self, threshold: Threshold) -> None:
        """Binds the threshold as it was, if it has been used for other parameters since."""
        if self._setting is not None and not threshold.is_bound_to(self._setting):
            threshold.bind(self._setting)

    def measuring(self, threshold: Threshold, measure: Callable[[], Tensor] | None) -> StepCaps:
        """The threshold's caps, with the parameters' norms from ``measure``; None if it can't ask for these."""
        caps = partial(self._caps, threshold, measure)
        adds = threshold.adds_eps_to() if self._rule.eps > 0.0 else None
        eps = None if adds is None else partial(self._eps, adds)
        return StepCaps(threshold.adds_eps, threshold.needs_norms, caps, threshold.update_, eps)

    def _eps(self, adds: tuple[bool, ...], device: torch.device) -> Tensor:
        """What is added to each norm, [K]; kept, since a captured graph goes on reading it."""
        known = self._eps_on.get(device)
        if known is None or known[0] != adds:
            values = [self._rule.eps if one else 0.0 for one in adds]
            known = adds, torch.tensor(values, dtype=wide_dtype(device), device="cpu").to(device)
            self._eps_on[device] = known
        return known[1]

    def _caps(
        self, threshold: Threshold, measure: Callable[[], Tensor] | None, device: torch.device, norms: Tensor | None
    ) -> Tensor:
        self._measure = measure
        try:
            return caps_of(threshold, device, norms, len(self._components.names))
        finally:
            self._measure = None

    def _parameter_norms(self) -> Tensor:
        """``Setting.parameter_norms``."""
        if self._measure is None:
            raise RuntimeError(
                "parameter_norms: call it in caps(), while a clipper is at work; a threshold for clip_in_backward "
                "says reads_parameters = True if it does"
            )
        return self._measure()

    @torch.no_grad()
    def _norms_of(self, tensors: Sequence[Tensor]) -> Tensor:
        if self._reductions is None:
            return norms_of_trained(self._plans, tensors, self._rule.norm_type)
        call = DistributedCall(self._reductions, self._plans, tensors, home_of(tensors), None, writes=False)
        return call.norms(self._rule.norm_type, of_parameters=True)

    def _make_setting(self, tensors: Sequence[Tensor]) -> Setting:
        components, reductions, rule = self._components, self._reductions, self._rule
        counts = local.member_numels(components, tensors) if reductions is None else reductions.member_numels
        trained = trained_of(tensors)
        numels, sizes = [0] * len(components.names), [0] * len(components.names)
        members: list[dict[int, None]] = [{} for _ in components.names]
        for (position, component, _), count in zip(components.members, counts, strict=True):
            members[component][position] = None
            sizes[component] += count
            if not trained or trained[position]:
                # A parameter without shape counts as one element until it has one.
                numels[component] += max(count, 1) if is_lazy(tensors[position]) else count
        # While parameters have no data, no state is made, which would have none either.
        device = torch.device("meta") if any(map(has_no_data, tensors)) else home_of(tensors)
        others = components.spellings, components.aliases, None if reductions is None else reductions.all_names
        own = tuple(numels), rule.norm_type, rule.eps, device, self._parameter_norms, trained
        clipped = [tensors[i] for i in sorted(components.clipped)]  # the same, whatever else an optimizer steps
        owner = Owner(ids, local.storage_of(clipped[-1])) if (ids := ids_of(clipped)) else None
        spanning = () if reductions is None else reductions.spanning
        return Setting(components.names, *own, *others, tuple(map(tuple, members)), tuple(sizes), spanning, owner)


def norms_of_trained(plans: Plans, tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """The norms of the parameters themselves, [K]; 0 for frozen ones, which aren't read."""
    values = [t.detach() if local.is_trained(t) else None for t in tensors]
    return run.norms_of(*plans.measured(values, tensors, norm_type, None), norm_type)
