"""What one call launches on a GPU: kernels, copies, fills, and whether the host waits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

LABEL = "one call of a benchmark"


@dataclass(frozen=True)
class Activity:
    """What one call does.

    Attributes:
        kernels: launched.
        copies: memory copies, in any direction.
        fills: memory fills.
        waits: calls of CUDA in which the host waits for the device, whoever made them.
        torch_waits: torch's own sync check (``torch.cuda.set_sync_debug_mode("error")``) objected.
    """

    kernels: int
    copies: int
    fills: int
    waits: int
    torch_waits: bool

    def __str__(self) -> str:
        parts = [str(self.kernels)]
        parts += [f"{n} {what}" for n, what in ((self.copies, "copy"), (self.fills, "fill")) if n]
        return " + ".join(parts) + (" sync" if self.waits or self.torch_waits else "")


@dataclass(frozen=True)
class SetActivity:
    """What the providers' calls do on one set.

    Attributes:
        set: name of the shape set.
        dtype: of the gradients.
        clipped: the case.
        by_provider: provider key -> what its call did; missing if not measured.
    """

    set: str
    dtype: str
    clipped: str
    by_provider: dict[str, Activity]


def activity_of(before: Callable[[], None], call: Callable[[], object]) -> Activity:
    """Watches a call twice: under torch's sync check, and under its profiler.

    Args:
        before: restores what the call works on.
        call: the call.
    """
    before()
    call()  # plans are made and kernels compiled now, if they weren't
    before()
    torch_waits = waits_by_torch(call)
    before()
    return count(profiled(call), torch_waits)


def waits_by_torch(call: Callable[[], object]) -> bool:
    """Whether torch's sync check objects to the call, which then ends there."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the check doesn't find every wait: hence the profiler
        try:
            torch.cuda.set_sync_debug_mode("error")
            call()
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            return True
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return False


def profiled(call: Callable[[], object]) -> list[Any]:
    """The events that torch's profiler sees in one call, from the host and from the GPU."""
    with_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if with_gpu else [])]
    with profile(activities=activities) as profiler:
        if with_gpu:
            torch.cuda.synchronize()
        with record_function(LABEL):
            call()
        if with_gpu:
            torch.cuda.synchronize()
    return list(profiler.events())


def count(events: Iterable[Any], torch_waits: bool) -> Activity:
    """The call's activity, from the profiler's events.

    Nothing else runs on the GPU while the profiler is on, so all of its events count. On the host our own
    synchronization comes after the call's range.
    """
    events = list(events)
    # The range shows on the GPU as well, as a span that is no kernel.
    on_gpu = [e.name for e in events if e.device_type != DeviceType.CPU and e.name != LABEL]
    copies = sum(name.startswith("Memcpy") for name in on_gpu)
    fills = sum(name.startswith("Memset") for name in on_gpu)
    span = next(e.time_range for e in events if e.name == LABEL and e.device_type == DeviceType.CPU)
    waits = [
        e.name
        for e in events
        if e.device_type == DeviceType.CPU
        and e.name.startswith("cu")  # CUDA's runtime or its driver
        and e.name.endswith("Synchronize")
        and span.start <= e.time_range.start <= span.end
    ]
    return Activity(len(on_gpu) - copies - fills, copies, fills, len(waits), torch_waits)
