"""A threshold at work on one set of parameters: what it is told about them, and the caps that it answers with."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import attrgetter

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..arguments import type_name
from ..backends import native
from ..components.membership import Components
from ..distributed import local
from ..distributed import run as over_ranks
from ..distributed.reduction_plan import Spread
from ..thresholds import Fixed, Setting, Threshold
from ..thresholds.base import StepCaps
from ..thresholds.constant import checked_cap
from . import run
from .checks import has_no_data
from .formula import ClipRule, wide_dtype
from .plan import Plans, home_of

_REQUIRES_GRAD = attrgetter("requires_grad")


def is_trained(tensor: Tensor) -> bool:
    """Whether a gradient is to be expected: of a frozen parameter nothing is measured or counted."""
    return tensor.requires_grad or tensor.grad is not None


def trained_of(tensors: Sequence[Tensor]) -> tuple[bool, ...]:
    """Which of the parameters are trained; () if all are."""
    if all(map(_REQUIRES_GRAD, tensors)):  # asked at every call: without a look at each gradient
        return ()
    trained = tuple(map(is_trained, tensors))
    return () if all(trained) else trained


def fixed_caps(
    max_norm: float | Tensor | Mapping[str, float], components: Components, everywhere: tuple[str, ...] | None = None
) -> StepCaps:
    """Caps that are the same at every step, or read from a tensor, bound to the component names alone.

    Args:
        max_norm: checked here.
        components: whose names patterns match.
        everywhere: names of the components of all ranks, where other ranks have others.
    """
    if not isinstance(max_norm, Tensor | Mapping):
        checked_cap(max_norm, "max_norm")
    fixed = Fixed(max_norm)
    names, others = components.names, (components.spellings, components.aliases, everywhere)
    fixed.bind(Setting(names, (), math.nan, math.nan, torch.device("cpu"), torch.Tensor, (), *others))
    return StepCaps(fixed.adds_eps, fixed.needs_norms, fixed.caps, fixed.update_)


class BoundThreshold:
    """A threshold bound to components. Between calls it keeps none of the parameters alive.

    Args:
        threshold: what computes caps; it may serve other parameters in between, with the same component names.
        components: of the whole call.
        spread: how these are spread over ranks; None if they aren't.
        rule: order of the norm, and eps.

    Raises:
        ValueError: the threshold looks at all components together, and this rank of ``pp_mesh`` has only some.
    """

    def __init__(self, threshold: Threshold, components: Components, spread: Spread | None, rule: ClipRule) -> None:
        if threshold.needs_all_components and spread is not None and spread.has_stages:
            raise ValueError(
                f"max_norm: {type_name(threshold)} looks at all components together, of which each rank of "
                "pp_mesh has others; use a threshold that looks at each by itself"
            )
        self._threshold = weakref.ref(threshold)  # weak, since the function's cache keeps this
        self._components = components
        self._spread = spread
        self._rule = rule
        self._plans = Plans(components if spread is None else spread.local, kind="parameter")
        self._measure: Callable[[], Tensor] | None = None  # while caps are computed
        self._form: object = None
        self._setting: Setting | None = None

    def is_for(self, threshold: Threshold, rule: ClipRule) -> bool:
        """Whether it is what a call with this threshold and rule needs."""
        own = self._rule
        return self._threshold() is threshold and (own.norm_type, own.eps) == (rule.norm_type, rule.eps)

    def for_call(self, threshold: Threshold, tensors: Sequence[Tensor]) -> StepCaps:
        """Binds the threshold anew if parameters were frozen, unfrozen or given shapes since the last call."""
        form = trained_of(tensors), native.form_of(list(tensors))
        if self._setting is None or form != self._form:
            self._form, self._setting = form, self._make_setting(tensors)
        if not threshold.is_bound_to(self._setting):
            threshold.bind(self._setting)
        return self.measuring(threshold, partial(self._norms_of, tensors))

    def measuring(self, threshold: Threshold, measure: Callable[[], Tensor] | None) -> StepCaps:
        """The threshold's caps, with the parameters' norms from ``measure``; None where there are none to be had."""
        caps = partial(self._caps, threshold, measure)
        return StepCaps(threshold.adds_eps, threshold.needs_norms, caps, threshold.update_)

    def _caps(
        self, threshold: Threshold, measure: Callable[[], Tensor] | None, device: torch.device, norms: Tensor | None
    ) -> Tensor:
        self._measure = measure
        try:
            caps = threshold.caps(device, norms)
        finally:
            self._measure = None
        count, wide = len(self._components.names), wide_dtype(device)
        is_right = isinstance(caps, Tensor) and caps.dtype == wide and caps.device == device and caps.is_contiguous()
        if not is_right or caps.shape not in ((), (count,)):
            found = type_name(caps)
            if isinstance(caps, Tensor):
                found = f"{caps.dtype} of shape {list(caps.shape)} on {caps.device}"
            raise TypeError(
                f"max_norm: caps() of {type_name(threshold)} has to return a contiguous {wide} tensor of shape [] or "
                f"[{count}] on {device}, not {found}"
            )
        return caps

    def _parameter_norms(self) -> Tensor:
        """What ``Setting.parameter_norms`` calls: [K], no host sync."""
        if self._measure is None:
            raise RuntimeError(
                "parameter_norms: call it in caps(), while a clipper is at work; a threshold for clip_in_backward "
                "says reads_parameters = True if it does"
            )
        return self._measure()

    @torch.no_grad()
    def _norms_of(self, tensors: Sequence[Tensor]) -> Tensor:
        if self._spread is None:
            return norms_of_trained(self._plans, tensors, self._rule.norm_type)
        job = over_ranks.Job(self._spread, self._plans, None, home_of(tensors))
        return over_ranks.norms_of_values(job, tensors, self._rule.norm_type)

    def _make_setting(self, tensors: Sequence[Tensor]) -> Setting:
        components, spread, rule = self._components, self._spread, self._rule
        counts = local.member_numels(components, tensors) if spread is None else spread.member_numels
        trained = trained_of(tensors)
        numels = [0] * len(components.names)
        for (position, component, _), count in zip(components.members, counts, strict=True):
            if not trained or trained[position]:
                # What has no shape yet counts as one element until it has.
                numels[component] += max(count, 1) if is_lazy(tensors[position]) else count
        # Without data no state is made yet, which would be without data, too.
        device = torch.device("meta") if any(map(has_no_data, tensors)) else home_of(tensors)
        return Setting(
            components.names,
            tuple(numels),
            rule.norm_type,
            rule.eps,
            device,
            self._parameter_norms,
            trained,
            components.spellings,
            components.aliases,
            None if spread is None else spread.all_names,
        )


def norms_of_trained(plans: Plans, tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """The norms of the parameters themselves, [K]; frozen ones aren't read."""
    here = [t.detach() if is_trained(t) else None for t in tensors]
    plan, found = plans.measured(here, tensors, norm_type, None)
    return run.norms_of(plan, found, norm_type)
