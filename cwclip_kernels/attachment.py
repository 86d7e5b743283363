"""Clipping at an optimizer's step, by a hook that runs right before it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any, NoReturn, SupportsIndex

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.optim import Optimizer

from .arguments import check_type, type_name

if TYPE_CHECKING:
    from .clipper import ComponentClipper
from .result import ClipResult


class Attachment:
    """A clipper at work in an optimizer; made by ``ComponentClipper.attach``. As a context manager it ends itself.

    It can't be copied or pickled, so don't store it on a module, which couldn't either. The hooks of an optimizer
    aren't copied with it: attach to the copy.

    Attributes:
        last: what the last step's clipping found and did; None before the first.
    """

    def __init__(
        self,
        clipper: ComponentClipper,
        optimizer: Optimizer,
        on_clip: Callable[[ClipResult], object] | None,
        replace: bool = False,
    ) -> None:
        check_type(replace, "replace", bool, "a bool")
        _check_optimizer(optimizer)
        _runner_of_hooks()
        self.last: ClipResult | None = None
        self._owner = clipper
        self._on_clip = on_clip
        self._owned: tuple[int, ...] = ()
        self._part = clipper
        self._clipped: tuple[Tensor, ...] = ()
        self._turn = 0
        self._may_nest = _may_step_within_step(optimizer)
        self._look_up_owned(optimizer)
        check_not_in_backward(clipper, self._clipped)
        earlier = clipping_too(optimizer, self._clipped)
        if earlier and not replace:
            raise ValueError(
                f"optimizer: a clipper that was attached to it before clips {earlier[0][1]!r} as well; end that with "
                "its handle's remove(), or with attach(..., replace=True)"
            )
        for attachment, _ in earlier:
            attachment.remove()
        self._hook = optimizer.register_step_pre_hook(self._before_step)

    def remove(self) -> None:
        """Ends clipping at this optimizer's steps."""
        self._hook.remove()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def state_dict(self) -> dict[str, Any]:
        """What the clipper's caps have learnt: {"max_norm": ...}, or {} where they learn nothing."""
        return self._owner.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from a ``state_dict()``.

        Raises:
            TypeError, ValueError: not a ``state_dict()`` of a clipper with such caps. Nothing is changed.
        """
        self._owner.load_state_dict(state_dict)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            "an Attachment belongs to one optimizer and can't be copied or pickled: attach a clipper to the other "
            "optimizer; state_dict() and load_state_dict() carry over what its caps have learnt"
        )

    def _look_up_owned(self, optimizer: Optimizer) -> bool:
        """Finds the parameters that are the optimizer's; False if they are the same as before."""
        parameters = parameters_of(optimizer)
        owned = tuple(map(id, parameters))
        if owned == self._owned:
            return False
        part = self._owner.part(parameters)
        if not part.parameters:
            raise ValueError("optimizer: owns none of the parameters that this clipper clips")
        self._owned, self._part, self._clipped = owned, part, part.parameters
        return True

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if is_dynamo_compiling():
            if self._may_nest:
                torch._dynamo.graph_break()  # what is raised while Dynamo traces only makes it go on untraced
                raise RuntimeError(_nested(optimizer))
        elif self._is_inside(optimizer):
            return None
        # What an optimizer that unscales by itself is handed by torch.amp.GradScaler.step.
        if getattr(optimizer, "grad_scale", None) is not None or kwargs.get("grad_scaler") is not None:
            raise RuntimeError(
                f"{type_name(optimizer)} unscales its gradients by itself, so here they still carry the loss's scale "
                "and can't be clipped: call scaler.unscale_(optimizer) before scaler.step(optimizer), or use "
                "cwclip_kernels.ComponentClipGradScaler"
            )
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._clip(optimizer)
            return None

        # With a closure there are no gradients yet.
        def clipped() -> Any:
            loss = closure()
            self._clip(optimizer)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": clipped}
        return (args[0], clipped, *args[2:]), kwargs

    def _is_inside(self, optimizer: Optimizer) -> bool:
        """Whether this is a step within a step, at which these gradients are clipped already.

        Where a step calls super().step(), torch runs the hooks twice if the base class has been used in this process,
        and once if not.

        Raises:
            RuntimeError: the outer step is another optimizer's, with a clipper of its own; or it can't be told.
        """
        if self._may_nest and _is_compiled_in_parts():
            raise RuntimeError(_nested(optimizer))
        for outer in _steps_around():
            if outer is optimizer:
                return True
            shared = clipping_too(outer, self._clipped, but=self)
            if shared:
                raise RuntimeError(
                    f"optimizer: this {type_name(optimizer)} steps inside of a {type_name(outer)}, and the clippers "
                    f"attached to both clip {shared[0][1]!r}; remove() one of their handles"
                )
        return False

    def _clip(self, optimizer: Optimizer) -> None:
        if self._look_up_owned(optimizer):
            self._check_alone(optimizer)
        if not is_dynamo_compiling():
            # Another one each time: looking at all would cost more than the rest of the host's work.
            self._turn = (self._turn + 1) % len(self._clipped)
            check_not_in_backward(self._owner, (self._clipped[self._turn],))
        self.last = self._part.clip_()
        if self._on_clip is not None:
            self._on_clip(self.last)

    def _check_alone(self, optimizer: Optimizer) -> None:
        """After parameters came or went: others that are attached mustn't have come to clip the same."""
        shared = clipping_too(optimizer, self._clipped, but=self)
        if shared:
            self._owned = ()  # so that the next step looks again
            raise RuntimeError(
                f"optimizer: two clippers that are attached to it clip {shared[0][1]!r}, which came into its "
                "param_groups later; remove() one of their handles"
            )


