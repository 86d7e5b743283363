"""Several ranks: what they send each other, their clock, and how their times are printed."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._pytree import tree_leaves

from _lib.measure import CpuClock, Timing

# Where among its arguments a collective takes what this rank contributes; 0 unless it stands here.
_CONTRIBUTED = {"allgather_": 1, "_allgather_base_": 1, "reduce_scatter_": 1, "_reduce_scatter_base_": 1}


class Traffic(CommDebugMode):
    """Counts collectives as CommDebugMode does, and the bytes that this rank hands to each.

    That is the payload. What goes over the wire depends on the algorithm: a ring of n ranks makes each send
    2 (n - 1) / n of an all-reduce's payload.
    """

    def __enter__(self) -> Traffic:
        super().__enter__()
        self.calls: Counter[str] = Counter()
        self.nbytes: Counter[str] = Counter()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.get_total_counts()
        outcome = super().__torch_dispatch__(func, types, args, kwargs)
        if self.get_total_counts() > before:
            name = func.name().rpartition("::")[2].partition(".")[0]
            given = tree_leaves(args[_CONTRIBUTED.get(name, 0)])
            self.calls[name] += 1
            self.nbytes[name] += sum(t.nbytes for t in given if isinstance(t, Tensor))
        return outcome


class RankClock(CpuClock):
    """Starts all ranks together; wall time, and as ``host`` the processor time of this process."""

    def __init__(self) -> None:
        self.scratch = []

    def settle(self, data: object) -> None:
        dist.barrier()

    def time(self, call: Callable[[], object], timing: Timing) -> None:
        cpu = time.process_time()
        super().time(call, timing)
        timing.host.append(1e3 * (time.process_time() - cpu))


def pair(samples: Sequence[float]) -> str:
    """Fastest and median."""
    return " / ".join(f"{ms:.1f}" if ms < 99.5 else f"{ms:,.0f}" for ms in (min(samples), statistics.median(samples)))
