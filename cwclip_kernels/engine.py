"""One step's work on tensors that the caller holds: arguments checked, components planned, gradients clipped."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from . import dispatch, execute
from .caps import CapPolicy, Caps, MaxNorm, as_float
from .components import Components, type_name
from .formula import POLICIES, ClipRule
from .plan import ClipPlan, Planner, narrowed
from .scaled_loss import NOT_SCALED, ScaledLoss
from .thresholds import Setting, Threshold
from .thresholds.base import BoundThreshold

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Options:
    """The scalar arguments of a call, checked.

    Attributes:
        rule: norm order, eps, non-finite policy.
        raise_nonfinite: whether a non-finite norm is an error.
        backend: the user's choice or None.
    """

    rule: ClipRule
    raise_nonfinite: bool
    backend: str | None


def check_options(
    norm_type: float, error_if_nonfinite: bool, eps: float, nonfinite: str, backend: str | None
) -> Options:
    """Checks the scalar arguments.

    Raises:
        TypeError, ValueError: names the argument and what it takes.
    """
    dispatch.check_backend(backend)
    if not isinstance(error_if_nonfinite, bool):
        raise TypeError(f"error_if_nonfinite: expected a bool, not {type_name(error_if_nonfinite)}")
    if not isinstance(nonfinite, str):
        raise TypeError(f"nonfinite: expected one of {', '.join(POLICIES)}, not {type_name(nonfinite)}")
    if nonfinite not in POLICIES:
        raise ValueError(f"nonfinite: expected one of {', '.join(POLICIES)}, not {nonfinite!r}")
    if error_if_nonfinite and nonfinite not in ("propagate", "error"):
        raise ValueError(f"error_if_nonfinite=True contradicts nonfinite={nonfinite!r}; give one of them")
    rule = ClipRule(_checked_order(norm_type), _checked_eps(eps), nonfinite)
    return Options(rule, error_if_nonfinite or nonfinite == "error", backend)


def _checked_order(norm_type: object) -> float:
    if isinstance(norm_type, str) and norm_type in ("inf", "-inf"):  # torch's own spelling
        return float(norm_type)
    if isinstance(norm_type, bool) or not isinstance(norm_type, Real):
        raise TypeError(f"norm_type: expected a number or 'inf', not {norm_type!r}")
    order = as_float(norm_type, "norm_type")
    if math.isnan(order):
        raise ValueError("norm_type: expected a number or 'inf', not nan")
    return order


def _checked_eps(eps: object) -> float:
    if isinstance(eps, bool) or not isinstance(eps, Real):
        raise TypeError(f"eps: expected a number, not {type_name(eps)}")
    value = as_float(eps, "eps")
    if not 0.0 <= value < math.inf:
        raise ValueError(f"eps: expected a finite number >= 0, not {value}")
    return value


class Engine:
    """Components with their plan: one step's work on tensors that the caller holds.

    It keeps no reference to the tensors themselves, so that a cache of engines keeps no model alive.
    """

    def __init__(self, components: Components) -> None:
        self.components = components
        self._planner = Planner(components)
        self._last_caps: tuple[object, Caps] | None = None
        self._last_threshold: BoundThreshold | None = None

    def policy(self, max_norm: MaxNorm, tensors: Sequence[Tensor], rule: ClipRule) -> CapPolicy:
        """``max_norm``, checked, matched with the component names and brought to its device once while it stays."""
        if isinstance(max_norm, Threshold):
            if self._last_threshold is None or not self._last_threshold.is_for(max_norm, rule):
                self._last_threshold = BoundThreshold(max_norm, self._setting(tensors, rule))
            return self._last_threshold
        if isinstance(max_norm, Tensor):
            return Caps(max_norm, self.components.names)
        # With types, compared first: True equals 1 but is no cap, and comparing with a tensor may raise.
        named = max_norm.items() if isinstance(max_norm, Mapping) else [(None, max_norm)]
        items = [(pattern, type(value), value) for pattern, value in named]
        if self._last_caps is None or self._last_caps[0] != items:
            self._last_caps = items, Caps(max_norm, self.components.names)
        return self._last_caps[1]

    def _setting(self, tensors: Sequence[Tensor], rule: ClipRule) -> Setting:
        """What a threshold is told about the components."""
        numels = [0] * len(self.components.names)
        for position, component, box in self.components.members():
            if not is_lazy(tensors[position]):
                numels[component] += narrowed(tensors[position].detach(), box).numel()
        refs = [weakref.ref(t) for t in tensors]
        values = Planner(self.components)

        @torch.no_grad()
        def parameter_norms() -> Tensor:
            parameters = [t.detach() for ref in refs if (t := ref()) is not None]
            plan = values.plan(parameters, _home(parameters), rule.norm_type, None)
            return execute.norms_of(plan, parameters, rule.norm_type)

        return Setting(
            self.components.names, tuple(numels), rule.norm_type, rule.eps, _home(tensors), parameter_norms
        )

    def clip_(
        self, tensors: Sequence[Tensor], policy: CapPolicy, options: Options, scaled: ScaledLoss = NOT_SCALED
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Clips the tensors' gradients in place: norms before and coefficients, [K] each, and the caps."""
        rule, raise_nonfinite = options.rule, options.raise_nonfinite

        def work(plan: ClipPlan, grads: list[Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
            if scaled is NOT_SCALED:
                return execute.clip_(plan, grads, policy, rule, raise_nonfinite)
            loss_scale = scaled.on(plan.device)
            outcome = execute.clip_(plan, grads, policy, rule, raise_nonfinite, loss_scale)
            scaled.deliver(loss_scale)
            return outcome

        # A RuntimeError of raise_nonfinite may be about the norms.
        return self._carry_out(work, tensors, rule.norm_type, options.backend, exact=raise_nonfinite)

    def norms(self, tensors: Sequence[Tensor], norm_type: float, backend: str | None) -> Tensor:
        """Norms [K] of the tensors' gradients, which stay as they are."""
        return self._carry_out(
            lambda plan, grads: execute.norms_of(plan, grads, norm_type), tensors, norm_type, backend, exact=False
        )

    @torch.no_grad()
    def _carry_out(
        self,
        work: Callable[[ClipPlan, list[Tensor | None]], _Result],
        tensors: Sequence[Tensor],
        norm_type: float,
        backend: str | None,
        *,
        exact: bool,
    ) -> _Result:
        grads = [t.grad for t in tensors]
        request = grads, _home(tensors), norm_type, backend
        plan = self._planner.plan(*request, exact=exact)
        try:
            return work(plan, grads)
        except RuntimeError:
            if exact or not plan.self_checking:
                raise
            # Refused, and nothing written. A look at every gradient says what is wrong, by name, or what changed.
            fresh = self._planner.remake(*request)
            if fresh.signature == plan.signature:
                raise
            return work(fresh, grads)

    @torch.no_grad()
    def explain(self, tensors: Sequence[Tensor], norm_type: float, backend: str | None) -> str:
        """Which backend serves what, and why; the tensors themselves stand in for gradients not there yet."""
        shown = [_stand_in(t) if t.grad is None else t.grad for t in tensors]
        plan = Planner(self.components).plan(shown, _home(tensors), norm_type, backend)
        return dispatch.explain(plan, shown)


def _stand_in(tensor: Tensor) -> Tensor | None:
    # None for what has no data yet, or is frozen and never has a gradient.
    return tensor.detach() if tensor.requires_grad and not is_lazy(tensor) and not tensor.is_meta else None


def _home(tensors: Sequence[Tensor]) -> torch.device:
    return tensors[0].device if tensors else torch.device("cpu")
