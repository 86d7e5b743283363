"""A ``torch.amp.GradScaler`` that clips by component in the pass that unscales."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NoReturn, SupportsIndex
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from .arguments import check_type, type_name, warn_caller
from .clipper import ComponentClipper
from .core.loss_scale import UNSCALED, LossScale
from .core.modes import is_recorded
from .core.optimizers import OptimizerPart, OptimizerParts, attached_clippers, clipping_optimizer, parameters_of
from .core.parameter_clipper import ParameterClipper
from .in_backward.passes import Mark
from .result import ClipResult

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
        self._parts = OptimizerParts(clipper)
        self._unlearnt: dict[int, tuple[ParameterClipper, ClipResult]] = {}  # by optimizer, until its step is taken
        self._unscaling = False
        # Gradients as they were clipped since the last step; used while disabled.
        self._clipped: WeakKeyDictionary[Optimizer, list[Mark]] = WeakKeyDictionary()
        self._steps_without = 0

    @property
    def clipper(self) -> ComponentClipper:
        """The clipper, for its ``state_dict()``; a deep-copied scaler has its own."""
        return self._clipper

    def unscale_(self, optimizer: Optimizer) -> None:
        """Unscales and clips the optimizer's gradients, once for each ``step``, after the last backward pass.

        Raises:
            RuntimeError: called twice, or between ``step`` and ``update``; or ``attach``, ``clip_in_backward`` or the
                optimizer itself (``ComponentClipAdamW``) clips some of the gradients, too. Nothing is changed.
            ValueError: float16 gradients, or a component of which another optimizer owns a part.
        """
        part = self._parts.of(optimizer)
        _check_alone(part, optimizer)
        if not part.clipped:
            self._count_without()
        if not self.is_enabled():
            if self._is_clipped(optimizer):
                raise RuntimeError("unscale_() has already been called on this optimizer since the last update().")
            self._clip(part, UNSCALED)
            self._clipped[optimizer] = [Mark(grad) for grad in _gradients_of(optimizer)]
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
        # Also for optimizers that can unscale by themselves: gradients must be unscaled to be clipped.
        if self._is_ready(optimizer) if self.is_enabled() else not self._is_clipped(optimizer):
            self.unscale_(optimizer)
        else:
            _check_alone(self._parts.of(optimizer), optimizer)
        self._clipped.pop(optimizer, None)
        return super().step(optimizer, *args, **kwargs)

    def _maybe_opt_step(
        self, optimizer: Optimizer, optimizer_state: dict[str, Any], *args: Any, **kwargs: Any
    ) -> float | None:
        unlearnt = self._unlearnt.pop(id(optimizer), None)

        def step(*args: Any, **kwargs: Any) -> Any:
            if unlearnt is not None:
                clipper, result = unlearnt
                clipper.learn(result)
            return optimizer.step(*args, **kwargs)

        # torch waits for found_inf here; to learn whether the step was taken from elsewhere would be a second sync.
        wrapped: Any = SimpleNamespace(step=step)
        result: float | None = super()._maybe_opt_step(wrapped, optimizer_state, *args, **kwargs)
        return result

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """As ``torch.amp.GradScaler.update``."""
        self._clipped.clear()
        self._unlearnt.clear()
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
        new.__dict__.update(_on_clip=state.pop("_on_clip"), _parts=None, _unlearnt={}, _clipped=WeakKeyDictionary())
        if self.is_enabled():
            new._per_optimizer_states = copy.copy(state.pop("_per_optimizer_states"))
        new.__dict__.update({name: how(value) for name, value in state.items() if name not in new.__dict__})
        new._parts = OptimizerParts(new._clipper)
        return new

    def _is_clipped(self, optimizer: Optimizer) -> bool:
        """While disabled: whether its gradients are what ``unscale_`` left, and not of a later backward pass."""
        marks = self._clipped.get(optimizer)
        if marks is None:
            return False
        grads = _gradients_of(optimizer)
        return len(marks) == len(grads) and all(m.writes(g) == 0 for m, g in zip(marks, grads, strict=True))

    def _is_ready(self, optimizer: Optimizer) -> bool:
        state = self._per_optimizer_states[id(optimizer)]
        return bool(state["stage"].name == "READY")

    def _unscale_grads_(
        self, optimizer: Any, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        if not self._unscaling:  # torch calls this only to look for inf and NaN
            return super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        part = self._parts.of(optimizer)
        grads = _gradients_of(optimizer)
        if any(grad.dtype == torch.float16 for grad in grads):
            raise ValueError("Attempting to unscale FP16 gradients: keep parameters in float32, use torch.autocast")
        others_may_have = bool(part.clipped) and part.clipper.is_spread  # on other ranks
        if not grads and not others_may_have:
            return {}
        # A fused optimizer skips its step on the device, and a graph is only being captured: the host can't tell.
        learns = getattr(optimizer, "_step_supports_amp_scaling", False) or is_recorded()
        self._clip(part, LossScale.of(inv_scale, found_inf), learns)
        if part.clipped and self.last is not None and not learns:
            self._unlearnt[id(optimizer)] = part.clipper, self.last
        rest: Any = SimpleNamespace(param_groups=[{"params": list(part.others)}])
        found = super()._unscale_grads_(rest, inv_scale, torch.zeros_like(found_inf), allow_fp16)
        # Not their sum: a fused optimizer skips a step if this is 1, but takes it if this is 2.
        here = found_inf.device
        found[here] = torch.maximum(found[here], found_inf) if here in found else found_inf
        return found

    def _clip(self, part: OptimizerPart, scale: LossScale, learns: bool = True) -> None:
        if not part.clipped:
            return
        self.last = part.clipper.clip(scale, learns=learns)
        if self._on_clip is not None:
            self._on_clip(self.last)

    def _count_without(self) -> None:
        self._steps_without += 1
        if self.last is None and self._steps_without == _STEPS_WITHOUT:
            warn_caller(
                f"ComponentClipGradScaler has clipped nothing in {_STEPS_WITHOUT} steps: its optimizers own none of "
                "the clipper's parameters. Was the clipper made from another copy of the model?"
            )


def _gradients_of(optimizer: Optimizer) -> list[Tensor]:
    return [p.grad for p in parameters_of(optimizer) if p.grad is not None]


def _check_alone(part: OptimizerPart, optimizer: Optimizer) -> None:
    """Raises RuntimeError if what is clipped here is clipped elsewhere as well."""
    clipping = clipping_optimizer(optimizer, part.clipped)
    if clipping is not None:
        raise RuntimeError(
            f"optimizer: {type_name(clipping)} clips in its own step, and this ComponentClipGradScaler would clip "
            "the same gradients before; use torch.amp.GradScaler, whose scale this optimizer takes out in its step"
        )
    too = attached_clippers(optimizer, part.clipped)
    if too:
        raise RuntimeError(
            f"optimizer: a clipper that is attached to it clips {too[0][1]!r} as well; remove() that one's handle, "
            "or use torch's own GradScaler"
        )
    part.check_not_in_backward()


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
