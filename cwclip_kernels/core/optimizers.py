"""torch's optimizers: what they own, whether their steps run hooks, and who clips there already."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..arguments import type_name
from .parameter_clipper import parameters_of

# ------------------------------------------------------------------------------------------------------------
# Optimizers that hold others
# ------------------------------------------------------------------------------------------------------------


def inner_optimizers(outer: object, seen: tuple[object, ...] = ()) -> Iterator[tuple[str, Optimizer]]:
    """The optimizers that an object holds in attributes, and that these hold, each with its path."""
    seen = (*seen, outer)
    for name, value in tuple(getattr(outer, "__dict__", {}).items()):
        held = [("", value)]
        if isinstance(value, list | tuple):
            held = [(f"[{i}]", item) for i, item in enumerate(value)]
        for place, inner in held:
            # By type: isinstance asks an object for its __class__, and proxies may do anything then.
            if issubclass(type(inner), Optimizer) and all(inner is not known for known in seen):
                path = f".{_public(outer, name, value)}{place}"
                yield path, inner
                yield from ((path + further, innermost) for further, innermost in inner_optimizers(inner, seen))


def _public(outer: object, name: str, value: object) -> str:
    """The public name of an attribute, if it has one."""
    public = name.lstrip("_")
    try:
        return public if getattr(outer, public, None) is value else name
    except Exception:  # a property of somebody's
        return name


def inside_of(outer: object) -> str:
    """How to get at the optimizer that another one wraps: ": its .optimizer (AdamW)"; "" if there is none."""
    return next((f": its {path} ({type_name(o)})" for path, o in inner_optimizers(outer) if runs_hooks(o)), "")


# ------------------------------------------------------------------------------------------------------------
# Hooks on steps
# ------------------------------------------------------------------------------------------------------------


def runs_hooks(optimizer: Optimizer) -> bool:
    """Whether every ``optimizer.step()`` runs this optimizer's hooks.

    torch puts the function that does so around the class's ``step``, in ``Optimizer.__init__``, and marks it as
    hooked. An instance's own ``step``, such as a learning rate scheduler puts there, has the mark if it was made with
    functools.wraps.
    """
    step = optimizer.step
    is_own = getattr(step, "__self__", optimizer) is optimizer
    return hasattr(optimizer, "_optimizer_step_pre_hooks") and is_own and getattr(step, "hooked", False) is True


def check_runs_hooks(optimizer: object) -> None:
    """Raises TypeError or ValueError unless each of its steps is certain to run its hooks."""
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
    # torch puts a function of its own around a class's step when the class is first used.
    steps = {inspect.unwrap(c.__dict__["step"]) for c in type(optimizer).__mro__[:-1] if "step" in c.__dict__}
    steps.discard(Optimizer.step)
    return len(steps) > 1 or any(True for _ in inner_optimizers(optimizer))


def outer_steps() -> Iterator[Optimizer]:
    """The optimizers whose steps have called the one whose hook runs now.

    Read off the stack, because a step that raised an error tells nobody that it is over.
    """
    is_own = True
    for frame in _stack():
        if frame.f_code is runner_of_hooks():
            if not is_own:
                yield frame.f_locals["self"]
            is_own = False


def is_compiled_in_parts() -> bool:
    """Whether a step around this one continues in a function that Dynamo made of it, which hides the optimizer."""
    known = runner_of_hooks()
    return any(
        code is not known and code.co_filename == known.co_filename and known.co_name in code.co_name
        for code in (frame.f_code for frame in _stack())
    )


def _stack() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


@cache
def runner_of_hooks() -> CodeType:
    """The code of the function that torch puts around every ``step`` and that runs the hooks.

    Raises:
        RuntimeError: this version of torch has none.
    """
    try:
        code = Optimizer.profile_hook_step(lambda: None).__code__
    except AttributeError:
        code = None
    if isinstance(code, CodeType):
        return code
    raise RuntimeError(
        f"attach isn't made for the Optimizer of torch {torch.__version__}; clip by hand: clip_() before step()"
    )


# ------------------------------------------------------------------------------------------------------------
# Clippers attached to optimizers
# ------------------------------------------------------------------------------------------------------------


def attached_clippers(
    optimizer: Optimizer, parameters: Sequence[Tensor], *, but: object = None
) -> list[tuple[Any, str]]:
    """The ``Attachment`` objects that clip one of these parameters at an optimizer's steps, each with its name.

    Args:
        optimizer: with those that it holds.
        parameters: to look for.
        but: an attachment that doesn't count.
    """
    found = []
    for owner in (optimizer, *(inner for _, inner in inner_optimizers(optimizer))):
        hooks = getattr(owner, "_optimizer_step_pre_hooks", None) or {}
        for hook in hooks.values():
            attachment: Any = getattr(hook, "__self__", None)
            if attachment is but or not getattr(type(attachment), "clips_by_component", False):
                continue
            clipper = attachment.clipper
            clipped = set(map(id, clipper.parameters)) & set(map(id, parameters_of(owner)))
            shared = next((p for p in parameters if id(p) in clipped), None)
            if shared is not None:
                found.append((attachment, clipper.name_of(shared)))
    return found
