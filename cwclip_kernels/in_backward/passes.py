"""One backward pass, which may consist of several graph tasks, one within another."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from operator import attrgetter
from types import CodeType, FrameType
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..core.formula import wide_dtype
from ..thresholds.base import StepCaps
from .hooks import Own

_PRIVATE = (
    "autograd.Variable._execution_engine.queue_callback",
    "autograd.function.BackwardCFunction.apply.__code__",
    "autograd.graph._engine_run_backward.__code__",
    "_C._current_graph_task_id",
    "_C._current_autograd_node",
)


def check_torch() -> None:
    """Raises RuntimeError unless this version of torch has what is used here and is autograd's own."""
    for path in _PRIVATE:
        try:
            attrgetter(path)(torch)
        except AttributeError:
            raise RuntimeError(
                f"clip_in_backward isn't made for torch {torch.__version__}, which has no torch.{path}; clip at the "
                "step instead: ComponentClipper.attach(optimizer)"
            ) from None


class Pass:
    """One graph task: caps as they were at its first gradient, and what has been found; in the end, the whole pass.

    Attributes:
        task: autograd's number of the graph task; an outer one's is lower.
        found: where components are among all K, their norms, coefficients and caps.
        is_watched: whether another rank may yet write to clipped gradients.
        watched: then name, parameter and outline of its clipped gradient (None where it was freed).
        is_over: whether the backward pass has ended, or is about to fail.
        is_deferred: whether its end has been put after all other callbacks.
        was_looked_for: whether who averages gradients was looked for in it.
    """

    def __init__(self, task: int, policy: StepCaps, is_watched: bool) -> None:
        self.task = task
        self.found: list[tuple[Own, Tensor, Tensor, Tensor]] = []
        self.is_watched = is_watched
        self.watched: list[tuple[str, Tensor, tuple[int, int] | None]] = []
        self.is_over = False
        self.is_deferred = False
        self.was_looked_for = False
        self._policy = policy
        self._caps: dict[torch.device, Tensor] = {}
        self._inner: list[Pass] = []

    @torch.no_grad()
    def caps_on(self, device: torch.device) -> Tensor:
        """The caps of this pass, [] or [K]."""
        if device not in self._caps:
            first = next(iter(self._caps.values()), None)
            self._caps[device] = self._policy.caps(device, None) if first is None else first.to(device)
        return self._caps[device]

    def take(self, inner: Pass) -> None:
        """Adds what a graph task within this one has found."""
        self._inner.append(inner)
        if not self._caps:
            self._caps = dict(inner._caps)

    def all(self) -> Iterator[Pass]:
        """This graph task and those within it."""
        yield self
        for inner in self._inner:
            yield from inner.all()

    @torch.no_grad()
    def together(self, count: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """Norms [K], coefficients [K] and caps of the whole pass; None if nothing was found."""
        found = [one for part in self.all() for one in part.found]
        if not found:
            return None
        home = found[-1][1].device
        dtype = max((norms.dtype for _, norms, _, _ in found), key=lambda kind: kind.itemsize)
        norms = torch.zeros(count, dtype=dtype, device=home)
        coefs = torch.ones_like(norms)
        caps = found[-1][3]
        one_for_all = all(own_caps.ndim == 0 for _, _, _, own_caps in found)
        if not one_for_all:
            # Caps that follow the parameters are known only of those that had a gradient.
            known = next((all_caps for part in self.all() for all_caps in part._caps.values()), None)
            if known is None:
                known = torch.full((count,), math.inf, dtype=wide_dtype(home), device=home)
            caps = known.to(home, copy=True)
        for own, some_norms, some_coefs, some_caps in found:
            norms[own], coefs[own] = some_norms.to(home, dtype), some_coefs.to(home, dtype)
            if not one_for_all:
                caps[own] = some_caps.to(home, caps.dtype)
        return norms, coefs, caps


class Passes:
    """The backward passes that are under way.

    Reentrant checkpointing runs a graph task inside a node of another one. What the inner one found goes to the outer
    one, by a hook that runs in the outer task right after that node; the outermost task's end is the pass's. A
    backward() that is called in a hook is a pass of its own: no hook of that node need come any more, and the
    gradients that it adds are whole.

    Args:
        begin: called at a graph task's first gradient, before anything is done; returns whether the gradients must be
            watched, because another rank may yet write to them.
        policy: where caps come from.
        finish: called with the whole pass at its end.
    """

    def __init__(
        self,
        begin: Callable[[], bool],
        policy: StepCaps,
        finish: Callable[[Pass], None],
    ) -> None:
        self._begin = begin
        self._policy = policy
        self._finish = finish
        self._lock = threading.Lock()  # gradients of several devices arrive on several threads
        # The callback keeps a pass alive: that of a backward pass that fails is dropped with it.
        self._open: WeakValueDictionary[int, Pass] = WeakValueDictionary()

    def current(self) -> Pass:
        """That of the graph task in which we are."""
        task = torch._C._current_graph_task_id()
        found = self._open.get(task)
        if found is not None:
            return found
        with self._lock:
            found = self._open.get(task)
            if found is None:
                found = Pass(task, self._policy, self._begin())
                after_others(partial(self._end, found))
                self._open[task] = found
        return found

    def _end(self, ended: Pass) -> None:
        node: Any = torch._C._current_autograd_node()
        if node is not None and _is_called_by_node():
            hook: Any = node.register_hook(lambda *_: self._join(ended, hook))
        elif node is None and sys._getframe().f_back is None and _is_within_another():
            # One of autograd's own threads, such as a device's. An inner graph task ends on another than its
            # node's if it lies 60 deep, or if its last gradient is on another device; then no node is known.
            raise RuntimeError(
                "clip_in_backward: a backward pass within another ended on a thread of its own, so that it can't be "
                "told where the outermost ends; use checkpoint(..., use_reentrant=False), or clip at the step: "
                "ComponentClipper.attach(optimizer)"
            )
        else:
            self._finish(ended)

    def _join(self, ended: Pass, hook: Any) -> None:
        hook.remove()
        # Not if the outer pass failed before it came here, and this is another one through the same graph.
        if torch._C._current_graph_task_id() < ended.task:
            self.current().take(ended)


def _is_called_by_node() -> bool:
    """Whether the backward pass that ends here was called by a node's own code, and not by a hook on it."""
    inner, node = _codes()
    frame: FrameType | None = sys._getframe()
    has_called = False
    caller = None
    while frame is not None:
        if frame.f_code is inner:
            if has_called:
                break
            has_called = True
        if has_called:
            caller = frame.f_code
        frame = frame.f_back
    return caller is node


def _codes() -> tuple[CodeType, CodeType]:
    """Of what calls the engine, and of what the engine calls for a node written in Python."""
    return (
        torch.autograd.graph._engine_run_backward.__code__,
        torch.autograd.function.BackwardCFunction.apply.__code__,
    )


def _is_within_another() -> bool:
    """Whether any thread is in a backward pass that was called by a node of another one."""
    inner, node = _codes()
    for innermost in sys._current_frames().values():
        frame: FrameType | None = innermost
        has_called = False
        while frame is not None:
            if has_called and frame.f_code is node:
                return True
            has_called = has_called or frame.f_code is inner
            frame = frame.f_back
    return False


def after_others(call: Callable[[], None]) -> None:
    """Has something called, from a callback at a backward pass's end, after those that are queued now."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.queue_callback(call)