def _may_step_within_step(optimizer: Optimizer) -> bool:
    """Whether a step may call another one that runs hooks, too: its base class's, or that of an optimizer inside."""
    # torch puts a function of its own around a class's step when the class is first used.
    steps = {inspect.unwrap(c.__dict__["step"]) for c in type(optimizer).__mro__[:-1] if "step" in c.__dict__}
    steps.discard(Optimizer.step)
    return len(steps) > 1 or any(True for _ in _inside(optimizer))


def _nested(optimizer: Optimizer) -> str:
    return (
        f"optimizer: the step() of this {type_name(optimizer)} may call another step, at which gradients would be "
        "clipped again, and in a compiled function that can't be told; don't compile the step, or clip before it, "
        "outside of the compiled function: clip_()"
    )


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """What an optimizer owns, group by group."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def clipping_too(
    optimizer: Optimizer, parameters: Sequence[Tensor], *, but: Attachment | None = None
) -> list[tuple[Attachment, str]]:
    """The attachments in an optimizer, or in one inside it, that clip one of these parameters, each with its name."""
    found = []
    for owner in (optimizer, *(inner for _, inner in _inside(optimizer))):
        for attachment in _attached(owner):
            if attachment is not but:
                clipped = set(map(id, attachment._owner.parameters)) & set(map(id, parameters_of(owner)))
                shared = next((p for p in parameters if id(p) in clipped), None)
                if shared is not None:
                    found.append((attachment, _name(attachment._owner, shared)))
    return found


def inside_of(outer: object) -> str:
    """Of an optimizer that others wrap, how to get at it: ": its .optimizer (AdamW)"; "" if there is none."""
    return next((f": its {path} ({type_name(o)})" for path, o in _inside(outer) if runs_hooks(o)), "")


def check_not_in_backward(clipper: ComponentClipper, parameters: Iterable[Tensor]) -> None:
    """Raises RuntimeError if a parameter's gradient is clipped by ``clip_in_backward`` as well."""
    for p in parameters:
        hooks = getattr(p, "_post_accumulate_grad_hooks", None)
        if hooks and any(getattr(type(hook), "clips_by_component", False) for hook in hooks.values()):
            raise RuntimeError(
                f"the gradient of {_name(clipper, p)!r} is clipped in the backward pass already (clip_in_backward), "
                "and would be again at the step; remove() one of the two"
            )


