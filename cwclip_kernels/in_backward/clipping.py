"""Clipping while the backward pass still runs: each parameter as soon as its gradient is final."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..clipper import ComponentClipper
from ..components.membership import unclipped
from ..components.parameters import Parameters, as_items, named_tensors
from ..components.spec import Grouping
from ..core.loss_scale import UNSCALED
from ..core.parameter_clipper import ParameterClipper
from ..core.run import Update
from ..core.session import ClipSession
from ..handle import Handle
from ..optim.adamw import ComponentClipAdamW
from ..optim.clipping import are_equal
from ..result import ClipResult
from ..thresholds import EMA, Threshold
from ..thresholds.base import StepCaps
from ..thresholds.constant import MaxNorm
from .checks import AT_THE_STEP, are_averaged, averaged_by, check_parameters, check_whole, runs_on_several_ranks
from .hooks import ParameterHook, hooks_for, hooks_of, register
from .passes import Mark, Pass, Passes, check_torch
from .steps import Optimizers, Steps


def clip_in_backward(
    parameters: Parameters | ComponentClipper | None = None,
    max_norm: MaxNorm | None = None,
    norm_type: float | None = None,
    *,
    components: Grouping = None,
    eps: float | None = None,
    nonfinite: str | None = None,
    backend: str | None = None,
    optimizer: Optimizers | None = None,
    on_clip: Callable[[ClipResult], object] | None = None,
) -> BackwardClipping:
    """Clips each parameter's gradient during the backward pass, as soon as it is final.

    A component's norm needs only its own gradient, so nothing has to wait for the others; the bits are those of
    clipping after ``backward()``. With an ``optimizer`` each parameter is also stepped at once and its gradient
    freed: only a few gradients exist at any time, and peak memory falls by nearly the size of all of them. The
    training loop is just ``loss.backward()`` then; ``optimizer.step()`` and ``zero_grad()`` find nothing to do.
    A ``ComponentClipAdamW`` clips and steps each parameter in one pass.

    Not supported, and refused:

    - ``DistributedDataParallel`` and sharded parameters, whose hooks see local gradients
    - components of several trained parameters
    - ``nonfinite="error"``, and thresholds that need all norms of a step (``EMA`` until its warm-up is over: to
      resume, load its state before this call)
    - ``create_graph=True`` and compiled autograd; the model itself may be compiled
    - gradient accumulation: not noticed if other code writes to gradients or replaces them in between, and zeroing
      through ``.data`` is mistaken for it
    - freezing and unfreezing under ``thresholds.FromGlobal``, which counts trained parameters: noticed in time if
      ``parameters`` is a Module or a clipper that still exists, or if the optimizer owns the parameter; otherwise
      unfreezing is noticed with that parameter's gradient, and freezing isn't

    Not supported, and not noticed: gradients of a scaled loss (float16 under a ``GradScaler``), and gradients that
    your own code averages over ranks, in a hook or after ``backward()``.

    Hooks are put on the present parameters. If these are replaced (``load_state_dict(assign=True)``, ``fully_shard``,
    a conversion that swaps tensors), remove the handle and call this again. Frozen parameters are clipped once they
    are trained. With an ``optimizer`` the hooks keep it and its parameters alive until ``remove()``.

    Args:
        parameters: as for ``ComponentClipper``; some must require grad. Or a ``ComponentClipper``, whose parameters,
            components, caps, options and state are used; the next five and ``backend`` can't be given then.
        max_norm: as for ``ComponentClipper``, whose defaults replace None, here and below.
        norm_type: order of the norm.
        components: each must lie within one parameter.
        eps: added to norms.
        nonfinite: "propagate", "zero" or "skip".
        backend: by name.
        optimizer: steps each of its parameters right after it is clipped. A ``ComponentClipAdamW`` has parameters,
            caps and options of its own and is given alone. Else any of ``torch.optim`` but LBFGS; of other classes
            one for each parameter, ``{p: Optimizer([p], ...) for p in model.parameters()}``. What it owns beyond
            ``parameters`` is left for ``optimizer.step()``.
        on_clip: called with a ``ClipResult`` at the end of each backward pass, such as ``ClipRecorder.record``.

    Raises:
        TypeError, ValueError: an argument that is wrong or not supported; parameters that are clipped already.
        RuntimeError: this version of torch isn't supported. In the backward pass: what isn't supported and wasn't
            known before, such as a ``DistributedDataParallel`` made later.

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
    settings = {"max_norm": max_norm, "norm_type": norm_type, "components": components}
    settings |= {"eps": eps, "nonfinite": nonfinite, "backend": backend}
    given: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
    if isinstance(optimizer, ComponentClipAdamW):
        if parameters is not None or given:
            name = "parameters" if parameters is not None else next(iter(given))
            raise TypeError(f"{name}: the ComponentClipAdamW has its own; leave it out")
        own = optimizer._clipper()
        check_parameters(None, own._session.components.tensor_names, own._all())
        return BackwardClipping(own, None, optimizer, on_clip)
    if parameters is None:
        raise TypeError("parameters: missing; only a ComponentClipAdamW as optimizer has its own")
    if isinstance(parameters, ComponentClipper):
        if given:
            raise TypeError(f"{next(iter(given))}: the ComponentClipper has its own; leave it out")
        check_parameters(None, parameters._session.components.tensor_names, parameters._all())
        if any(ranks is not None for ranks in parameters._session.ranks):
            raise ValueError(
                "parameters: this ComponentClipper adds up norms over ranks (process_group, pp_mesh), which can't be "
                f"done for each gradient as it comes; {AT_THE_STEP}"
            )
        return BackwardClipping(parameters, None, optimizer, on_clip)
    if max_norm is None:
        raise TypeError("max_norm: missing; only a ComponentClipper as first argument has its own")
    if not isinstance(parameters, nn.Module):
        parameters = as_items(parameters)  # a generator is read once
    module = parameters if isinstance(parameters, nn.Module) else None
    named = named_tensors(parameters)
    check_parameters(module, named.names, named.tensors)  # before ranks compare what they have of shards
    return BackwardClipping(ComponentClipper(parameters, **given), module, optimizer, on_clip)


