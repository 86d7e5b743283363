"""A threshold at work on one set of parameters: what it is told about them, and the caps that it answers with."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import execute
from .components import Components, type_name
from .distributed import call, share
from .formula import ClipRule
from .gradients import has_no_data
from .plan import Planner
from .thresholds import Setting, Threshold

if TYPE_CHECKING:
    from .distributed.spread import Spread

_REQUIRES_GRAD = attrgetter("requires_grad")


def is_trained(tensor: Tensor) -> bool:
    """Whether a gradient is to be expected: of a frozen parameter nothing is measured or counted."""
    return tensor.requires_grad or tensor.grad is not None


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

    def __init__(self, threshold: Threshold, components: Components, spread: Spread | None, rule: ClipRule) -> None:
        if threshold.needs_all_components and spread is not None and spread.has_stages:
            raise ValueError(
                f"max_norm: {type_name(threshold)} looks at all components together, of which each rank of "
                "pp_mesh has others; use a policy that looks at each by itself"
            )
        self._threshold = threshold
        self._components = components
        self._spread = spread
        self._rule = rule
        self._parameter_norms = ParameterNorms(components, spread, rule.norm_type)
        self._trained: tuple[bool, ...] = ()
        self._setting: Setting | None = None

    def is_for(self, threshold: Threshold, rule: ClipRule) -> bool:
        """Whether it is what a call with this threshold and rule needs."""
        own = self._rule
        return self._threshold is threshold and (own.norm_type, own.eps) == (rule.norm_type, rule.eps)

    def at_work(self, tensors: Sequence[Tensor]) -> ThresholdAtWork:
        """For one call with these parameters, of which some may have been frozen or set free since the last."""
        # Asked at every call, so without a look at each gradient where all are trained.
        trained = () if all(map(_REQUIRES_GRAD, tensors)) else tuple(map(is_trained, tensors))
        if self._setting is None or trained != self._trained:
            self._trained = trained
            self._setting = self._make_setting(tensors)
        if not self._threshold.is_bound_to(self._setting):
            self._threshold.bind(self._setting)
        return ThresholdAtWork(self._threshold, self._parameter_norms, tensors)

    def _make_setting(self, tensors: Sequence[Tensor]) -> Setting:
        counts = (
            share.member_numels(self._components, tensors) if self._spread is None else self._spread.member_numels
        )
        numels = [0] * len(self._components.names)
        for (position, component, _), count in zip(self._components.members(), counts, strict=True):
            if not self._trained or self._trained[position]:
                numels[component] += count
        rule, device = self._rule, home_of(tensors)
        if any(map(has_no_data, tensors)):
            device = torch.device("meta")  # so that no state is made yet, which would be without data, too
        return Setting(self._components.names, tuple(numels), rule.norm_type, rule.eps, device, self._parameter_norms)


class ThresholdAtWork:
    """A threshold for one call, as ``CapPolicy``."""

    def __init__(self, threshold: Threshold, parameter_norms: ParameterNorms, tensors: Sequence[Tensor]) -> None:
        self._threshold = threshold
        self._parameter_norms = parameter_norms
        self._tensors = tensors
        self.adds_eps = threshold.adds_eps

    @property
    def needs_norms(self) -> bool:
        """See ``Threshold``."""
        return self._threshold.needs_norms

    def caps(self, device: torch.device, norms: Tensor | None) -> Tensor:
        """See ``Threshold``."""
        self._parameter_norms.tensors = self._tensors
        try:
            return self._threshold.caps(device, norms)
        finally:
            self._parameter_norms.tensors = None

    def update_(self, norms: Tensor, coefs: Tensor) -> None:
        """See ``Threshold``."""
        self._threshold.update_(norms, coefs)


class ParameterNorms:
    """Measures the parameters that a call is about, each component's trained ones together; [K], no host sync.

    Attributes:
        tensors: these parameters, while the call asks for caps; None in between, so that nobody keeps them alive.
    """

    def __init__(self, components: Components, spread: Spread | None, norm_type: float) -> None:
        self.tensors: Sequence[Tensor] | None = None
        self._spread = spread
        self._norm_type = norm_type
        self._planner = Planner(components if spread is None else spread.local, kind="parameter")

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """The norms as the parameters are now.

        Raises:
            RuntimeError: no call is going on.
        """
        if self.tensors is None:
            raise RuntimeError("parameter_norms: call it in caps(), while a clipper is at work")
        home, order = home_of(self.tensors), self._norm_type
        if self._spread is not None:
            return call.norms_of_values(call.Job(self._spread, self._planner, None, home), self.tensors, order)
        here = [t.detach() if is_trained(t) else None for t in self.tensors]
        return self._planner.measure(lambda plan, own: execute.norms_of(plan, own, order), here, home, order, None)
