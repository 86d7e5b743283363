"""Clipping the gradients that an optimizer owns, once they are unscaled. Imports no Lightning."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from ...arguments import type_name
from ...core.loss_scale import UNSCALED
from ...result import ClipResult
from ...thresholds.constant import MaxNorm
from .._common import (
    OptimizersClipping,
    innermost,
    learning_unless_skipped,
    refuse_double_clipping,
    refuse_lightning_strategy,
    warn_already_clipped,
)

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class FitClipping(OptimizersClipping):
    """A clipper of a whole module for one fit, with a part for each optimizer."""

    def __init__(
        self, trainer: Trainer, module: LightningModule, max_norm: MaxNorm, arguments: dict[str, Any]
    ) -> None:
        refuse_lightning_strategy(trainer.strategy, "Trainer")
        is_scaled = _scaler_of(trainer) is not None
        hint = "make it an attribute of the module in __init__ or configure_model"
        super().__init__(module, max_norm, arguments, trainer.strategy.model, is_scaled, hint)

    @property
    def names(self) -> tuple[str, ...]:
        """The component names."""
        return self.clipper.names

    def total_norm(self, norms: Tensor) -> Tensor:
        """The norm of all components together: []."""
        return self.clipper.total_norm(norms)

    def clip_(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer, ours: str) -> ClipResult | None:
        """Clips what the optimizer owns; None if Lightning won't step it with these gradients."""
        scaler = _scaler_of(trainer)
        refuse_double_clipping([optimizer], scaler, self.clipped, ours)
        optimizer = innermost(optimizer)
        if scaler is not None and not _is_unscaled(scaler, trainer, module, optimizer):
            return None
        part = self.part_of(optimizer)
        with learning_unless_skipped(self.clipper.max_norm, scaler, [optimizer]):
            return part.clip(UNSCALED)


def _scaler_of(trainer: Trainer) -> Any:
    """The ``GradScaler`` of float16; None if there is none."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def _is_unscaled(scaler: Any, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> bool:
    """Unscales gradients if Lightning hasn't; False if they stay scaled because no step will follow."""
    states = scaler._per_optimizer_states
    now = trainer.fit_loop.total_batch_idx
    # A fused optimizer that was unscaled here, and then not stepped because training_step returned None.
    if states[id(optimizer)].get("cwclip_batch", now) != now:
        del states[id(optimizer)]
    if states[id(optimizer)]["stage"].name != "READY":
        return True
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        if module._current_fx_name in ("on_before_optimizer_step", "configure_gradient_clipping"):
            return False  # before these Lightning unscales whatever it will step
        raise RuntimeError(
            f"{type_name(optimizer)}: gradients still carry the loss's scale, and can't be clipped; call this in "
            "configure_gradient_clipping, or under manual optimization in on_before_optimizer_step"
        )
    if "grad_scaler" in inspect.signature(optimizer.step).parameters:
        raise RuntimeError(
            f"{type_name(optimizer)} unscales its gradients in its own step, so they can't be clipped before; use a "
            "fused optimizer of torch, or precision='bf16-mixed', which has no scale"
        )
    if scaler._scale is None:  # nothing has been scaled yet, so there is nothing to clip
        return False
    scaler.unscale_(optimizer)  # so that its step won't
    states[id(optimizer)]["cwclip_batch"] = now
    return True


def warn_of_gradient_clip_val(trainer: Trainer, module: LightningModule, max_norm: MaxNorm | None = None) -> None:
    """Warns once if Lightning is set to clip by itself, unless to the number that is the cap here."""
    value, algorithm = trainer.gradient_clip_val, trainer.gradient_clip_algorithm
    if isinstance(max_norm, int | float) and max_norm == value:
        return
    if module._current_fx_name == "configure_gradient_clipping":  # which replaces Lightning's own clipping
        effect = "has no effect where configure_gradient_clipping clips by component: pass it on as max_norm"
    else:
        effect = "clips as well, after each component has been clipped: leave one of them out"
    shown = "" if algorithm is None else f", gradient_clip_algorithm={algorithm.value!r}"
    warn_already_clipped(f"Trainer(gradient_clip_val={value}{shown})", value, effect)
