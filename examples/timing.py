"""Times component clipping of a model's own gradients: cwclip_kernels beside torch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cwclip_kernels import ComponentClipper, fused_component_clip_

ROUNDS = 20
WARM_UP = 3
# Below eps, so that it scales every component, and above every norm, so that it scales none.
CAPS = {"all components clipped": 1e-9, "no component clipped": 1e9}
OURS = "fused_component_clip_"


@dataclass(frozen=True)
class Row:
    """One method's milliseconds in the rounds of one case."""

    case: str
    way: str
    milliseconds: list[float]

    @property
    def best(self) -> float:
        """The shortest round, the least disturbed one."""
        return min(self.milliseconds)

    @property
    def median(self) -> float:
        """The middle round."""
        return statistics.median(self.milliseconds)


def ways(model: nn.Module, cap: float) -> dict[str, Callable[[], object]]:
    """The methods. All but the last compute the same thing."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    gradients = [p.grad for p in parameters]
    clipper = ComponentClipper(model, cap)

    def loop() -> None:
        for parameter in parameters:
            nn.utils.clip_grad_norm_(parameter, cap)

    def foreach() -> None:
        coefs = (cap / (torch.stack(torch._foreach_norm(gradients)) + 1e-6)).clamp_(max=1.0)
        torch._foreach_mul_(gradients, list(coefs.unbind()))

    return {
        OURS: lambda: fused_component_clip_(model, cap),
        "ComponentClipper.clip_": clipper.clip_,
        "clip_grad_norm_ for each parameter": loop,
        "_foreach_norm and _foreach_mul_": foreach,
        "clip_grad_norm_ of all (other rule)": lambda: nn.utils.clip_grad_norm_(parameters, cap, foreach=True),
    }


@torch.no_grad()
def compare(model: nn.Module) -> list[Row]:
    """Times every way on the gradients that `model` has; they are put back before every call, off the clock.

    The ways take turns within each round, so that a busy moment of the machine strikes them all.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    copies = [gradient.clone() for gradient in gradients]
    rows = []
    for case, cap in CAPS.items():
        contenders = ways(model, cap)
        times: dict[str, list[float]] = {way: [] for way in contenders}
        for turn in range(WARM_UP + ROUNDS):
            for way, clip in contenders.items():
                torch._foreach_copy_(gradients, copies)
                elapsed = _milliseconds(clip, gradients[0])
                if turn >= WARM_UP:
                    times[way].append(elapsed)
        rows += [Row(case, way, taken) for way, taken in times.items()]
    return rows


def _milliseconds(call: Callable[[], object], gradient: Tensor) -> float:
    _synchronize(gradient.device)
    start = time.perf_counter()
    call()
    _synchronize(gradient.device)
    return 1e3 * (time.perf_counter() - start)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
