"""Counting what ranks send each other."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Collectives by name, filled in when the block ends."""
    counts: dict[str, int] = {}
    with CommDebugMode() as mode:
        yield counts
    for operator, number in mode.get_comm_counts().items():
        name = str(operator).rpartition(".")[2]
        counts[name] = counts.get(name, 0) + number


def everywhere(thing):
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, thing)
    return found
