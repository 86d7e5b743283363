"""Clipping while the backward pass is still running: each parameter the moment its gradient is final."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from typing import Any, NoReturn, SupportsIndex

import torch
from torch import Tensor, nn

from ..arguments import type_name
from ..components.membership import Components, Slice
from ..components.parameters import Parameters, named_tensors
from ..components.resolve import resolve
from ..components.spec import Grouping
from ..core.options import Options, check_options
from ..core.session import ClipSession
from ..result import ClipResult
from ..thresholds import EMA, Threshold
from ..thresholds.base import StepCaps, learnt, load_learnt
from ..thresholds.constant import MaxNorm
from .checks import averaged_by, averaging, check_parameters, check_separate, check_whole, runs_on_several_ranks
from .hooks import ParameterHook, can_be_watched, hooks_of, parameter_hook, watch
from .passes import Pass, Passes, after_others, check_torch
from .steps import Optimizers, Steps, steps_of


def clip_in_backward(
    parameters: Parameters,
    max_norm: MaxNorm,
    norm_type: float = 2.0,
    *,
    components: Grouping = None,
    eps: float = 1e-6,
    nonfinite: str = "propagate",
    backend: str | None = None,
    optimizer: Optimizers | None = None,
    on_clip: Callable[[ClipResult], object] | None = None,
) -> BackwardClipping:
    """Clips each parameter's gradient in the backward pass, as soon as it is final, to the same bits as afterwards.

    A component's norm asks for nothing but its own gradient, so there is no need to wait for the others, as a global
    norm has to. With an ``optimizer`` the parameter is stepped at once too, and its gradient freed: at no time do
    more than a few gradients exist, and the peak of memory falls by nearly the size of them all. The training loop
    is then ``loss.backward()`` and nothing else; ``optimizer.step()`` and ``zero_grad()`` find nothing to do.

    Not for gradients of a scaled loss (float16 under a ``GradScaler``), nor for gradients that a collective of your
    own averages over ranks, in a hook or after ``backward()``, which can't be noticed. Nor for gradient accumulation,
    which is noticed only if nothing else writes to gradients or replaces them in between; zeroing through ``.data``
    looks like it. A ``backward()`` that is called in a hook is a pass of its own.

    Hooks sit on the parameters as they are now: when others take their place (``load_state_dict(assign=True)``,
    ``fully_shard``, a conversion that swaps tensors), remove the handle and set it up again. A parameter that is
    frozen now is clipped as soon as it is trained. Under ``thresholds.FromGlobal``, which counts those that are
    trained, that is refused, and so is freezing: before anything is clipped, if ``parameters`` is a Module or the
    optimizer owns the parameter. Otherwise one that is unfrozen is refused when its own gradient comes, and one that
    is frozen isn't noticed: the caps stay as they were.

    With an ``optimizer`` the hooks keep it and its parameters alive until ``remove()``. Don't store the handle on a
    module, which could be neither copied nor pickled then.

    Args:
        parameters: as for :func:`fused_component_clip_`; some must require grad.
        max_norm: likewise. Of ``cwclip_kernels.thresholds`` those that don't depend on the step's own norms; ``EMA``
            after its warm-up, so at a resume load its state before this call: ``ema.load_state_dict(...)``.
        norm_type: likewise.
        components: likewise; each component must lie within one parameter.
        eps: likewise.
        nonfinite: likewise, but "error", which would come when other parameters have been clipped or stepped.
        backend: likewise.
        optimizer: steps each of its parameters right after it is clipped, and frees the gradient. Any of
            ``torch.optim`` but LBFGS, which treat each parameter by itself; of any other class one for each
            parameter, ``{p: Optimizer([p], ...) for p in model.parameters()}``. What it owns beyond ``parameters`` is
            left for ``optimizer.step()``.
        on_clip: called with a ``ClipResult`` at the end of each backward pass, such as ``ClipRecorder.record``.

    Returns:
        A handle: ``remove()`` ends it, ``last`` is the last backward pass's ``ClipResult``.

    Raises:
        TypeError, ValueError: an argument that isn't what it should be; parameters of ``DistributedDataParallel`` or
            sharded ones, whose hooks see local gradients; a component of several parameters; parameters that another
            ``clip_in_backward`` or, at the optimizer's step, ``ComponentClipper.attach`` clips.
        RuntimeError: not made for this version of torch. In the backward pass, where a gradient is accumulated onto
            one that has been clipped already, ``create_graph=True``, compiled autograd, or
            ``DistributedDataParallel`` around the parameters; the latter three before anything is clipped.

    Example:
        >>> import torch
        >>> from cwclip_kernels import clip_in_backward
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> handle = clip_in_backward(model, 0.1, optimizer=optimizer)
        >>> model(torch.ones(1, 2)).sum().backward()  # clips, steps, frees
        >>> model.weight.grad is None, handle.last.norms
        (True, tensor([1.4142, 1.0000]))
    """
    check_torch()
    options = check_options(norm_type, False, eps, nonfinite, backend)
    if options.raise_nonfinite:
        raise ValueError(
            "nonfinite: 'error' would come when other parameters have been clipped already; use 'zero', 'skip' or "
            "'propagate', or clip after backward (ComponentClipper)"
        )
    named = named_tensors(parameters)
    check_parameters(parameters, named)
    trained = {i for i, tensor in enumerate(named.tensors) if tensor.requires_grad}
    if not trained:
        raise ValueError("parameters: none requires grad")
    for name, tensor in zip(named.names, named.tensors, strict=True):
        if hooks_of(tensor):
            raise ValueError(
                f"parameters: {name!r} is clipped or stepped in the backward pass already; call remove() on the "
                "handle that the earlier clip_in_backward returned"
            )
    resolved = resolve(named, components)
    check_separate(resolved, trained)
    steps = None if optimizer is None else steps_of(optimizer, named)
    module = parameters if isinstance(parameters, nn.Module) else None
    return BackwardClipping(named.tensors, resolved, max_norm, options, steps, on_clip, module)


class BackwardClipping:
    """What ``clip_in_backward`` set up. As a context manager it ends itself.

    It can't be copied or pickled, since its hooks are on these parameters: set it up again for a copy, and hand over
    what was learnt by ``state_dict()``.

    Attributes:
        names: the K component names.
        last: what the last backward pass's clipping found and did; None before the first. A component that got no
            gradient has norm 0 and coefficient 1.
    """

    def __init__(
        self,
        tensors: tuple[Tensor, ...],
        components: Components,
        max_norm: MaxNorm,
        options: Options,
        steps: Steps | None,
        on_clip: Callable[[ClipResult], object] | None,
        module: nn.Module | None = None,
    ) -> None:
        self.names = components.names
        self.last: ClipResult | None = None
        self._max_norm = dict(max_norm) if isinstance(max_norm, Mapping) else max_norm
        session = ClipSession(components, tensors)
        policy = session.caps_for(self._max_norm, tensors, options.rule)
        if policy.needs_norms:
            raise ValueError(_needs_norms(max_norm))
        # No parameter is kept here, since a cycle of parameter, hook and this would never be collected. With steps
        # there is one, of parameter, hook and optimizer: these live until remove().
        self._threshold = max_norm if isinstance(max_norm, Threshold) else None
        self._bound = session.bound
        if self._threshold is not None and self._bound is not None:
            policy = self._bound.measuring(self._threshold, None)
        self._policy = policy
        self._options = options
        self._steps = steps
        self._module = None if module is None else weakref.ref(module)
        self._on_clip = on_clip
        self._lock = threading.Lock()  # gradients of several devices arrive on several threads
        self._passes = Passes(self._begin, self._policy, self._finish)
        self._looked_for_averaging = False
        self._grown = 0  # passes in which somebody had got hold of a parameter
        self._handles: list[Any] = []
        try:
            self._put_hooks(tensors, components)
        except BaseException:
            self.remove()
            raise

    def _put_hooks(self, tensors: tuple[Tensor, ...], components: Components) -> None:
        members: dict[int, list[tuple[int, Slice]]] = {}
        sharers: dict[int, set[int]] = {}
        for position, component, box in components.members:
            members.setdefault(position, []).append((component, box))
            sharers.setdefault(component, set()).add(position)
        for position, tensor in enumerate(tensors):
            own = members.get(position, [])
            # What is left alone is only stepped. What is frozen may be trained later.
            if can_be_watched(tensor) and (own or self._steps is not None):
                whole = tensor.requires_grad or all(len(sharers[component]) == 1 for component, _ in own)
                hook = parameter_hook(
                    self, components, position, own, whole=whole, was_frozen=not tensor.requires_grad
                )
                self._handles.append(watch(tensor, hook))

    def remove(self) -> None:
        """Ends clipping in the backward pass."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> BackwardClipping:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            "a handle of clip_in_backward can't be copied or pickled, since its hooks are on these parameters: call "
            "clip_in_backward on the copy's; state_dict() and load_state_dict() carry over what was learnt"
        )

    def state_dict(self) -> dict[str, Any]:
        """What caps have learnt: {"max_norm": ``Threshold.state_dict()``}, or {} where they learn nothing."""
        return learnt(self._max_norm)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from a ``state_dict()``.

        Raises:
            TypeError, ValueError: not that of such caps, or of other components. Nothing is changed.
        """
        load_learnt(self._max_norm, state_dict)

    # --------------------------------------------------------------------------------------------------------
    # In the backward pass
    # --------------------------------------------------------------------------------------------------------

    def on_gradient(self, hook: ParameterHook, parameter: Tensor) -> None:
        """Called by a parameter's hook, when its gradient is final."""
        grad = parameter.grad
        if grad is None:
            raise RuntimeError(
                f"the gradient of {hook.name!r} was taken away before it could be clipped, by a hook that was put on "
                "the parameter earlier; put that one on after clip_in_backward"
            )
        current = self._passes.current()
        try:
            self._clip(current, hook, parameter, grad)
        except BaseException:
            current.is_over = True  # the pass fails with it
            raise

    def _clip(self, current: Pass, hook: ParameterHook, parameter: Tensor, grad: Tensor) -> None:
        step = None if self._steps is None else self._steps.step_of(parameter)
        if step is None and not hook.clips:
            return
        if step is None and torch.is_grad_enabled():
            raise RuntimeError(
                "backward(create_graph=True) adds gradients to new tensors, so that it can't be told what has been "
                "clipped already; clip at the step instead: ComponentClipper.attach(optimizer)"
            )
        hook.check(current, grad)
        if current.is_watched and hook.has_more_references(parameter) and not current.was_looked_for:
            current.was_looked_for = True
            # After the 1st, 2nd, 4th, ... such pass: looking takes long, and the end of the pass is checked anyway.
            self._grown += 1
            if self._grown.bit_count() == 1:
                self._refuse_averaging()
        if hook.clips:
            check_whole(hook.name, parameter)
            engine = hook.engine(parameter)
            caps = self._caps_of(current, hook, engine, parameter, grad.device)
            norms, coefs, _ = engine.clip_(
                (parameter,), StepCaps(self._policy.adds_eps, False, lambda *_: caps, lambda *_: None), self._options
            )
            with self._lock:
                current.found.append((hook.own, norms, coefs, caps))
        if step is not None:
            with self._lock:
                step()
            parameter.grad = None
        hook.remember(parameter.grad)
        if current.is_watched:
            current.watched.append((hook.name, parameter, None if parameter.grad is None else _outline(grad)))

    def _caps_of(
        self, current: Pass, hook: ParameterHook, engine: ClipSession, parameter: Tensor, device: torch.device
    ) -> Tensor:
        """The caps of one parameter's components, [] or as many."""
        threshold = self._threshold
        if threshold is None:
            caps = current.caps_on(device)
        elif _counts_trained(threshold) and hook.was_frozen:
            raise RuntimeError(self._other_are_trained(hook))
        elif threshold.reads_parameters and self._bound is not None:
            norms = engine.parameter_norms((parameter,), self._options.rule.norm_type)
            everywhere = torch.zeros(len(self.names), dtype=norms.dtype, device=norms.device)
            everywhere[hook.own] = norms
            with torch.no_grad():
                caps = self._bound.measuring(threshold, lambda: everywhere).caps(device, None)
        else:
            caps = current.caps_on(device)
        return caps[hook.own] if caps.ndim else caps

    def _begin(self) -> bool:
        """Raises before a graph task's first gradient is touched; returns whether other ranks are to be watched."""
        if self._threshold is not None and self._threshold.needs_norms:  # again: an earlier state was loaded
            raise RuntimeError(_needs_norms(self._max_norm))
        if self._steps is not None:
            self._steps.begin()
        if self._threshold is not None and _counts_trained(self._threshold):
            self._check_same_are_trained()
        is_watched = runs_on_several_ranks()
        if is_watched and not self._looked_for_averaging:
            self._refuse_averaging()
            self._looked_for_averaging = True
        return is_watched

    def _check_same_are_trained(self) -> None:
        """Raises where a parameter that can be got at has been frozen or unfrozen since set-up."""
        module = None if self._module is None else self._module()
        of_module = () if module is None else module.parameters()
        of_optimizer = () if self._steps is None else self._steps.parameters()
        for parameter in chain(of_module, of_optimizer):
            for hook in hooks_of(parameter):
                if hook.clipping is self and hook.clips and hook.was_frozen == parameter.requires_grad:
                    raise RuntimeError(self._other_are_trained(hook))

    def _other_are_trained(self, hook: ParameterHook) -> str:
        then, now = ("frozen", "trained") if hook.was_frozen else ("trained", "frozen")
        return (
            f"max_norm: {type_name(self._max_norm)} counted the trained parameters when {hook.name!r} was {then}, "
            f"which is {now} now; remove() the handle and set it up again"
        )

    def _refuse_averaging(self) -> None:
        wrapper = averaging(lambda tensor: any(hook.clipping is self for hook in hooks_of(tensor)))
        if wrapper is not None:
            raise RuntimeError(f"parameters: {averaged_by(wrapper)}")

    @torch.no_grad()
    def _finish(self, whole: Pass) -> None:
        """Puts the backward pass's results together, at its end."""
        if whole.is_watched and not whole.is_deferred:
            whole.is_deferred = True
            after_others(partial(self._finish, whole))  # who averages gradients does it in such a callback, too
            return
        for part in whole.all():
            part.is_over = True
        self._check_untouched(whole)
        outcome = whole.together(len(self.names))
        if outcome is None:
            return
        norms, coefs, caps = outcome
        self._policy.update_(norms, coefs)
        self.last = ClipResult(self.names, norms, coefs, caps)
        if self._on_clip is not None:
            self._on_clip(self.last)

    def _check_untouched(self, whole: Pass) -> None:
        """Raises where gradients were averaged after they were clipped, by whom the first look didn't find."""
        for part in whole.all():
            for name, parameter, outline in part.watched:
                # Whoever has freed it has averaged nothing.
                if parameter.grad is not None and outline != _outline(parameter.grad):
                    self._refuse_averaging()
                    raise RuntimeError(
                        f"the gradient of {name!r} was written to in the backward pass after it had been clipped, as "
                        "by who averages it over ranks; clip at the step instead: ComponentClipper.attach(optimizer)"
                    )


def _counts_trained(threshold: Threshold) -> bool:
    return threshold.needs_all_components and threshold.reads_numels


def _outline(grad: Tensor) -> tuple[int, int]:
    return id(grad), grad._version


def _needs_norms(max_norm: object) -> str:
    too_early = (
        ", until its warm-up is over: before clip_in_backward load a state for which it is "
        "(max_norm.load_state_dict(...))"
        if isinstance(max_norm, EMA)
        else ""
    )
    return (
        f"max_norm: {type_name(max_norm)} depends on all norms of a step, which aren't known in the backward "
        f"pass{too_early}; {'or ' if too_early else ''}clip at the step instead (ComponentClipper.attach)"
    )
