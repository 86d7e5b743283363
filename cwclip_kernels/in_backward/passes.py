"""Backward passes: each is one graph task of autograd, or several that ran inside one another."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from traceback import walk_stack
from types import CodeType, FrameType
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..core.formula import wide_dtype
from ..result import ClipResult
from ..thresholds.base import StepCaps
from .checks import AT_THE_STEP

Own: TypeAlias = "slice | Sequence[int]"  # where the components of one parameter are among all K

_PRIVATE = (
    "autograd.Variable._execution_engine.queue_callback",
    "autograd.function.BackwardCFunction.apply.__code__",
    "autograd.graph._engine_run_backward.__code__",
    "_C._current_graph_task_id",
    "_C._current_autograd_node",
)


def check_torch() -> None:
    """Raises RuntimeError unless this version of torch has the private names that are used here."""
    for path in _PRIVATE:
        try:
            attrgetter(path)(torch)
        except AttributeError:
            raise RuntimeError(
                f"clip_in_backward isn't made for torch {torch.__version__}, which has no torch.{path}; {AT_THE_STEP}"
            ) from None


_weak: Any = StorageWeakRef


class Mark:
    """A gradient as it was clipped: recognised without keeping it.

    A weak reference to the tensor would forbid ``torch.utils.swap_tensors``, and with it moving some models. While
    there is one to its storage, no other storage gets its address. A sparse gradient has no storage; but a new one
    begins with version 0, so it isn't mistaken for one that was written to.
    """

    def __init__(self, grad: Tensor) -> None:
        self._id, self._version = id(grad), grad._version
        self._storage: Any = None if grad.is_sparse else _weak(grad.untyped_storage())

    def writes(self, grad: Tensor) -> int | None:
        """How often this gradient has been written to since; None if it is another one."""
        is_same = id(grad) == self._id and grad.is_sparse == (self._storage is None)
        if is_same and self._storage is not None:
            is_same = self._storage.cdata == grad.untyped_storage()._cdata
        return grad._version - self._version if is_same else None


class Pass:
    """One graph task, with what those inside it have found."""

    def __init__(self, task: int) -> None:
        self.task = task  # autograd's number; an inner task has a higher one
        self.is_over = False  # it has ended, or is about to fail
        self.was_searched = False  # for a module that averages gradients
        self.caps: dict[torch.device, Tensor] = {}  # [] or [K] on each device; none where each parameter has its own
        self.found: list[tuple[Own, Tensor, Tensor, Tensor]] = []  # place, norms, coefficients and caps of each
        self.watched: list[tuple[str, Tensor, Mark | None]] = []  # clipped gradients that others may yet write to
        self.inner: list[Pass] = []

    def caps_on(self, device: torch.device, policy: StepCaps) -> Tensor:
        """The caps of this pass, [] or [K]: those at its first gradient."""
        if device not in self.caps:
            first = next(iter(self.caps.values()), None)
            self.caps[device] = policy.caps(device, None) if first is None else first.to(device)
        return self.caps[device]

    def take(self, inner: Pass) -> None:
        """Adds what a graph task inside this one has found."""
        self.inner += inner, *inner.inner
        self.found += inner.found
        self.watched += inner.watched
        self.caps = self.caps or inner.caps

    def result(self, names: tuple[str, ...]) -> ClipResult:
        """What was found, for all K components, on the device of the last gradient."""
        home = self.found[-1][1].device
        dtype = max((norms.dtype for _, norms, _, _ in self.found), key=lambda kind: kind.itemsize)
        norms = torch.zeros(len(names), dtype=dtype, device=home)
        coefs = torch.ones_like(norms)
        of_pass = next(iter(self.caps.values()), None)
        if of_pass is None:  # caps that depend on the parameters are known only of those that had a gradient
            caps = torch.full((len(names),), math.inf, dtype=wide_dtype(home), device=home)
        else:
            caps = of_pass.to(home, wide_dtype(home), copy=True)
        for own, some_norms, some_coefs, some_caps in self.found:
            norms[own], coefs[own] = some_norms.to(home, dtype), some_coefs.to(home, dtype)
            if of_pass is None:
                caps[own] = some_caps.to(home, caps.dtype)
        return ClipResult(names, norms, coefs, caps)


class Passes:
    """The backward passes that are under way.

    Reentrant checkpointing runs a graph task inside a node of another one. What the inner task found is added to the
    outer one, by a hook that runs in the outer task right after that node; a pass ends with its outermost task. A
    backward() that is called in a hook is a pass of its own: its gradients are complete, and that node may have no
    further hook. ``begin`` is called, under the lock, before the first gradient of each graph task.
    """

    def __init__(self, begin: Callable[[], None], finish: Callable[[Pass], None], lock: threading.RLock) -> None:
        self._begin, self._finish, self._lock = begin, finish, lock
        # Weak: a pass is kept by its callback, which autograd drops where the backward pass fails.
        self._open: WeakValueDictionary[int, Pass] = WeakValueDictionary()

    def current(self) -> Pass:
        """That of the graph task that runs now."""
        task = torch._C._current_graph_task_id()
        with self._lock:
            found = self._open.get(task)
            if found is None:
                self._begin()
                found = self._open[task] = Pass(task)
                # Twice, so that it comes after the callback in which DistributedDataParallel averages gradients.
                _at_the_end(partial(_at_the_end, partial(self._end, found)))
        return found

    def _end(self, ended: Pass) -> None:
        node: Any = torch._C._current_autograd_node()
        if node is not None and _is_called_by_node():
            hook: Any = node.register_hook(lambda *_: self._join(ended, hook))
        elif node is None and sys._getframe().f_back is None and _is_inside_another():
            # On a thread of autograd's own. An inner graph task ends on another thread than its node's if it is 60
            # deep, or if its last gradient is on another device; its node isn't known there.
            raise RuntimeError(
                "clip_in_backward: a backward pass within another ended on a thread of its own, where the outer one "
                f"isn't known; use checkpoint(..., use_reentrant=False), or {AT_THE_STEP}"
            )
        else:
            self._finish(ended)

    def _join(self, ended: Pass, hook: Any) -> None:
        hook.remove()
        # Not if the outer task failed before it came here, and this is a later one through the same graph.
        if torch._C._current_graph_task_id() < ended.task:
            self.current().take(ended)


def _at_the_end(call: Callable[[], None]) -> None:
    """Has something called when the graph task ends, after what is queued already."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.queue_callback(call)


def _outside(frame: FrameType) -> list[CodeType]:
    """What has called the innermost call of the autograd engine on this stack, from there outwards."""
    codes = [caller.f_code for caller, _ in walk_stack(frame)]
    engine = torch.autograd.graph._engine_run_backward.__code__
    return codes[codes.index(engine) + 1 :] if engine in codes else []


def _is_called_by_node() -> bool:
    """Whether the backward pass that ends here was called by a node's own code, and not by a hook on the node."""
    callers = _outside(sys._getframe())
    engine = torch.autograd.graph._engine_run_backward.__code__
    inside = callers[: callers.index(engine)] if engine in callers else callers
    return inside[-1:] == [torch.autograd.function.BackwardCFunction.apply.__code__]


def _is_inside_another() -> bool:
    """Whether any thread runs a backward pass that was called by a node of another one."""
    node = torch.autograd.function.BackwardCFunction.apply.__code__
    return any(node in _outside(frame) for frame in sys._current_frames().values())
