"""Clips and steps: one after the other, or in one pass where the arm clips by component or not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cwclip_kernels import ComponentClipper
from cwclip_kernels.optim import ComponentClipAdamW

from .arms import Arm, clip_of, max_norm_of
from .optimizer import AdamW, groups
from .settings import Settings


@dataclass(frozen=True)
class Stepping:
    """How the gradients of one run become steps.

    Attributes:
        optimizer: for its learning rate.
        names: of the components.
        step: clips and steps; returns the norms before clipping and the coefficients, [K] each.
    """

    optimizer: torch.optim.Optimizer
    names: tuple[str, ...]
    step: Callable[[], tuple[Tensor, Tensor]]


def stepping_of(arm: Arm, model: nn.Module, settings: Settings, lr: float) -> Stepping:
    """What `settings.optimizer` and the arm ask for. One global norm is always clipped before the step."""
    if settings.optimizer == "fused" and arm.kind != "global":
        return _fused(arm, model, settings, lr)
    optimizer = AdamW(
        groups(model, settings.weight_decay), lr, eps=settings.eps, bias_correction=settings.bias_correction
    )
    names, clip = clip_of(arm, model)

    def clip_and_step() -> tuple[Tensor, Tensor]:
        result = clip()
        optimizer.step()
        return result

    return Stepping(optimizer, names, clip_and_step)


def _fused(arm: Arm, model: nn.Module, settings: Settings, lr: float) -> Stepping:
    optimizer = ComponentClipAdamW(
        groups(model, settings.weight_decay),
        lr,
        eps=settings.eps,
        max_norm=max_norm_of(arm),
        correct_bias=settings.bias_correction,
        named_parameters=model,
    )
    names = ComponentClipper(model, max_norm=1.0).names  # in the model's order; the optimizer has that of its groups

    order: Tensor | None = None

    def step() -> tuple[Tensor, Tensor]:
        nonlocal order
        optimizer.step()
        result = optimizer.last
        assert result is not None
        if order is None:  # copied to the device once
            order = torch.tensor([result.names.index(name) for name in names], device=result.norms.device)
        return result.norms[order], result.coefs[order]

    return Stepping(optimizer, names, step)
