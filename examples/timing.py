"""Times clipping of a model's own gradients, and as a share of training steps: cwclip_kernels beside torch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cwclip_kernels import ComponentClipper, fused_component_clip_
from cwclip_kernels.optim import ComponentClipAdamW

ROUNDS = 20
WARM_UP = 3
STEPS = 8  # with each way to clip
TINY = 1e-9  # learning rate of steps that are timed
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


@dataclass(frozen=True)
class StepTimes:
    """Milliseconds of training steps.

    Attributes:
        model: forward and backward pass, the median of all rounds.
        update: way -> median time of clipping and of the optimizer's step, together.
    """

    model: float
    update: dict[str, float]


UNCLIPPED = "no clipping"


def steps(model: nn.Module, batch: Mapping[str, Tensor], max_norm: float) -> StepTimes:
    """Times whole training steps with each way to clip, in turns; trains on with a learning rate of nearly 0.

    The optimizer finds gradients as the backward pass leaves them, in cache or not.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    plain = torch.optim.AdamW(parameters, lr=TINY, fused=True)
    fused = ComponentClipAdamW(model.named_parameters(), lr=TINY, max_norm=max_norm)
    clipper = ComponentClipper(model, max_norm)

    def loop() -> None:
        for parameter in parameters:
            nn.utils.clip_grad_norm_(parameter, max_norm)

    clips: dict[str, tuple[Callable[[], object], torch.optim.Optimizer]] = {
        UNCLIPPED: (lambda: None, plain),
        "ComponentClipAdamW": (lambda: None, fused),
        "ComponentClipper.clip_": (clipper.clip_, plain),
        "clip_grad_norm_ for each parameter": (loop, plain),
        "clip_grad_norm_ of all (other rule)": (lambda: nn.utils.clip_grad_norm_(parameters, max_norm), plain),
    }
    passes: list[float] = []
    updates: dict[str, list[float]] = {way: [] for way in clips}
    for turn in range(1 + STEPS):
        for way, (clip, optimizer) in clips.items():
            both = _milliseconds(lambda: model(**batch).loss.backward(), parameters[0])
            taken = _milliseconds(lambda clip=clip, optimizer=optimizer: (clip(), optimizer.step()), parameters[0])
            optimizer.zero_grad()
            if turn > 0:  # the first makes the optimizer's state
                passes.append(both)
                updates[way].append(taken)
    return StepTimes(statistics.median(passes), {way: statistics.median(taken) for way, taken in updates.items()})


def _milliseconds(call: Callable[[], object], gradient: Tensor) -> float:
    _synchronize(gradient.device)
    start = time.perf_counter()
    call()
    _synchronize(gradient.device)
    return 1e3 * (time.perf_counter() - start)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