class BackwardClipping(Handle):
    """Clipping at work in the backward pass; made by ``clip_in_backward``. As a context manager it ends itself.

    It can't be copied or pickled: call ``clip_in_backward`` for the copied model, and use ``state_dict()``.

    Attributes:
        names: the K component names.
        last: what the last backward pass's clipping found and did; None before the first. A component that got no
            gradient has norm 0 and coefficient 1.

    Example:
        >>> import torch
        >>> from cwclip_kernels import BackwardClipping, clip_in_backward
        >>> model = torch.nn.Linear(2, 1)
        >>> with clip_in_backward(model, 0.1) as handle:
        ...     model(torch.ones(1, 2)).sum().backward()
        >>> isinstance(handle, BackwardClipping), handle.last.coefs
        (True, tensor([0.0707, 0.1000]))
    """

    _not_copied = "a BackwardClipping can't be copied or pickled: call clip_in_backward on the copy's parameters"

    def __init__(
        self,
        clipper: ParameterClipper,
        module: nn.Module | None,
        optimizer: Optimizers | None,
        on_clip: Callable[[ClipResult], object] | None,
    ) -> None:
        tensors, components = clipper._all(), clipper._session.components
        if clipper.raises_nonfinite:
            raise ValueError(f"nonfinite: 'error' would come when others are clipped already; {AT_THE_STEP}")
        if not any(tensor.requires_grad for tensor in tensors):
            raise ValueError("parameters: none requires grad")
        for name, tensor in zip(components.tensor_names, tensors, strict=True):
            if hooks_of(tensor):
                raise ValueError(
                    f"parameters: {name!r} is clipped or stepped in the backward pass already; call remove() on the "
                    "handle that the earlier clip_in_backward returned"
                )
        # Without an optimizer no parameter is kept: a cycle of parameter, hook and this is never collected.
        self.names = components.names
        self._clip_by(clipper)
        self._options = clipper._options
        self._owner = weakref.ref(clipper if module is None else module)
        self._steps = None if optimizer is None else Steps(optimizer, components.tensor_names, tensors)
        self._own = clipper if isinstance(optimizer, ComponentClipAdamW) else None  # whose max_norm may change
        self._on_clip = on_clip
        self._lock = threading.RLock()  # gradients of several devices arrive on several threads
        self._passes = Passes(self._begin, self._finish, self._lock)
        self._is_distributed = False
        self._occasions = 0  # to search for a wrapper
        self._handles: dict[ParameterHook, Any] = {}
        try:
            for tensor, hook in hooks_for(components, tensors, self._on_gradient):
                if hook.components is not None or self._steps is not None:
                    self._handles[hook] = register(tensor, hook)
        except BaseException:
            self.remove()
            raise

    def _clip_by(self, clipper: ParameterClipper) -> None:
        """Sets the caps to a clipper's."""
        max_norm = clipper.max_norm
        caps_from: Callable[[Callable[[], Tensor]], StepCaps] | None = None
        caps, counts_trained = clipper._caps(), False
        bound = (clipper._whole or clipper)._session.bound
        if isinstance(max_norm, Threshold) and bound is not None:
            caps = bound.measuring(max_norm, None)
            caps_from = partial(bound.measuring, max_norm) if max_norm.reads_parameters else None
            counts_trained = max_norm.needs_all_components and max_norm.reads_numels
        if caps.needs_norms:
            raise ValueError(_needs_norms(max_norm))
        self._max_norm: MaxNorm = max_norm
        self._bound = bound
        self._caps, self._caps_from, self._counts_trained = caps, caps_from, counts_trained

    def remove(self) -> None:
        """Ends clipping in the backward pass."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    # --------------------------------------------------------------------------------------------------------
    # In the backward pass
    # --------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Called before a graph task's first gradient; raises for what has changed since set-up."""
        threshold = self._max_norm
        if isinstance(threshold, Threshold):
            if self._bound is not None:
                self._bound.bind_again(threshold)
            if threshold.needs_norms:  # an earlier state was loaded
                raise RuntimeError(_needs_norms(threshold))
        if self._steps is not None:
            self._steps.begin()
            if self._own is not None:
                max_norm = self._steps.max_norm(self._own._all())
                if max_norm is not None and not are_equal(max_norm, self._max_norm):
                    own = self._own
                    self._clip_by(ParameterClipper(own._all(), own._session, max_norm, own._options))
        if self._counts_trained:
            owner = self._owner()  # of parameters that can be reached, though none is kept
            known = owner.parameters() if isinstance(owner, nn.Module) else () if owner is None else owner.parameters
            for parameter in chain(known, () if self._steps is None else self._steps.parameters()):
                for hook in hooks_of(parameter):
                    if hook in self._handles and hook.components and hook.was_frozen == parameter.requires_grad:
                        raise RuntimeError(self._other_are_trained(hook))
        self._is_distributed = runs_on_several_ranks()

    def _on_gradient(self, hook: ParameterHook, parameter: Tensor) -> None:
        """Called by a parameter's hook, when its gradient is final."""
        if parameter.grad is None:
            raise RuntimeError(
                f"the gradient of {hook.name!r} was taken away before it could be clipped, by a hook that was put on "
                "the parameter earlier; put that one on after clip_in_backward"
            )
        current = self._passes.current()
        try:
            self._clip_and_step(current, hook, parameter, parameter.grad)
        except BaseException:
            current.is_over = True  # the backward pass fails
            raise

    def _clip_and_step(self, current: Pass, hook: ParameterHook, parameter: Tensor, grad: Tensor) -> None:
        step = update = None
        if self._steps is not None:
            step = self._steps.step_of(parameter)
            with self._lock:  # may make the parameter's state
                update = self._steps.update_of(parameter)
        steps = step is not None or update is not None
        if not steps and hook.components is None:
            return
        if not steps and torch.is_grad_enabled():
            raise RuntimeError(
                "backward(create_graph=True) adds gradients to new tensors, so that it can't be told what has been "
                f"clipped already; {AT_THE_STEP}"
            )
        hook.check_complete(current, grad)
        if self._is_distributed:
            references = sys.getrefcount(parameter)  # which grows if the parameter has been wrapped
            if references > hook.references and not current.was_searched:
                if self._occasions.bit_count() <= 1:  # the first three, then ever fewer: a search takes long
                    self._refuse_averaging()
                self._occasions += 1
                current.was_searched = True
            hook.references = references
        if hook.components is not None:
            self._clip(current, hook, parameter, grad.device, update)
        elif update is not None:
            if hook.session is None:
                hook.session = ClipSession(unclipped((hook.name,), (0,)), (parameter,))
            hook.session.update_unclipped((parameter,), self._options, UNSCALED, update)
        if step is not None:
            with self._lock:
                step()
        if steps:
            parameter.grad = None
        hook.clipped = None if parameter.grad is None else Mark(parameter.grad)
        if self._is_distributed:
            current.watched.append((hook.name, parameter, hook.clipped))

    def _clip(
        self, current: Pass, hook: ParameterHook, parameter: Tensor, device: torch.device, update: Update | None
    ) -> None:
        check_whole(hook.name, parameter)
        if hook.shared is not None:
            raise RuntimeError(
                f"components: {hook.shared!r} consists of several parameters, one of which, {hook.name!r}, required "
                "no grad when clip_in_backward was set up; remove() the handle and set it up again, with "
                "components='parameter'"
            )
        if self._counts_trained and hook.was_frozen:
            raise RuntimeError(self._other_are_trained(hook))
        if hook.session is None:
            assert hook.components is not None
            hook.session = ClipSession(hook.components, (parameter,))
        with torch.no_grad():
            if self._caps_from is None:
                caps = current.caps_on(device, self._caps)
            else:
                norms = hook.session.parameter_norms((parameter,), self._options.rule.norm_type)
                all_norms = norms.new_zeros(len(self.names))
                all_norms[hook.own] = norms
                caps = self._caps_from(lambda: all_norms).caps(device, None)
            own = caps[hook.own] if caps.ndim else caps
        known = self._caps._replace(needs_norms=False, caps=lambda *_: own)
        eps_of = self._caps.eps
        if eps_of is not None:
            known = known._replace(eps=lambda device: eps_of(device)[hook.own])
        norms, coefs, _ = hook.session.clip_((parameter,), known, self._options, learns=False, update=update)
        current.found.append((hook.own, norms, coefs, own))

    @torch.no_grad()
    def _finish(self, whole: Pass) -> None:
        """Puts the results together at the end of a backward pass."""
        for one in (whole, *whole.inner):
            one.is_over = True
        for name, parameter, mark in whole.watched:
            # Where it has been freed, nobody has averaged it.
            if parameter.grad is not None and (mark is None or mark.writes(parameter.grad) != 0):
                self._refuse_averaging()
                raise RuntimeError(
                    f"the gradient of {name!r} was written to in the backward pass after it had been clipped, as "
                    f"averaging it over ranks does; {AT_THE_STEP}"
                )
        if whole.found:
            result = whole.result(self.names)
            if self._caps.update_ is not None:
                self._caps.update_(result.norms, result.coefs)
            self.last = result
            if self._steps is not None:
                self._steps.report(result)
            if self._on_clip is not None:
                self._on_clip(result)

    def _other_are_trained(self, hook: ParameterHook) -> str:
        then, now = ("frozen", "trained") if hook.was_frozen else ("trained", "frozen")
        return (
            f"max_norm: {self._max_norm} counted the trained parameters when {hook.name!r} was {then}, "
            f"which is {now} now; remove() the handle and set it up again"
        )

    def _refuse_averaging(self) -> None:
        if are_averaged(lambda tensor: any(hook in self._handles for hook in hooks_of(tensor))):
            raise RuntimeError(averaged_by("DistributedDataParallel"))


def _needs_norms(max_norm: object) -> str:
    end = " until its warm-up is over: before this, load a state for which it is (max_norm.load_state_dict(...)), or"
    text = f"max_norm: {max_norm} depends on all norms of a step, which aren't known in the backward pass"
    return f"{text}{',' + end if isinstance(max_norm, EMA) else ';'} {AT_THE_STEP}"