def _attached(optimizer: Optimizer) -> list[Attachment]:
    hooks = getattr(optimizer, "_optimizer_step_pre_hooks", None) or {}
    owners = [getattr(hook, "__self__", None) for hook in hooks.values()]
    return [owner for owner in owners if isinstance(owner, Attachment)]


def _inside(outer: object, seen: tuple[object, ...] = ()) -> Iterator[tuple[str, Optimizer]]:
    """The optimizers that an object holds in attributes, and that these hold, each with the way to it."""
    seen = (*seen, outer)
    for name, value in tuple(getattr(outer, "__dict__", {}).items()):
        held = [("", value)]
        if isinstance(value, list | tuple):
            held = [(f"[{i}]", item) for i, item in enumerate(value)]
        for place, inner in held:
            # By type: isinstance asks an object for its __class__, and proxies may do anything then.
            if issubclass(type(inner), Optimizer) and all(inner is not known for known in seen):
                way = f".{_public(outer, name, value)}{place}"
                yield way, inner
                yield from ((way + further, innermost) for further, innermost in _inside(inner, seen))


def _public(outer: object, name: str, value: object) -> str:
    """The name under which others get at an attribute, if it has one."""
    public = name.lstrip("_")
    try:
        return public if getattr(outer, public, None) is value else name
    except Exception:  # a property of somebody's
        return name


def _steps_around() -> Iterator[Optimizer]:
    """The optimizers whose steps have called the one whose hook runs now.

    Read off the stack, because a step that raised an error tells nobody that it is over.
    """
    runner = _runner_of_hooks()
    frame = sys._getframe()
    is_own = True
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is runner:
            if not is_own:
                yield frame.f_locals["self"]
            is_own = False


def _is_compiled_in_parts() -> bool:
    """Whether a step around this one goes on in a part that Dynamo has made of it, so that it can't be recognised."""
    known = _runner_of_hooks()
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code is not known and code.co_filename == known.co_filename and known.co_name in code.co_name:
            return True
        frame = frame.f_back
    return False


@cache
def _runner_of_hooks() -> CodeType:
    """Of the function that torch puts around every ``step`` and that runs the hooks.

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


def _name(clipper: ComponentClipper, parameter: Tensor) -> str:
    names = clipper._engine.components.tensor_names
    return next(name for name, tensor in zip(names, clipper._parameters(), strict=True) if tensor is parameter)


def runs_hooks(optimizer: Optimizer) -> bool:
    """Whether every ``optimizer.step()`` runs this optimizer's hooks.

    torch puts the function that does so around the class's ``step``, in ``Optimizer.__init__``, and marks it as
    hooked. An instance's own ``step``, such as a learning rate scheduler puts there, has the mark if it was made with
    functools.wraps.
    """
    step = optimizer.step
    is_own = getattr(step, "__self__", optimizer) is optimizer
    return hasattr(optimizer, "_optimizer_step_pre_hooks") and is_own and getattr(step, "hooked", False) is True


def _check_optimizer(optimizer: object) -> None:
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
    if "step" in vars(optimizer) and not inner:
        raise TypeError(
            f"optimizer: the step() of this {kind} has been replaced by a function that may not run torch's step "
            "hooks, and then nothing would be clipped; if it calls the original, make it with "
            "functools.wraps(optimizer.step), or clip by hand: clip_() before step()"
        )
    way_out = inner or ", or call Optimizer.__init__ in its own, or clip by hand: clip_() before step()"
    raise TypeError(
        f"optimizer: the step() of {kind} doesn't run torch's step hooks, so that nothing would be clipped; of a "
        f"wrapper pass the optimizer inside{way_out}"
    )
