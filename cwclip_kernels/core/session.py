"""What is kept for one set of parameters: components, plans and caps. It clips tensors that the caller holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..backends.native import gradients_of
from ..components.membership import Components
from ..components.parameters import NamedTensors
from ..components.resolve import resolve
from ..components.spec import ComponentSpec, Grouping
from ..distributed.local import LocalGradients, local_value
from ..distributed.partitions import Partitions
from ..distributed.run import DistributedCall
from ..distributed.set_up import plan_reductions
from ..distributed.shards import is_flat
from ..thresholds import Threshold
from ..thresholds.base import StepCaps
from ..thresholds.by_pattern import settled
from ..thresholds.constant import MaxNorm
from . import formula, run
from .bucket import Found
from .caps import BoundThreshold, fixed_caps, norms_of_trained
from .checks import WithoutData
from .formula import ClipRule, wide_dtype
from .loss_scale import UNSCALED, LossScale
from .modes import outside_autograd
from .options import Options
from .plan import ClipPlan, Plans, home_of


class ClipSession:
    """Components of one set of parameters, with their plans and caps.

    It keeps no reference to the parameters, so that a cache of sessions keeps no model alive. All ranks that share
    a parameter make it together; ``settings`` describes other arguments, which they must have alike. With
    ``partitions`` gradients are those that an optimizer keeps, not the tensors' own.
    """

    def __init__(
        self,
        components: Components,
        tensors: Sequence[Tensor],
        process_group: object = None,
        pp_mesh: object = None,
        settings: str = "",
        partitions: Partitions | None = None,
    ) -> None:
        self.ranks = process_group, pp_mesh
        # ``reductions``: how components are sharded over ranks; None if they aren't.
        self.components, self.reductions = plan_reductions(
            components, tensors, process_group, pp_mesh, settings, partitions
        )
        self.plans = Plans(self.components if self.reductions is None else self.reductions.local)
        self.bound: BoundThreshold | None = None  # the last threshold
        self._parameter_plans = Plans(self.components, "the parameter")
        self._last_fixed: tuple[object, StepCaps] | None = None

    @classmethod
    def of(
        cls, parameters: NamedTensors, grouping: Grouping, process_group: object, pp_mesh: object, settings: str
    ) -> ClipSession:
        """A session of named parameters and a grouping; raises if these, or the ranks, don't fit together."""
        # Other ranks know neither a stage's names nor what a flat parameter was made of.
        is_all = pp_mesh is None or any(map(is_flat, parameters.tensors))
        components = resolve(parameters, grouping, is_all=is_all)
        session = cls(components, parameters.tensors, process_group, pp_mesh, settings)
        if not is_all and isinstance(grouping, ComponentSpec):
            names = parameters.names if session.reductions is None else session.reductions.all_parameters
            grouping.read_for(names, parameters.aliases, parameters.lost_prefix, is_all=True)
        return session

    def caps_for(self, max_norm: MaxNorm, tensors: Sequence[Tensor], rule: ClipRule) -> StepCaps:
        """The caps that ``max_norm`` stands for, checked. Those of numbers are kept until these change."""
        cap = settled(max_norm)
        if isinstance(cap, Threshold):
            bound = self.bound  # another thread may replace it
            if bound is None or not bound.is_for(cap, rule):
                self.bound = bound = BoundThreshold(cap, self.components, self.reductions, rule)
            return bound.for_call(cap, tensors)
        if isinstance(cap, Tensor):
            return fixed_caps(cap, self.components)
        # With types, compared first: True equals 1 but is no cap, and comparing with a tensor may raise.
        named = cap.items() if isinstance(cap, Mapping) else [(None, cap)]
        items = [(pattern, type(value), value) for pattern, value in named]
        last = self._last_fixed  # another thread may replace it
        if last is None or last[0] != items:
            everywhere = None if self.reductions is None else self.reductions.all_names
            self._last_fixed = last = items, fixed_caps(cap, self.components, everywhere)
        return last[1]

    def clip_(
        self,
        tensors: Sequence[Tensor],
        policy: StepCaps,
        options: Options,
        scale: LossScale = UNSCALED,
        learns: bool = True,
        update: run.Update | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Clips the gradients of ``tensors`` in place: norms before and coefficients, [K] each, and the caps.

        ``policy`` is from ``caps_for``; unless ``learns``, its ``update_`` is left to the caller. With an ``update``
        that is what is done instead of scaling, and gradients stay as they are.
        """
        rule = options.rule if policy.adds_eps else options.rule.without_eps
        at_once = update is None and self.reductions is None and not options.raise_nonfinite
        # Native code and fixed caps do without the change of autograd's mode, which takes 2 us.
        if at_once and policy.update_ is None and not torch.is_inference_mode_enabled():
            outcome = run.clip_at_once_(self.plans, tuple(tensors), policy, rule, options.backend, scale)
            if outcome is not None:
                return outcome
            at_once = False
        return self._clip(tensors, policy, rule, options, scale, learns, update, at_once)

    @outside_autograd
    def _clip(
        self,
        tensors: Sequence[Tensor],
        policy: StepCaps,
        rule: ClipRule,
        options: Options,
        scale: LossScale,
        learns: bool,
        update: run.Update | None,
        at_once: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same in general; ``at_once`` if one native call is to be tried first."""
        raise_nonfinite, reductions = options.raise_nonfinite, self.reductions
        outcome = None
        try:
            if at_once:
                outcome = run.clip_at_once_(self.plans, tuple(tensors), policy, rule, options.backend, scale)
            if outcome is not None:
                pass
            elif reductions is not None and self._needs_ranks(raise_nonfinite or scale.found_inf is not None):
                call = DistributedCall(reductions, self.plans, tensors, home_of(tensors), options.backend, update)
                outcome = call.clip_(policy, rule, raise_nonfinite, scale)
            else:
                held = _NOTHING
                if update is not None:
                    plan, found = self.look(tensors, options, update)
                else:
                    plan, found, held = self._to_write(tensors, options)
                used = scale.on(plan.device)
                outcome = run.clip_(plan, found, policy, rule, raise_nonfinite, used, update)
                held.touched()
                scale.deliver(used)
        except WithoutData as missing:
            return self._no_outcome(missing)
        if learns and policy.update_ is not None:
            policy.update_(outcome[0], outcome[1])
        return outcome

    def _to_write(self, tensors: Sequence[Tensor], options: Options) -> tuple[ClipPlan, list[Found], LocalGradients]:
        """The plan that scales the tensors' gradients in place, what it finds, and what is ``touched()`` after it."""
        held = (
            LocalGradients(gradients_of(tensors), ())
            if self.reductions is None
            else self.reductions.gradients(tensors)
        )
        held.check_not_leaves()
        plan, found = self.plans.get(held.local, tensors, options.rule.norm_type, options.backend)
        return plan, found, held

    @outside_autograd
    def clip_gradients_(
        self, grads: list[Tensor | None], like: Sequence[Tensor], policy: StepCaps, options: Options, scale: LossScale
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What ``clip_`` does, for gradients that are no tensor's ``.grad``, by caps that don't learn.

        ``like`` has a tensor for each, as the session was made for; none is sharded.
        """
        rule = options.rule if policy.adds_eps else options.rule.without_eps
        try:
            plan, found = self.plans.get(grads, like, rule.norm_type, options.backend)
        except WithoutData as missing:
            return self._no_outcome(missing)
        used = scale.on(plan.device)
        outcome = run.clip_(plan, found, policy, rule, options.raise_nonfinite, used)
        scale.deliver(used)
        return outcome

    @outside_autograd
    def scale_(self, tensors: Sequence[Tensor], coefs: Tensor, options: Options, scale: LossScale) -> None:
        """Multiplies the tensors' gradients by their components' coefficients, [] or [K], and unscales them.

        Other ranks aren't asked: each scales what it holds.
        """
        try:
            target = self._to_write(tensors, options)
        except WithoutData:
            return
        self._scale_(*target, coefs, options, scale)

    def _scale_(
        self,
        plan: ClipPlan,
        found: list[Found],
        held: LocalGradients,
        coefs: Tensor,
        options: Options,
        scale: LossScale,
    ) -> None:
        factors = run.factors_of(coefs, len(self.components.names), plan.device, scale)
        if self.reductions is not None:
            factors = self.reductions.rows.to_local(factors)
        run.apply_(plan, found, factors, options.rule)
        held.touched()

    @outside_autograd
    def clip_with_norms_(
        self, tensors: Sequence[Tensor], norms: Tensor, policy: StepCaps, options: Options, scale: LossScale
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Clips by norms [K] of the unscaled gradients that are known already; what ``clip_`` returns."""
        try:
            target = self._to_write(tensors, options)
        except WithoutData as missing:
            return self._no_outcome(missing)
        rule = options.rule if policy.adds_eps else options.rule.without_eps
        norms = run.known_norms(norms, target[0])
        coefs, caps = run.coefficients_of(norms, self.components.names, policy, rule, options.raise_nonfinite)
        self._scale_(*target, coefs, options, scale)
        if policy.update_ is not None:
            policy.update_(norms, coefs)
        return norms, coefs, caps

    @outside_autograd
    def look(self, tensors: Sequence[Tensor], options: Options, update: run.Update) -> tuple[ClipPlan, list[Found]]:
        """The plan for an update, and what it finds; raises if it can't be done. Changes nothing."""
        plan, found = self.plans.measured(self._gradients(tensors), tensors, options.rule.norm_type, options.backend)
        update.prepare(plan.buckets, found)
        return plan, found

    @outside_autograd
    def update_unclipped(
        self, tensors: Sequence[Tensor], options: Options, scale: LossScale, update: run.Update
    ) -> None:
        """The update from gradients that are unscaled at the most."""
        plan, found = self.look(tensors, options, update)
        ones = torch.ones(len(self.plans.components.names), dtype=wide_dtype(plan.device), device=plan.device)
        run.apply_(plan, found, scale.on(plan.device).factors(ones), options.rule, update)

    @outside_autograd
    def parameter_norms(self, tensors: Sequence[Tensor], norm_type: float) -> Tensor:
        """Norms [K] of the tensors themselves, where other ranks have no part of them."""
        return norms_of_trained(self._parameter_plans, tensors, norm_type)

    @outside_autograd
    def norms(
        self, tensors: Sequence[Tensor], norm_type: float, backend: str | None, scale: LossScale = UNSCALED
    ) -> Tensor:
        """Norms [K] of the tensors' unscaled gradients, and ``found_inf``; gradients stay as they are."""
        try:
            if self._needs_ranks(scale.found_inf is not None):
                assert self.reductions is not None
                home = home_of(tensors)
                call = DistributedCall(self.reductions, self.plans, tensors, home, backend, writes=False)
                return call.norms(norm_type, scale)
            plan, found = self.plans.measured(self._gradients(tensors), tensors, norm_type, backend)
            used = scale.on(plan.device)
            norms = run.measure(plan, found, norm_type, used)
            scale.deliver(used)
            return norms
        except WithoutData as missing:
            return self._without_data(missing)

    def _needs_ranks(self, asks: bool) -> bool:
        """Whether a call communicates; ``asks`` if it has to know whether any gradient is inf or NaN."""
        own = self.reductions
        return own is not None and (not own.is_local or (asks and own.nonfinite_needs_ranks))

    def _without_data(self, found: WithoutData) -> Tensor:
        """Norms of fake and meta gradients, [K] without values, for memory estimates."""
        return torch.empty(len(self.components.names), dtype=found.norm_dtype, device=found.device)

    def _no_outcome(self, found: WithoutData) -> tuple[Tensor, Tensor, Tensor]:
        """The same for what ``clip_`` returns."""
        norms = self._without_data(found)
        return norms, torch.empty_like(norms), norms.new_empty(norms.shape, dtype=wide_dtype(norms.device))

    @outside_autograd
    def total(self, norms: Tensor, norm_type: float) -> Tensor:
        """The norm of all components together, [], from those of each."""
        if self.reductions is not None:
            return self.reductions.total(norms, norm_type)
        return formula.total_norm(norms, norm_type)

    def _gradients(self, tensors: Sequence[Tensor]) -> list[Tensor | None]:
        """What this rank holds of each gradient."""
        return gradients_of(tensors) if self.reductions is None else self.reductions.gradients(tensors).local

    @outside_autograd
    def explain(self, tensors: Sequence[Tensor], norm_type: float, backend: str | None) -> str:
        """Which backend serves what, and why; tensors stand in for gradients that don't exist yet."""
        if self.reductions is not None and self.reductions.is_partitioned:
            shown = self.reductions.values(tensors).local
        else:
            pairs = zip(tensors, self._gradients(tensors), strict=True)
            shown = [_stand_in(t) if grad is None else grad for t, grad in pairs]
        text = Plans(self.plans.components).get(shown, tensors, norm_type, backend)[0].explain(shown)
        return text if self.reductions is None else f"{text}\n{self.reductions.explain()}"


_NOTHING = LocalGradients([], ())


def _stand_in(tensor: Tensor) -> Tensor | None:
    """None for what has no data yet, or is frozen and never has a gradient."""
    if not tensor.requires_grad or is_lazy(tensor) or tensor.is_meta or tensor.is_nested:
        return None
    return local_value(tensor).detach()
