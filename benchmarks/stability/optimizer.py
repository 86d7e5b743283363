"""AdamW as the first BERTs had it, without bias correction, or with."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay; torch's own always corrects the bias of its running means.

        m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
        p <- p - lr wd p - lr m^ / (sqrt(v^) + eps)         m^, v^ = m, v without correction

    Without correction the first steps are larger, by sqrt(10) at the very first: what makes fine-tuning unstable
    (Mosbach et al., arXiv 2006.04884; Zhang et al., arXiv 2006.05987).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bias_correction: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct": bias_correction}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step over all parameters with a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"m": torch.zeros_like(p), "v": torch.zeros_like(p)}
            group["count"] = group.get("count", 0) + 1
            self._update(group, params)

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        grads = [p.grad for p in params]
        means = [self.state[p]["m"] for p in params]
        squares = [self.state[p]["v"] for p in params]
        (b1, b2), lr, n = group["betas"], group["lr"], group["count"]
        first = 1 - b1**n if group["correct"] else 1.0
        second = math.sqrt(1 - b2**n) if group["correct"] else 1.0

        torch._foreach_lerp_(means, grads, 1 - b1)
        torch._foreach_mul_(squares, b2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - b2)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, second)
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_addcdiv_(params, means, roots, -lr / first)


def groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: decay for all but biases and normalisation layers, which are known by their one dim."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
