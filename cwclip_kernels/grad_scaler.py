"""A ``torch.amp.GradScaler`` that clips by component in the pass that unscales."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from .clipper import ClipResult, ComponentClipper
from .components import type_name


class ComponentClipGradScaler(GradScaler):
    """A ``GradScaler`` whose ``unscale_`` also clips each component, in one pass over the gradients.

    Use it as torch's own, without clipping anywhere else. ``step`` unscales and clips what hasn't been yet, also for
    fused optimizers; scale updates and skipped steps are torch's. Disabled (``enabled=False``, say for bfloat16) it
    still clips. Parameters that the clipper doesn't have are unscaled.

    Args:
        clipper: what to clip, and how. With several optimizers each clips what it owns.
        device: as for ``torch.amp.GradScaler``.
        init_scale: likewise.
        growth_factor: likewise.
        backoff_factor: likewise.
        growth_interval: likewise.
        enabled: likewise.
        on_clip: called with each ``ClipResult``, such as ``ClipRecorder.record``.

    Attributes:
        last: what the last clipping found and did, with norms of the unscaled gradients; None before the first.

    Raises:
        TypeError: ``clipper`` is none.
        ValueError: the clipper raises for non-finite norms, which a scaled loss has now and then.
        RuntimeError: this version of torch has another ``GradScaler`` than this class is made for.

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
        if not isinstance(clipper, ComponentClipper):
            raise TypeError(f"clipper: expected a ComponentClipper, not {type_name(clipper)}")
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
        self._parts: dict[int, tuple[tuple[int, ...], ComponentClipper | None, list[Tensor]]] = {}
        self._unscaling = False
        self._clipped: set[int] = set()  # optimizers, since their last step; used while disabled

    def unscale_(self, optimizer: Optimizer) -> None:
        """Unscales and clips the optimizer's gradients; once for each ``step``, and only when they are complete.

        Raises:
            RuntimeError: called twice, or after ``step``, before ``update``.
            ValueError: float16 gradients, or a component that another optimizer has a part of.
        """
        if not self.is_enabled():
            if id(optimizer) not in self._clipped:
                self._clip(self._part_of(optimizer)[0])
                self._clipped.add(id(optimizer))
            return
        self._unscaling = True
        try:
            super().unscale_(optimizer)
        finally:
            self._unscaling = False

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """As ``torch.amp.GradScaler.step``, after ``unscale_`` where that hasn't been called."""
        if not self.is_enabled():
            if "closure" in kwargs or args:
                raise RuntimeError(
                    "a closure's gradients can't be clipped here; use ComponentClipper.attach(optimizer)"
                )
            self.unscale_(optimizer)
            self._clipped.discard(id(optimizer))
        elif self._is_ready(optimizer):
            # Optimizers that unscale by themselves, too: to be clipped, gradients must be unscaled.
            self.unscale_(optimizer)
        return super().step(optimizer, *args, **kwargs)

    def _is_ready(self, optimizer: Optimizer) -> bool:
        state = self._per_optimizer_states[id(optimizer)]
        return bool(state["stage"].name == "READY")

    def _unscale_grads_(
        self, optimizer: Any, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        if not self._unscaling:  # torch only looks for inf and NaN
            return super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        part, others = self._part_of(optimizer)
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if any(grad.dtype == torch.float16 for grad in grads):
            raise ValueError(
                "Attempting to unscale FP16 gradients: keep parameters in float32 and use torch.autocast."
            )
        if not grads and (part is None or not part.is_spread):  # where it is, other ranks may have some
            return {}
        self._clip(part, inv_scale=inv_scale, found_inf=found_inf)
        rest: Any = SimpleNamespace(param_groups=[{"params": others}])
        found = super()._unscale_grads_(rest, inv_scale, torch.zeros_like(found_inf), allow_fp16)
        # Not the sum of the two: fused optimizers skip a step where this is 1, and take it where it is 2.
        here = found_inf.device
        found[here] = torch.maximum(found[here], found_inf) if here in found else found_inf
        return found

    def _clip(self, part: ComponentClipper | None, **scaled: Tensor) -> None:
        if part is None:
            return
        self.last = part.clip_(**scaled)
        if self._on_clip is not None:
            self._on_clip(self.last)

    def _part_of(self, optimizer: Optimizer) -> tuple[ComponentClipper | None, list[Tensor]]:
        """The clipper for what an optimizer owns, None if nothing is clipped, and what it owns that isn't."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        ids = tuple(map(id, parameters))
        known = self._parts.get(id(optimizer))
        if known is None or known[0] != ids:
            part = self._clipper.part(parameters)
            clipped = set(map(id, part.parameters))
            known = ids, part if clipped else None, [p for p in parameters if id(p) not in clipped]
            self._parts[id(optimizer)] = known
        return known[1:]


def _check_torch() -> None:
    """Raises RuntimeError unless ``GradScaler`` hands its gradients to the method that is overridden here."""
    method = getattr(GradScaler, "_unscale_grads_", None)
    found = list(inspect.signature(method).parameters) if method is not None else None
    if found != ["self", "optimizer", "inv_scale", "found_inf", "allow_fp16"]:
        raise RuntimeError(
            f"ComponentClipGradScaler isn't made for the GradScaler of torch {torch.__version__}; use torch's own, "
            "with scaler.unscale_(optimizer) and then clipper.clip_() before scaler.step(optimizer)"
        )
