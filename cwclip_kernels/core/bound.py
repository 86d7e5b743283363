"""A threshold at work on one set of parameters: what it is told about them, and the caps that it answers with."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..arguments import type_name
from ..backends import native
from ..components.membership import Components
from ..distributed import local
from ..distributed.run import DistributedCall
from ..thresholds import Setting, Threshold
from . import run
from .checks import has_no_data
from .formula import ClipRule, wide_dtype
from .plan import Planner

if TYPE_CHECKING:
    from ..distributed.reduction_plan import ReductionPlan

_REQUIRES_GRAD = attrgetter("requires_grad")


def is_trained(tensor: Tensor) -> bool:
    """Whether a gradient is to be expected: of a frozen parameter nothing is measured or counted."""
    return tensor.requires_grad or tensor.grad is not None


def trained_of(tensors: Sequence[Tensor]) -> tuple[bool, ...]:
    """Which of the parameters are trained; () if all are."""
    # Asked at every call, so without a look at each gradient where all are trained.
    if all(map(_REQUIRES_GRAD, tensors)):
        return ()
    trained = tuple(map(is_trained, tensors))
    return () if all(trained) else trained


def home_of(tensors: Sequence[Tensor]) -> torch.device:
    """Where results go if there is no gradient: to the first parameter that is trained."""
    for tensor in tensors:
        if tensor.requires_grad:
            return tensor.device
    return tensors[0].device if tensors else torch.device("cpu")


class BoundThreshold:
    """A threshold bound to components. From call to call it keeps none of the parameters.

    Args:
        threshold: what computes caps; it may serve other parameters in between, with the same component names.
        components: of the whole call.
        spread: how these are spread over ranks; None if they aren't.
        rule: order of the norm, and eps.

    Raises:
        ValueError: the threshold looks at all components together, and this rank of ``pp_mesh`` has only some.
    """

    def __init__(
        self, threshold: Threshold, components: Components, spread: ReductionPlan | None, rule: ClipRule
    ) -> None:
        if threshold.needs_all_components and spread is not None and spread.has_stages:
            raise ValueError(
                f"max_norm: {type_name(threshold)} looks at all components together, of which each rank of "
                "pp_mesh has others; use a policy that looks at each by itself"
            )
        self._threshold = weakref.ref(threshold)  # weak, since the function's cache keeps this
        self._components = components
        self._spread = spread
        self._rule = rule
        self._parameter_norms = ParameterNorms()
        self._planner = Planner(components if spread is None else spread.local, kind="parameter")
        self._form: object = None
        self._setting: Setting | None = None

    def is_for(self, threshold: Threshold, rule: ClipRule) -> bool:
        """Whether it is what a call with this threshold and rule needs."""
        own = self._rule
        return self._threshold() is threshold and (own.norm_type, own.eps) == (rule.norm_type, rule.eps)

    def at_work(self, threshold: Threshold, tensors: Sequence[Tensor]) -> ThresholdAtWork:
        """For one call with these parameters, which may have been frozen, unfrozen or given shapes since the last."""
        form = trained_of(tensors), native.form_of(list(tensors))
        if self._setting is None or form != self._form:
            self._form, self._setting = form, self._make_setting(tensors)
        if not threshold.is_bound_to(self._setting):
            threshold.bind(self._setting)
        return ThresholdAtWork(threshold, self._parameter_norms, partial(self._measure, tensors))

    @torch.no_grad()
    def _measure(self, tensors: Sequence[Tensor]) -> Tensor:
        if self._spread is None:
            return norms_of_trained(self._planner, tensors, self._rule.norm_type)
        call = DistributedCall(self._spread, self._planner, tensors, home_of(tensors), None)
        return call.norms(self._rule.norm_type, of_parameters=True)

    def _make_setting(self, tensors: Sequence[Tensor]) -> Setting:
        counts = (
            local.member_numels(self._components, tensors) if self._spread is None else self._spread.member_numels
        )
        trained = trained_of(tensors)
        numels = [0] * len(self._components.names)
        for (position, component, _), count in zip(self._components.members, counts, strict=True):
            if not trained or trained[position]:
                # What has no shape yet counts as one element until it has.
                numels[component] += max(count, 1) if is_lazy(tensors[position]) else count
        rule, device = self._rule, home_of(tensors)
        if any(map(has_no_data, tensors)):
            device = torch.device("meta")  # so that no state is made yet, which would be without data, too
        names, spellings, norms = self._components.names, self._components.spellings, self._parameter_norms
        return Setting(names, tuple(numels), rule.norm_type, rule.eps, device, norms, trained, spellings)


class ThresholdAtWork:
    """A threshold for one call, as ``CapPolicy``.

    Args:
        threshold: what computes caps.
        parameter_norms: what it was bound with.
        measure: measures the parameters of this call; None if there are none at hand.
    """

    def __init__(
        self, threshold: Threshold, parameter_norms: ParameterNorms, measure: Callable[[], Tensor] | None
    ) -> None:
        self._threshold = threshold
        self._parameter_norms = parameter_norms
        self._measure = measure
        self.adds_eps = threshold.adds_eps
        self.reads_parameters = threshold.reads_parameters
        self.counts_trained = threshold.needs_all_components and threshold.reads_numels

    @property
    def needs_norms(self) -> bool:
        """See ``Threshold``."""
        return self._threshold.needs_norms

    def caps(self, device: torch.device, norms: Tensor | None) -> Tensor:
        """See ``Threshold``."""
        return self.caps_by(self._measure, device, norms)

    def caps_by(self, measure: Callable[[], Tensor] | None, device: torch.device, norms: Tensor | None) -> Tensor:
        """Caps, with parameters measured as the caller says."""
        self._parameter_norms.measure = measure
        try:
            caps = self._threshold.caps(device, norms)
        finally:
            self._parameter_norms.measure = None
        _check_caps(caps, self._threshold, device)
        return caps

    def without_parameters(self) -> ThresholdAtWork:
        """The same for who keeps it from call to call, and no parameter alive."""
        return ThresholdAtWork(self._threshold, self._parameter_norms, None)

    def update_(self, norms: Tensor, coefs: Tensor) -> None:
        """See ``Threshold``."""
        self._threshold.update_(norms, coefs)


def _check_caps(caps: Tensor, threshold: Threshold, device: torch.device) -> None:
    """Raises unless kernels can read these caps, which somebody else's threshold may have made."""
    count = len(threshold.setting.names)
    wide = wide_dtype(device)
    is_right = isinstance(caps, Tensor) and caps.dtype == wide and caps.device == device and caps.is_contiguous()
    if not is_right or caps.shape not in ((), (count,)):
        raise TypeError(
            f"max_norm: caps() of {type_name(threshold)} has to return a contiguous {wide} tensor of shape [] or "
            f"[{count}] on {device}, not {_described(caps)}"
        )


def _described(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"a {type_name(value)}"
    return f"{value.dtype} of shape {list(value.shape)} on {value.device}"


class ParameterNorms:
    """What a threshold calls for the norms of the parameters that a call is about: [K], no host sync.

    Attributes:
        measure: measures them, while the call asks for caps; None in between, so that nobody keeps parameters alive.
    """

    def __init__(self) -> None:
        self.measure: Callable[[], Tensor] | None = None

    def __call__(self) -> Tensor:
        """The norms as the parameters are now.

        Raises:
            RuntimeError: no call is going on, or in the backward pass of a threshold that doesn't say
                ``reads_parameters``.
        """
        if self.measure is None:
            raise RuntimeError(
                "parameter_norms: call it in caps(), while a clipper is at work; a threshold for clip_in_backward "
                "says reads_parameters = True if it does"
            )
        return self.measure()


def norms_of_trained(planner: Planner, tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """The norms of the parameters themselves, [K]; frozen ones aren't read."""
    here = [t.detach() if is_trained(t) else None for t in tensors]
    plan, found = planner.measured(here, home_of(tensors), norm_type, None)
    return run.norms_of(plan, found, norm_type)
