"""A ``torch.amp.GradScaler`` that clips by component in the pass that unscales."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NoReturn, SupportsIndex
from weakref import WeakSet

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from .arguments import check_type, warn_caller
from .attachment import check_not_in_backward, clipping_too, parameters_of
from .clipper import ComponentClipper
from .result import ClipResult
from .thresholds import Threshold
from .thresholds.base import is_capturing
from .thresholds.caps import CapPolicy, Caps

# Steps without anything to clip before a warning: a GAN may take 100 with one of its optimizers first.
_STEPS_WITHOUT = 128

_OVERRIDDEN = {
    "_unscale_grads_": ("optimizer", "inv_scale", "found_inf", "allow_fp16"),
    "_maybe_opt_step": ("optimizer", "optimizer_state", "args", "kwargs"),
}


class ComponentClipGradScaler(GradScaler):
    """A ``GradScaler`` whose ``unscale_`` also clips each component, in one pass over the gradients.

    Use it as torch's own, and clip nowhere else. ``step`` calls ``unscale_`` if you don't, also for fused optimizers.
    Parameters that the clipper doesn't have are unscaled. Disabled (``enabled=False``, for bfloat16) it still clips.

    Thresholds don't learn from a step that is skipped because of inf or NaN, unless a fused optimizer skips it on the
    device, without telling the host.

    ``state_dict()`` is that of torch's scaler, and either loads the other's; ``clipper.state_dict()`` holds what
    thresholds have learnt. ``copy.deepcopy`` copies the clipper too, and keeps ``on_clip``. Pickling is refused,
    since the parameters would be pickled as well.

    Args:
        clipper: what to clip, and how. With several optimizers each clips what it owns.
        device, init_scale, growth_factor, backoff_factor, growth_interval, enabled: as for ``torch.amp.GradScaler``.
        on_clip: called with each ``ClipResult``, such as ``ClipRecorder.record``.

    Attributes:
        last: the last ``ClipResult``, with norms of the unscaled gradients; None before the first.

    Raises:
        TypeError: ``clipper`` isn't a ``ComponentClipper``.
        ValueError: the clipper raises for non-finite norms, which a scaled loss has now and then.
        RuntimeError: this version of torch has a different ``GradScaler``.

    Example:
        >>> import torch
        >>> from cwclip_kernels import ComponentClipGradScaler, ComponentClipper
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> scaler = ComponentClipGradScaler(ComponentClipper(model, max_norm=0.1), device="cpu")
        >>> scaler.scale(model(torch.ones(1, 2)).sum()).backward()
        >>> scaler.step(optimizer)
        >>> scaler.update()
        >>> scaler.last.norms, model.bias.grad
        (tensor([1.4142, 1.0000]), tensor([0.1000]))
    """

    def __init__(
        self,
        clipper: ComponentClipper,
        device: str = "cuda",
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
        *,
        on_clip: Callable[[ClipResult], object] | None = None,
    ) -> None:
        check_type(clipper, "clipper", ComponentClipper, "a ComponentClipper")
        if clipper.raises_nonfinite:
            raise ValueError(
                "clipper: raises for non-finite norms, but a scaled loss has some now and then, when the step is "
                "skipped; use nonfinite='propagate', 'zero' or 'skip'"
            )
        _check_torch()
        super().__init__(device, init_scale, growth_factor, backoff_factor, growth_interval, enabled)
        self.last: ClipResult | None = None
        self._clipper = clipper
        self._on_clip = on_clip
        self._parts: dict[int, _Part] = {}
        self._unscaling = False
        self._clipped: WeakSet[Optimizer] = WeakSet()  # since their last step; used while disabled
        self._steps_without = 0

    @property
    def clipper(self) -> ComponentClipper:
        """The clipper, for its ``state_dict()``; a deep-copied scaler has its own.

        Example:
            >>> import copy, torch
            >>> from cwclip_kernels import ComponentClipGradScaler, ComponentClipper
            >>> clipper = ComponentClipper(torch.nn.Linear(2, 1), max_norm=0.1)
            >>> scaler = ComponentClipGradScaler(clipper, device="cpu")
            >>> scaler.clipper is clipper, copy.deepcopy(scaler).clipper is clipper
            (True, False)
        """
        return self._clipper

    def unscale_(self, optimizer: Optimizer) -> None:
        """Unscales and clips the optimizer's gradients, once for each ``step``, after the last backward pass.

        Raises:
            RuntimeError: called twice, or after ``step``, before ``update``; or ``attach`` or ``clip_in_backward``
                clips some of the gradients, too. Nothing is changed.
            ValueError: float16 gradients, or a component of which another optimizer owns a part.
        """
        part = self._part_of(optimizer)
        part.check_alone(optimizer)
        if part.clipper is None:
            self._count_without()
        if not self.is_enabled():
            self._clip(part)
            self._clipped.add(optimizer)
            return
        self._unscaling = True
        try:
            super().unscale_(optimizer)
        finally:
            self._unscaling = False

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """As ``torch.amp.GradScaler.step``, after ``unscale_`` if that hasn't been called; no closures."""
        closure = kwargs.pop("closure", None)
        if any(map(callable, (closure, *args))):
            raise RuntimeError("a closure's gradients can't be clipped here; use ComponentClipper.attach(optimizer)")
        part = self._part_of(optimizer)
        # Also for optimizers that can unscale by themselves: gradients must be unscaled to be clipped.
        if self._is_ready(optimizer) if self.is_enabled() else optimizer not in self._clipped:
            self.unscale_(optimizer)
        else:
            part.check_alone(optimizer)
        self._clipped.discard(optimizer)
        return super().step(optimizer, *args, **kwargs)

    def _maybe_opt_step(
        self, optimizer: Optimizer, optimizer_state: dict[str, Any], *args: Any, **kwargs: Any
    ) -> float | None:
        later = self._part_of(optimizer).later

        def step(*args: Any, **kwargs: Any) -> Any:
            if later is not None:
                later.learn()
            return optimizer.step(*args, **kwargs)

        # torch waits for found_inf here; to learn whether the step was taken from elsewhere would be a second sync.
        wrapped: Any = SimpleNamespace(step=step)
        result: float | None = super()._maybe_opt_step(wrapped, optimizer_state, *args, **kwargs)
        return result

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """As ``torch.amp.GradScaler.update``."""
        self._clipped.clear()
        super().update(new_scale)

    def __copy__(self) -> ComponentClipGradScaler:
        return self._copied(lambda value: value, {})

    def __deepcopy__(self, memo: dict[int, Any]) -> ComponentClipGradScaler:
        return self._copied(lambda value: copy.deepcopy(value, memo), memo)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            "a ComponentClipGradScaler can't be pickled, since the parameters would be pickled with it: make a new "
            "one around the clipper and call load_state_dict() with this one's state_dict()"
        )

    def _copied(self, how: Callable[[Any], Any], memo: dict[int, Any]) -> ComponentClipGradScaler:
        if self._clipped:
            raise RuntimeError("a ComponentClipGradScaler can't be copied between unscale_() and step()")
        state = self.__getstate__()  # raises in the middle of an iteration
        new = memo[id(self)] = self.__class__.__new__(self.__class__)
        new.__dict__.update(_on_clip=state.pop("_on_clip"), _parts={}, _clipped=WeakSet())
        if self.is_enabled():
            new._per_optimizer_states = copy.copy(state.pop("_per_optimizer_states"))
        new.__dict__.update({name: how(value) for name, value in state.items() if name not in new.__dict__})
        return new

    def _is_ready(self, optimizer: Optimizer) -> bool:
        state = self._per_optimizer_states[id(optimizer)]
        return bool(state["stage"].name == "READY")

    def _unscale_grads_(
        self, optimizer: Any, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        if not self._unscaling:  # torch calls this only to look for inf and NaN
            return super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        part = self._part_of(optimizer)
        grads = [p.grad for p in parameters_of(optimizer) if p.grad is not None]
        if any(grad.dtype == torch.float16 for grad in grads):
            raise ValueError("Attempting to unscale FP16 gradients: keep parameters in float32, use torch.autocast")
        others_may_have = part.clipper is not None and part.clipper.is_spread  # on other ranks
        if not grads and not others_may_have:
            return {}
        if part.later is not None:
            part.later.begin(not (getattr(optimizer, "_step_supports_amp_scaling", False) or is_capturing()))
        self._clip(part, inv_scale=inv_scale, found_inf=found_inf)
        rest: Any = SimpleNamespace(param_groups=[{"params": part.others}])
        found = super()._unscale_grads_(rest, inv_scale, torch.zeros_like(found_inf), allow_fp16)
        # Not their sum: a fused optimizer skips a step if this is 1, but takes it if this is 2.
        here = found_inf.device
        found[here] = torch.maximum(found[here], found_inf) if here in found else found_inf
        return found

    def _clip(self, part: _Part, **scaled: Tensor) -> None:
        if part.clipper is None:
            return
        self.last = part.clipper.clip_(**scaled)
        if self._on_clip is not None:
            self._on_clip(self.last)

    def _count_without(self) -> None:
        self._steps_without += 1
        if self.last is None and self._steps_without == _STEPS_WITHOUT:
            warn_caller(
                f"ComponentClipGradScaler has clipped nothing in {_STEPS_WITHOUT} steps: its optimizers own none of "
                "the clipper's parameters. Was the clipper made from another copy of the model?"
            )

    def _part_of(self, optimizer: Optimizer) -> _Part:
        parameters = parameters_of(optimizer)
        ids = tuple(map(id, parameters))
        known = self._parts.get(id(optimizer))
        if known is None or known.ids != ids:
            known = self._parts[id(optimizer)] = _part(self._clipper, parameters, ids)
        return known


@dataclass
class _Part:
    """What one optimizer owns.

    Attributes:
        ids: of its parameters.
        clipper: of those that are clipped; None if none is.
        clipped: these.
        others: those that are only unscaled.
        later: the clipper's policy, if it is one that may learn.
        turn: which of the clipped ones is looked at next.
    """

    ids: tuple[int, ...]
    clipper: ComponentClipper | None
    clipped: tuple[Tensor, ...]
    others: list[Tensor]
    later: _LearnsLater | None
    turn: int = 0

    def check_alone(self, optimizer: Optimizer) -> None:
        """Raises RuntimeError if what is clipped here is clipped at another place, too."""
        if self.clipper is None:
            return
        too = clipping_too(optimizer, self.clipped)
        if too:
            raise RuntimeError(
                f"optimizer: a clipper that is attached to it clips {too[0][1]!r} as well; remove() that one's "
                "handle, or use torch's own GradScaler"
            )
        # All of them once, and then another one each time.
        seen = self.clipped if self.turn == 0 else (self.clipped[self.turn % len(self.clipped)],)
        check_not_in_backward(self.clipper, seen)
        self.turn += 1


def _part(clipper: ComponentClipper, parameters: list[Tensor], ids: tuple[int, ...]) -> _Part:
    part = clipper.part(parameters)
    clipped = part.parameters
    own = set(map(id, clipped))
    others = [p for p in parameters if id(p) not in own]
    later = None
    if clipped and isinstance(part.max_norm, Threshold):
        later = _LearnsLater()
        part._policy_of_clip = later.around
    return _Part(ids, part if clipped else None, clipped, others, later)


class _LearnsLater:
    """A policy that may learn from a clip only when its step is taken, which is known later."""

    def __init__(self) -> None:
        self._policy: CapPolicy = Caps(math.inf, ())  # until there is one
        self._waits = False
        self._seen: tuple[Tensor, Tensor] | None = None

    def around(self, policy: CapPolicy) -> CapPolicy:
        """This in place of a clip's policy."""
        self._policy = policy
        return self

    @property
    def needs_norms(self) -> bool:
        """See ``CapPolicy``."""
        return self._policy.needs_norms

    @property
    def adds_eps(self) -> bool:
        """See ``CapPolicy``."""
        return self._policy.adds_eps

    def caps(self, device: torch.device, norms: Tensor | None) -> Tensor:
        """See ``CapPolicy``."""
        return self._policy.caps(device, norms)

    def begin(self, waits: bool) -> None:
        """Before a clip: whether it is learnt from later. One that still waits has had no step, and never is."""
        self._waits, self._seen = waits, None

    def update_(self, norms: Tensor, coefs: Tensor) -> None:
        """See ``CapPolicy``."""
        self._seen = norms, coefs
        if not self._waits:
            self.learn()

    @torch.no_grad()
    def learn(self) -> None:
        """The step is taken."""
        seen, self._seen = self._seen, None
        if seen is not None:
            self._policy.update_(*seen)


def _check_torch() -> None:
    """Raises RuntimeError unless ``GradScaler`` has the methods that are overridden here, with the same arguments."""
    for name, wanted in _OVERRIDDEN.items():
        method = getattr(GradScaler, name, None)
        if method is not None and list(inspect.signature(method).parameters) == ["self", *wanted]:
            continue
        raise RuntimeError(
            f"ComponentClipGradScaler isn't made for the GradScaler of torch {torch.__version__}; use torch's own, "
            "with scaler.unscale_(optimizer) and then clipper.clip_() before scaler.step(optimizer)"
        )
