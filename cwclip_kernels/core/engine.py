"""One step's work on tensors that the caller holds: arguments checked, components planned, gradients clipped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..arguments import type_name
from ..backends import registry
from ..components.membership import Components
from ..components.parameters import NamedTensors
from ..components.resolve import resolve
from ..components.spec import ComponentSpec, Grouping
from ..distributed import local
from ..distributed.local import LocalGradients
from ..distributed.run import DistributedCall
from ..distributed.set_up import plan_reductions
from ..distributed.shards import is_flat
from ..thresholds import Threshold
from ..thresholds.caps import CapPolicy, Caps, MaxNorm, as_float
from . import formula, run
from .bound import BoundThreshold, home_of, norms_of_trained
from .checks import WithoutData
from .formula import POLICIES, ClipRule, wide_dtype
from .loss_scale import NOT_SCALED, ScaledLoss
from .modes import outside_autograd
from .plan import Planner


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
    registry.check_backend(backend)
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


def settings_in_words(options: Options, max_norm: MaxNorm = math.inf, pp_mesh: object = None) -> str:
    """What ranks have to choose alike: in a pipeline all but the caps, of components that others don't have."""
    rule = options.rule
    policy = "error" if options.raise_nonfinite else rule.nonfinite
    text = f"norm_type={rule.norm_type:g}, eps={rule.eps:g}, nonfinite={policy!r}"
    if pp_mesh is not None:
        return text
    is_object = isinstance(max_norm, Tensor | Threshold)
    return f"{text}, max_norm={type_name(max_norm) if is_object else max_norm!r}"


