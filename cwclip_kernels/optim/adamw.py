"""AdamW whose step clips by component."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from ..arguments import check_type
from ..components.spec import Grouping
from ..core import traced as core_traced
from ..core.adamw import AdamWRule
from ..core.loss_scale import LossScale
from ..core.modes import is_traced
from ..core.options import Options, check_options
from ..core.parameter_clipper import ParameterClipper
from ..core.run import nonfinite_message
from ..core.session import ClipSession
from ..distributed.units import known_group
from ..result import ClipResult
from ..thresholds.base import StepCaps
from ..thresholds.constant import MaxNorm
from . import traced
from .checkpoints import Loading, save
from .clipping import Clipping, Names, Unit, is_known_to_hold, joined, names_of
from .update import AdamWUpdate, check_capture, forget_loss_scale, loss_scale_of, rule_of


class ComponentClipAdamW(AdamW):
    """``torch.optim.AdamW`` whose step clips each component's gradient by its own norm.

        norm_c = (sum over component c of |g|^p)^(1/p)
        coef_c = min(1, max_norm_c / (norm_c + clip_eps))
        p <- AdamW(p, coef_c * g)

    A component's norm needs no other gradient, so norm, coefficient and update happen while the gradient is in cache,
    and the clipped gradient is never written: ``p.grad`` stays as the backward pass left it. Don't clip by hand as
    well. Where a decision needs all norms (``nonfinite="error"``, thresholds that look at the step's norms, sharded
    parameters) norms come first, then the update with coefficients that stay on the device.

    Arguments, param groups, hooks, closures, learning rate schedulers and ``state_dict()`` are those of
    ``torch.optim.AdamW``, and checkpoints can be exchanged with it. Param groups have ``max_norm`` and
    ``correct_bias`` too; they can be changed between steps like ``lr``, and stay out of checkpoints, which hold what
    thresholds have learnt instead. Under a ``torch.amp.GradScaler``, ``scaler.step(optimizer)`` without
    ``scaler.unscale_(optimizer)`` unscales in the same pass; a skipped step changes no bit, and is no error. Where
    the step is skipped on a GPU, thresholds have counted it, but for norms that are inf or NaN.

    Args:
        params: parameters, (name, parameter) pairs or param groups, as for torch.
        lr: learning rate; a Tensor of one element is read at every step, on its device.
        betas: of the running means of the gradient and of its square.
        eps: added to the root of the second mean.
        weight_decay: decoupled weight decay.
        amsgrad: whether to divide by the largest second mean so far.
        max_norm: as for ``ComponentClipper``; ``math.inf`` measures only. One group's may differ from another's,
            unless a component has parameters of both.
        components: as for ``ComponentClipper``. Parameters that belong to none are stepped unclipped.
        norm_type: order p of the norm.
        clip_eps: added to norms.
        nonfinite: "propagate", "zero", "skip" or "error", as for ``ComponentClipper``. With "error" nothing is
            stepped.
        correct_bias: False leaves out both bias corrections, as in the Adam of BERT's authors, with which the paper
            fine-tunes.
        state_dtype: ``torch.float32`` keeps the running means of half-precision parameters in float32; None in the
            parameter's dtype, as torch does.
        named_parameters: a module or (name, parameter) pairs, for names of parameters that ``params`` gives none.
            The module that ``FullyShardedDataParallel`` returned also says which ranks share each of them.
        maximize: whether to step uphill.
        foreach, fused: accepted for the sake of code and checkpoints that have them; ``backend`` chooses what runs.
        capturable: as for torch. On GPUs ``step`` is on the device with it or without.
        differentiable: refused; this step can't be differentiated.
        process_group: for plain shards, as for ``ComponentClipper``.
        pp_mesh: for pipeline stages, as for ``ComponentClipper``.
        backend: by name; the best available without.

    Attributes:
        last: what the last step's clipping found and did; None before the first step. Groups with a ``max_norm`` of
            their own come one after the other.

    Raises:
        TypeError, ValueError: an argument that isn't what it should be, named in the message.

    Example:
        >>> import torch
        >>> from cwclip_kernels.optim import ComponentClipAdamW
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = ComponentClipAdamW(model.named_parameters(), lr=1e-3, max_norm=0.1)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.last.norms, optimizer.last.coefs
        (tensor([1.4142, 1.0000]), tensor([0.0707, 0.1000]))

    References:
        Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, arXiv 1711.05101.
        Yang & Ma, "Improving Stability of Fine-Tuning Pretrained Language Models via Component-Wise Gradient Norm
        Clipping", EMNLP 2022, arXiv 2210.10325.
    """

    clips_by_component = True  # by which everything else in this package that clips recognizes it, and refuses it

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        max_norm: MaxNorm,
        components: Grouping = None,
        norm_type: float = 2.0,
        clip_eps: float = 1e-6,
        nonfinite: str = "propagate",
        correct_bias: bool = True,
        state_dtype: torch.dtype | None = None,
        named_parameters: Names = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        process_group: Any = None,
        pp_mesh: Any = None,
        backend: str | None = None,
    ) -> None:
        options = check_options(norm_type, nonfinite=nonfinite, eps=clip_eps, backend=backend)
        check_type(correct_bias, "correct_bias", bool, "a bool")
        if state_dtype not in (None, torch.float32):
            raise ValueError(f"state_dtype: expected None or torch.float32, not {state_dtype}")
        if differentiable:
            raise ValueError("differentiable: this step can't be differentiated; use torch.optim.AdamW")
        self._own_defaults = {"max_norm": max_norm, "correct_bias": correct_bias}
        self._state_dtype = state_dtype
        group = known_group(named_parameters, process_group)
        self._clipping = Clipping(options, components, group, pp_mesh, names_of(named_parameters))
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            fused=fused,
        )
        self._step_supports_amp_scaling = True
        self.defaults.update(self._own_defaults)
        self._is_made = True
        self._caps(self._units(are_given=True), options)  # checks max_norm

    @property
    def last(self) -> ClipResult | None:
        """What the last step's clipping found and did; None before the first."""
        return self._clipping.last

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the group may have its own ``max_norm`` and ``correct_bias``."""
        for key, value in self._own_defaults.items():
            param_group.setdefault(key, value)
        super().add_param_group(param_group)
        if "_is_made" in self.__dict__:
            try:
                self._caps(self._units(are_given=True), self._clipping.options)
            except (TypeError, ValueError):
                self.param_groups.pop()
                raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Clips and steps.

        Args:
            closure: reevaluates the model and returns the loss.

        Raises:
            RuntimeError: a norm is non-finite and that was to be an error, or the named backend can't step a
                parameter; nothing is stepped then.
            TypeError, ValueError: a gradient that can't be clipped; nothing is stepped.
        """
        check_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if is_traced():
            self._traced_step()
            return loss
        try:
            self._clip_and_step()
        except BaseException:
            forget_loss_scale(self)
            raise
        return loss

    def _clip_and_step(self) -> None:
        rules = tuple(map(rule_of, self.param_groups))
        scale, skip = loss_scale_of(self)
        options, is_skipped = self._clipping.options, is_known_to_hold(skip, self._clipping.options.raise_nonfinite)
        if is_skipped and options.raise_nonfinite:  # for the scaler inf is no error
            rule = replace(options.rule, nonfinite="propagate")
            options = replace(options, rule=rule, raise_nonfinite=False)
        units = self._units()
        updates = [self._update(unit, rules, skip) for unit in units]
        policies = self._caps(units, options)
        if len(units) > 1:
            self._check_all(units, updates, policies, scale, options)
        results = []
        for unit, update, caps in zip(units, updates, policies, strict=True):
            session, tensors = unit.session, unit.tensors
            if caps is not None:
                outcome = session.clip_(tensors, caps, options, scale, learns=not is_skipped, update=update)
                results.append(ClipResult(session.components.names, *outcome))
            else:
                session.update_unclipped(tensors, options, scale, update)
        self._clipping.last = joined(results)

    def _traced_step(self) -> None:
        """The same under ``torch.compile``. Which parameters have gradients becomes part of the compiled function."""
        clipping = self._clipping
        core_traced.refuse_ranks(clipping.is_spread)
        whole, components = clipping.whole(self.param_groups)
        states = traced.States([], [], [], [], [], [])
        rule_of: list[int] = []
        for i, group in enumerate(self.param_groups):
            own: list[list[Tensor]] = [[], [], [], [], [], []]
            self._init_group(group, *own)  # which Dynamo calls at once, outside of what it compiles
            for known, found in zip(states, own, strict=True):
                known += found
            rule_of += [i] * len(own[0])
        present = [i for i, p in enumerate(whole) if p.grad is not None]
        max_norm = self.param_groups[0]["max_norm"]
        clipped = sorted(components.clipped)
        core_traced.check_bound(max_norm, [whole[i] for i in clipped], components.only(clipped))
        call = whole, components, present, max_norm, clipping.options
        clipping.last = traced.clip_adamw_(*call, states, self.param_groups, rule_of, *loss_scale_of(self))

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        """Parameters with gradients, these, and their states: what Dynamo asks torch's optimizers for."""
        params, grads, exp_avgs, exp_avg_sqs, maxima, steps = lists
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p] or self._new_state(p, group["amsgrad"])
            params.append(p)
            grads.append(p.grad)
            exp_avgs.append(state["exp_avg"])
            exp_avg_sqs.append(state["exp_avg_sq"])
            if group["amsgrad"]:
                maxima.append(state["max_exp_avg_sq"])
            steps.append(state["step"])
        return any(map(torch.is_complex, params))

    # -------------------------------------------------------------------------------------------------------
    # A step's parts
    # -------------------------------------------------------------------------------------------------------

    def _units(self, *, are_given: bool = False) -> tuple[Unit, ...]:
        return self._clipping.units_of(self.param_groups, are_given=are_given)

    def _caps(self, units: Sequence[Unit], options: Options) -> list[StepCaps | None]:
        """What each unit's ``max_norm`` stands for, checked; None for parameters that no component has."""
        return [
            unit.session.caps_for(self.param_groups[unit.groups[0]]["max_norm"], unit.tensors, options.rule)
            if unit.clips
            else None
            for unit in units
        ]

    def _update(self, unit: Unit, rules: tuple[AdamWRule, ...], skip: Tensor | None) -> AdamWUpdate:
        states = unit.states_in(self.state)
        if not all(states):
            for i, p in enumerate(unit.tensors):
                if not states[i] and p.grad is not None:
                    states[i] = self._new_state(p, rules[unit.groups[i]].amsgrad)
        is_spread = unit.session.reductions is not None
        return AdamWUpdate(unit.tensors, states, rules, unit.groups, skip, self._clipping.options.backend, is_spread)

    def _clipper(self) -> ParameterClipper:
        """All parameters as one set, for ``clip_in_backward``."""
        self._units()
        if self._clipping.is_spread:
            raise ValueError("optimizer: its norms are added up over ranks, which can't be done in the backward pass")
        tensors, components = self._clipping.whole(self.param_groups)
        session = ClipSession(components, tensors)
        return ParameterClipper(tensors, session, self.param_groups[0]["max_norm"], self._clipping.options)

    def _update_one(self, p: Tensor, group: dict[str, Any]) -> AdamWUpdate:
        """One parameter's step, for ``clip_in_backward``; the parameter has a gradient."""
        rule = rule_of(group)
        state = self.state[p] or self._new_state(p, rule.amsgrad)
        return AdamWUpdate((p,), (state,), (rule,), (0,), None, self._clipping.options.backend)

    def _new_state(self, p: Tensor, amsgrad: bool) -> dict[str, Any]:
        if p.grad is not None and p.grad.is_sparse:
            raise RuntimeError("Adam does not support sparse gradients; torch.optim.SparseAdam does")
        dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
        names = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if amsgrad else ()))
        state: dict[str, Any] = self.state[p]
        state["step"] = torch.zeros((), dtype=dtype, device=p.device)
        for name in names:
            state[name] = torch.zeros_like(p, memory_format=torch.preserve_format, dtype=self._kept_in(p))
        return state

    def _kept_in(self, p: Tensor) -> torch.dtype:
        """The dtype of a parameter's running means."""
        return self._state_dtype if self._state_dtype is not None and p.dtype.itemsize == 2 else p.dtype

    def _check_all(
        self,
        units: tuple[Unit, ...],
        updates: list[AdamWUpdate],
        policies: list[StepCaps | None],
        scale: LossScale,
        options: Options,
    ) -> None:
        """Raises if one of several calls would, before the first of them writes."""
        for unit, update, caps in zip(units, updates, policies, strict=True):
            plan, _ = unit.session.look(unit.tensors, options, update)
            if caps is not None and caps.update_ is not None and not caps.needs_norms:
                caps.caps(plan.device, None)  # a threshold's own code
            if unit.clips and options.raise_nonfinite:
                norms = unit.session.norms(unit.tensors, options.rule.norm_type, options.backend)
                norms = scale.on(norms.device).unscaled(norms, options.rule.norm_type)
                names = unit.session.components.names
                bad = [name for name, ok in zip(names, norms.isfinite().tolist(), strict=True) if not ok]
                if bad:
                    raise RuntimeError(nonfinite_message(bad, len(names), options.rule.norm_type))

    # -------------------------------------------------------------------------------------------------------
    # Checkpoints and copies
    # -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch's; beside it "clipping", one entry for each ``max_norm`` that learns, if any does."""
        hook = self.register_state_dict_post_hook(save, prepend=True)  # so that others see what is saved
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of this class or of ``torch.optim.AdamW``; ``max_norm`` and ``correct_bias`` stay.

        Raises:
            TypeError, ValueError: of other param groups, or of thresholds of another kind.
        """
        loading = Loading(self._kept_in)
        before = self.register_load_state_dict_pre_hook(loading.before)
        after = self.register_load_state_dict_post_hook(loading.after, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()
        loading.warn()

    def __getstate__(self) -> dict[str, Any]:
        clipping = self._clipping
        if clipping.process_group is not None or clipping.pp_mesh is not None:
            raise TypeError("an optimizer with process_group or pp_mesh can't be copied or pickled; use state_dict()")
        names = [clipping.names.get(id(p)) for group in self.param_groups for p in group["params"]]
        return {
            **super().__getstate__(),
            "_own_defaults": self._own_defaults,
            "_state_dtype": self._state_dtype,
            "_step_supports_amp_scaling": True,
            "_is_made": True,
            "_clipping": (clipping.options, clipping.components, names),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        clipping = self._clipping
        if isinstance(clipping, tuple):  # of a copy
            options, components, names = clipping
            params = [p for group in self.param_groups for p in group["params"]]
            own = {id(p): name for p, name in zip(params, names, strict=True) if name is not None}
            self._clipping = Clipping(options, components, names=own)
