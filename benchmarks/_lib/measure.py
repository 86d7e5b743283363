"""Timing: variants interleaved in rounds, caches in a known state, and the machine's ceilings."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# More than the last-level cache of any machine this is likely to run on.
BEYOND_CACHES = 256 << 20
# Ceilings don't change above this size; a second Llama-sized buffer would only cost memory.
CEILING_LIMIT = 1 << 30
# Rounds that even the slowest variant gets.
LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Variant:
    """Something to time.

    Attributes:
        key: names it in the results.
        before: called with a running number before each call, not timed: chooses and restores gradients.
        call: what is timed.
        data: the tensors it works on, after ``before``.
    """

    key: str
    before: Callable[[int], None]
    call: Callable[[], object]
    data: Callable[[], Sequence[Tensor]]


@dataclass
class Timing:
    """What the rounds gave for one variant, in ms, one value a round.

    Attributes:
        samples: CPU: wall time of the call. CUDA: time on the device between events around it.
        host: CUDA only: time until the call returned.
    """

    samples: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)

    @property
    def min(self) -> float:
        return min(self.samples)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def host_median(self) -> float | None:
        return statistics.median(self.host) if self.host else None


class CpuClock:
    """Wall time by ``time.perf_counter``."""

    def __init__(self, device: torch.device) -> None:
        self.scratch = [torch.ones(BEYOND_CACHES // 4)]

    def settle(self, data: Iterable[Tensor]) -> None:
        for tensor in data:
            tensor.sum()

    def time(self, call: Callable[[], object], timing: Timing) -> None:
        start = time.perf_counter()
        call()
        timing.samples.append(1e3 * (time.perf_counter() - start))


class CudaClock:
    """Device time by events, and the host's part by ``time.perf_counter``.

    The reads that ``settle`` queues (2 GiB when cold: about half a millisecond on an H200) keep the device
    busy while the host issues the call, as a backward pass does. A call whose host part takes longer than
    that shows it in its device time; a call that synchronises shows the reads in its host time.
    """

    def __init__(self, device: torch.device) -> None:
        self.scratch = [torch.ones(BEYOND_CACHES // 4, device=device)] * 8

    def settle(self, data: Iterable[Tensor]) -> None:
        torch.cuda.synchronize()
        for tensor in data:
            tensor.sum()

    def time(self, call: Callable[[], object], timing: Timing) -> None:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        began = time.perf_counter()
        call()
        timing.host.append(1e3 * (time.perf_counter() - began))
        end.record()
        end.synchronize()
        timing.samples.append(start.elapsed_time(end))


Clock = CpuClock | CudaClock


def clock_for(device: torch.device) -> Clock:
    """The clock that is right on ``device``."""
    return CudaClock(device) if device.type == "cuda" else CpuClock(device)


def interleave(
    variants: Sequence[Variant],
    clock: Clock,
    rounds: int,
    warmup: int = 2,
    warm: bool = False,
    seconds: float = math.inf,
) -> dict[str, Timing]:
    """Times every variant once a round, in another random order each round.

    So a slow second of the machine affects all variants, and none always follows the same other, which may leave warm
    or cold caches. Just before each call caches are filled by reading: they hold clean lines then, so no variant
    pays for writing back what restoring its gradients left there.

    Args:
        variants: what to time.
        clock: for the device the variants run on.
        rounds: timed rounds.
        warmup: rounds before that, not kept: plans are made, kernels compiled, pages touched.
        warm: read the variant's own data before the call instead of foreign data.
        seconds: in total, in equal shares. A variant that has used up its share, restoring included, sits out the
            remaining rounds after ``LEAST_ROUNDS``, so that a slow one costs the others nothing.

    Returns:
        Timings by variant key.
    """
    timings: dict[str, Timing] = defaultdict(Timing)
    spent: dict[str, float] = defaultdict(float)
    turn = 0
    order = random.Random(0)
    gc.collect()
    gc.disable()  # as timeit: one variant's call may collect another's garbage
    try:
        for round_ in range(warmup + rounds):
            for variant in order.sample(variants, len(variants)):
                timing = timings[variant.key]
                if spent[variant.key] * len(variants) > seconds and len(timing.samples) >= LEAST_ROUNDS:
                    continue
                began = time.perf_counter()
                variant.before(turn)
                clock.settle(variant.data() if warm else clock.scratch)
                clock.time(variant.call, timing if round_ >= warmup else Timing())
                spent[variant.key] += time.perf_counter() - began
                turn += 1
    finally:
        gc.enable()
    return dict(timings)


class Ceilings:
    """The machine's best speed, on one flat float32 tensor of as many bytes as the gradients have.

    Reading is the floor where nothing is clipped, reading and writing every byte where all is. Each is
    measured in two ways and the faster counts; which one that is differs between machines. On a CPU ``copy_``
    may fall well short of ``mul_``: the destination's lines are fetched before they are overwritten.

    Args:
        nbytes: of the gradients.
        device: where.
    """

    READ = ("torch.dot", "torch.sum")
    WRITE = ("copy_", "mul_")

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.nbytes = min(nbytes, CEILING_LIMIT) // 4 * 4
        self._scale = nbytes / self.nbytes
        self._flat = torch.ones(self.nbytes // 4, device=device)
        self._target = torch.ones_like(self._flat)

    def variants(self) -> list[Variant]:
        """To be measured among the others, in the same rounds."""
        flat, target = self._flat, self._target
        calls: dict[str, Callable[[], object]] = {
            "torch.dot": lambda: torch.dot(flat, flat),
            "torch.sum": flat.sum,
            "copy_": lambda: target.copy_(flat),
            "mul_": lambda: flat.mul_(1.0),
        }
        return [Variant(key, lambda turn: None, call, lambda: [flat]) for key, call in calls.items()]

    def take(self, timings: dict[str, Timing]) -> dict[str, Timing]:
        """Takes the ceilings' timings out of ``timings``, scaled to the gradients' bytes."""
        found = {key: timings.pop(key) for key in (*self.READ, *self.WRITE)}
        return {key: Timing([ms * self._scale for ms in t.samples]) for key, t in found.items()}
