"""torch's optimizers: which parameters they own, whether their steps run hooks, and which clippers are attached."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..arguments import type_name
from .parameter_clipper import ParameterClipper


def parameters_of(optimizer: Optimizer) -> Sequence[Tensor]:
    """The parameters of an optimizer, group by group."""
    return [p for group in optimizer.param_groups for p in group["params"]]


class OptimizerPart:
    """The part of a clipper that an optimizer owns: a clipper for what is ``clipped``, and the other parameters."""

    def __init__(self, whole: ParameterClipper, parameters: Sequence[Tensor]) -> None:
        self.clipper = whole.part(parameters)
        self.clipped = self.clipper.parameters
        clipped = set(map(id, self.clipped))
        self.others = tuple(p for p in parameters if id(p) not in clipped)
        self._turn = 0

    def check_not_in_backward(self) -> None:
        """Raises if a gradient is clipped by ``clip_in_backward`` as well.

        Looks at all parameters first and then at one each time, since all would take longer than the clipping.
        """
        if self.clipped:
            turn, self._turn = self._turn, self._turn + 1
            some = (self.clipped[turn % len(self.clipped)],) if turn else self.clipped
            self.clipper.check_not_in_backward(some)


class OptimizerParts:
    """The parts of a clipper that optimizers own, made again when their ``param_groups`` change.

    ``check`` may raise for an optimizer with new parameters, before a part is made of them.
    """

    def __init__(self, clipper: ParameterClipper, check: Callable[[Optimizer], None] | None = None) -> None:
        self._clipper = clipper
        self._check = check
        self._parts: dict[int, tuple[tuple[int, ...], OptimizerPart]] = {}

    def of(self, optimizer: Optimizer) -> OptimizerPart:
        """What this optimizer owns now: the same object as long as that stays."""
        parameters = parameters_of(optimizer)
        ids = tuple(map(id, parameters))
        known = self._parts.get(id(optimizer))
        if known is None or known[0] != ids:
            if self._check is not None:
                self._check(optimizer)
            known = self._parts[id(optimizer)] = ids, OptimizerPart(self._clipper, parameters)
        return known[1]


def inner_optimizers(outer: object, seen: tuple[object, ...] = ()) -> Iterator[tuple[str, Optimizer]]:
    """The optimizers in the attributes of an object, and in these optimizers' attributes, each with its path."""
    seen = (*seen, outer)
    for name, value in tuple(getattr(outer, "__dict__", {}).items()):
        held = [("", value)]
        if isinstance(value, list | tuple):
            held = [(f"[{i}]", item) for i, item in enumerate(value)]
        for place, inner in held:
            # Not isinstance, which reads __class__ and may run a proxy's code.
            if issubclass(type(inner), Optimizer) and all(inner is not known for known in seen):
                path = f".{_public(outer, name, value)}{place}"
                yield path, inner
                yield from ((path + further, innermost) for further, innermost in inner_optimizers(inner, seen))


def _public(outer: object, name: str, value: object) -> str:
    """The public name of an attribute, if it has one."""
    public = name.lstrip("_")
    try:
        return public if getattr(outer, public, None) is value else name
    except Exception:  # of a property
        return name


def inside_of(outer: object) -> str:
    """Where a wrapper holds an optimizer that runs hooks: ": its .optimizer (AdamW)"; "" if there is none."""
    return next((f": its {path} ({type_name(o)})" for path, o in inner_optimizers(outer) if runs_hooks(o)), "")


def runs_hooks(optimizer: Optimizer) -> bool:
    """Whether every ``optimizer.step()`` runs this optimizer's hooks."""
    # ``Optimizer.__init__`` wraps the class's ``step`` in a function that runs them and is marked as hooked. One that
    # replaces it on an instance, as by a learning rate scheduler, has the mark if made with functools.wraps.
    step = optimizer.step
    is_own = getattr(step, "__self__", optimizer) is optimizer
    return hasattr(optimizer, "_optimizer_step_pre_hooks") and is_own and getattr(step, "hooked", False) is True