class Engine:
    """Components with their plan: one step's work on tensors that the caller holds.

    It keeps no reference to the tensors themselves, so that a cache of engines keeps no model alive.

    Args:
        components: what belongs together.
        tensors: the parameters; if any is sharded, all ranks that share it make their engines together.
        process_group: as for ``fused_component_clip_``.
        pp_mesh: likewise.
        settings: other arguments, which all ranks must have alike, in words.

    Attributes:
        components: as given.
        ranks: ``process_group`` and ``pp_mesh`` as given.
        spread: how components are spread over ranks; None if they aren't.
    """

    def __init__(
        self,
        components: Components,
        tensors: Sequence[Tensor],
        process_group: object = None,
        pp_mesh: object = None,
        settings: str = "",
    ) -> None:
        self.ranks = process_group, pp_mesh
        self.components, self.spread = plan_reductions(components, tensors, process_group, pp_mesh, settings)
        self._planner = Planner(self._local)
        self._values: Planner | None = None
        self._last_caps: tuple[object, Caps] | None = None
        self._last_threshold: BoundThreshold | None = None

    @classmethod
    def of(
        cls, parameters: NamedTensors, grouping: Grouping, process_group: object, pp_mesh: object, settings: str
    ) -> Engine:
        """From parameters and a grouping.

        Raises:
            TypeError, ValueError: these, or the ranks, don't fit together.
        """
        is_all = pp_mesh is None or any(map(is_flat, parameters.tensors))  # whose originals others don't know of
        engine = cls(
            resolve(parameters, grouping, is_all=is_all), parameters.tensors, process_group, pp_mesh, settings
        )
        if not is_all and isinstance(grouping, ComponentSpec):
            names = parameters.names if engine.spread is None else engine.spread.all_parameters
            grouping.check_patterns(names, parameters.aliases, parameters.prefix)
        return engine

    @property
    def plans_made(self) -> int:
        """How many plans so far: one more where other gradients are there than before."""
        return self._planner.made

    @property
    def _local(self) -> Components:
        return self.components if self.spread is None else self.spread.local

    def policy(self, max_norm: MaxNorm, tensors: Sequence[Tensor], rule: ClipRule) -> CapPolicy:
        """``max_norm``, checked, matched with the component names and brought to its device once while it stays."""
        if isinstance(max_norm, Threshold):
            if self._last_threshold is None or not self._last_threshold.is_for(max_norm, rule):
                self._last_threshold = BoundThreshold(max_norm, self.components, self.spread, rule)
            return self._last_threshold.at_work(max_norm, tensors)
        names, everywhere = self.components.names, None if self.spread is None else self.spread.all_names
        if isinstance(max_norm, Tensor):
            return Caps(max_norm, names)
        # With types, compared first: True equals 1 but is no cap, and comparing with a tensor may raise.
        named = max_norm.items() if isinstance(max_norm, Mapping) else [(None, max_norm)]
        items = [(pattern, type(value), value) for pattern, value in named]
        if self._last_caps is None or self._last_caps[0] != items:
            self._last_caps = (
                items,
                Caps(max_norm, names, everywhere, self.components.aliases, self.components.spellings),
            )
        return self._last_caps[1]

    @outside_autograd
    def clip_(
        self, tensors: Sequence[Tensor], policy: CapPolicy, options: Options, scaled: ScaledLoss = NOT_SCALED
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Clips the tensors' gradients in place: norms before and coefficients, [K] each, and the caps."""
        try:
            return self._clip_(tensors, policy, options, scaled)
        except WithoutData as found:
            norms = self._without_data(found)
            return norms, torch.empty_like(norms), norms.new_empty(norms.shape, dtype=wide_dtype(norms.device))

    def _clip_(
        self, tensors: Sequence[Tensor], policy: CapPolicy, options: Options, scaled: ScaledLoss
    ) -> tuple[Tensor, Tensor, Tensor]:
        rule = options.rule if policy.adds_eps else options.rule.without_eps
        raise_nonfinite, spread = options.raise_nonfinite, self.spread
        if spread is not None and not (
            spread.is_local and not (spread.nonfinite_needs_ranks and (raise_nonfinite or scaled.looks_for_inf))
        ):
            call = DistributedCall(spread, self._planner, tensors, home_of(tensors), options.backend)
            return call.clip_(policy, rule, raise_nonfinite, scaled)

        held = self._held(tensors)
        held.check_not_leaves()
        plan, found = self._planner.get(held.local, home_of(tensors), rule.norm_type, options.backend)
        held.touched()
        if scaled is NOT_SCALED:
            return run.clip_(plan, found, policy, rule, raise_nonfinite)
        loss_scale = scaled.on(plan.device)
        outcome = run.clip_(plan, found, policy, rule, raise_nonfinite, loss_scale)
        scaled.deliver(loss_scale)
        return outcome

    @outside_autograd
    def parameter_norms(self, tensors: Sequence[Tensor], norm_type: float) -> Tensor:
        """Norms [K] of the tensors themselves, of which no other rank has a part."""
        if self._values is None:
            self._values = Planner(self.components, kind="parameter")
        return norms_of_trained(self._values, tensors, norm_type)

    @outside_autograd
    def norms(self, tensors: Sequence[Tensor], norm_type: float, backend: str | None) -> Tensor:
        """Norms [K] of the tensors' gradients, which stay as they are."""
        home = home_of(tensors)
        try:
            if self.spread is not None and not self.spread.is_local:
                return DistributedCall(self.spread, self._planner, tensors, home, backend).norms(norm_type)
            plan, grads = self._planner.measured(self._held(tensors).local, home, norm_type, backend)
            return run.norms_of(plan, grads, norm_type)
        except WithoutData as found:
            return self._without_data(found)

    def _without_data(self, found: WithoutData) -> Tensor:
        """What norms of fake and meta gradients look like, for those who estimate memory: [K], without values."""
        return torch.empty(len(self.components.names), dtype=found.norm_dtype, device=found.device)

    @outside_autograd
    def total(self, norms: Tensor, norm_type: float) -> Tensor:
        """The norm of all components together, [], from those of each."""
        if self.spread is not None:
            return self.spread.total(norms, norm_type)
        return formula.root(formula.total(norms, norm_type), norm_type).to(norms.dtype)

    def _held(self, tensors: Sequence[Tensor]) -> LocalGradients:
        return (
            LocalGradients([t.grad for t in tensors], ()) if self.spread is None else self.spread.gradients(tensors)
        )

    @outside_autograd
    def explain(self, tensors: Sequence[Tensor], norm_type: float, backend: str | None) -> str:
        """Which backend serves what, and why; the tensors themselves stand in for gradients not there yet."""
        grads = self._held(tensors).local
        shown = [_stand_in(t) if grad is None else grad for t, grad in zip(tensors, grads, strict=True)]
        plan, _ = Planner(self._local).get(shown, home_of(tensors), norm_type, backend)
        text = registry.explain(plan, shown)
        return text if self.spread is None else f"{text}\n{self.spread.explain()}"


def _stand_in(tensor: Tensor) -> Tensor | None:
    # None for what has no data yet, or is frozen and never has a gradient.
    if not tensor.requires_grad or is_lazy(tensor) or tensor.is_meta or tensor.is_nested:
        return None
    return local.local_value(tensor).detach()