def check_runs_hooks(optimizer: object) -> None:
    """Raises TypeError or ValueError unless every step runs the optimizer's hooks."""
    inner = inside_of(optimizer)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer: expected a torch.optim.Optimizer, not {type_name(optimizer)}; of a wrapper pass the "
            f"optimizer inside{inner}"
        )
    kind = type_name(optimizer)
    if getattr(optimizer, "_overlap_with_ddp", False):
        raise ValueError(
            f"optimizer: {kind} with overlap_with_ddp=True steps in the backward pass, before anything could be "
            "clipped; make it without"
        )
    if runs_hooks(optimizer):
        return
    by_hand = "clip by hand: clip_() before step()"
    if "step" in vars(optimizer) and not inner:
        raise TypeError(
            f"optimizer: the step() of this {kind} has been replaced by a function that may not run torch's step "
            "hooks, and then nothing would be clipped; if it calls the original, make it with "
            f"functools.wraps(optimizer.step), or {by_hand}"
        )
    raise TypeError(
        f"optimizer: the step() of {kind} doesn't run torch's step hooks, so that nothing would be clipped; of a "
        f"wrapper pass the optimizer inside{inner or f', or call Optimizer.__init__ in its own, or {by_hand}'}"
    )


def may_step_within_step(optimizer: Optimizer) -> bool:
    """Whether a step may call another one that runs hooks too: its base class's, or that of an inner optimizer."""
    # torch wraps a class's step when the class is first used.
    steps = {inspect.unwrap(c.__dict__["step"]) for c in type(optimizer).__mro__[:-1] if "step" in c.__dict__}
    steps.discard(Optimizer.step)
    return len(steps) > 1 or any(True for _ in inner_optimizers(optimizer))


def outer_steps() -> Iterator[Optimizer]:
    """The optimizers whose steps have called the one whose hook runs now."""
    # Read off the stack, since nothing is called when a step ends by an error.
    runner = runner_of_hooks()
    running = [frame for frame in _stack() if frame.f_code is runner]
    yield from (frame.f_locals["self"] for frame in running[1:])


def is_compiled_in_parts() -> bool:
    """Whether a step around this one runs in a function that Dynamo made of it, which hides the optimizer."""
    known = runner_of_hooks()
    codes = [frame.f_code for frame in _stack() if frame.f_code is not known]
    return any(code.co_filename == known.co_filename and known.co_name in code.co_name for code in codes)


def _stack() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


@cache
def runner_of_hooks() -> CodeType:
    """The code of the function in which torch wraps every ``step``, and which runs the hooks."""
    try:
        return Optimizer.profile_hook_step(lambda: None).__code__
    except AttributeError:
        raise RuntimeError(
            f"attach isn't made for the Optimizer of torch {torch.__version__}; clip by hand: clip_() before step()"
        ) from None


def clipping_optimizer(optimizer: object, parameters: Sequence[Tensor] | None = None) -> Optimizer | None:
    """The optimizer, or one inside it, whose own step clips (``ComponentClipAdamW``); None if there is none.

    Args:
        optimizer: perhaps a trainer's wrapper.
        parameters: only an optimizer that owns one of these counts.
    """

    def counts(owner: Any) -> bool:
        # Known by its class: this file can't import it, and a wrapper may pass attributes through.
        if not (getattr(type(owner), "clips_by_component", False) and isinstance(owner, Optimizer)):
            return False
        return parameters is None or not set(map(id, parameters)).isdisjoint(map(id, parameters_of(owner)))

    held: tuple[Any, ...] = (optimizer, *(inner for _, inner in inner_optimizers(optimizer)))
    return next(filter(counts, held), None)


def attached_clippers(
    optimizer: Optimizer, parameters: Sequence[Tensor], *, but: object = None
) -> list[tuple[Any, str]]:
    """The attachments, except ``but``, that clip one of these parameters at steps of an optimizer or of one in it."""
    found = []
    for owner in (optimizer, *(inner for _, inner in inner_optimizers(optimizer))):
        for hook in (getattr(owner, "_optimizer_step_pre_hooks", None) or {}).values():
            attachment: Any = getattr(hook, "__self__", None)
            if attachment is not but and getattr(type(attachment), "clips_by_component", False):
                clipper = attachment.clipper
                clipped = set(map(id, clipper.parameters)) & set(map(id, parameters_of(owner)))
                shared = next((p for p in parameters if id(p) in clipped), None)
                found += [] if shared is None else [(attachment, clipper.name_of(shared))]
    return found
