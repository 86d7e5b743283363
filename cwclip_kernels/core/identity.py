"""Which parameters are served: told apart without keeping them alive, and without weak references to them.

A tensor with a weak reference can't be swapped, as moving a model may do. An id may be that of a later tensor; but
while there is a weak reference to the storage of the first, no other storage gets its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef


def ids_of(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Of the first and the last parameter; () for tensors that only stand for gradients without parameters."""
    if not tensors or not isinstance(tensors[0], nn.Parameter):
        return ()
    return id(tensors[0]), id(tensors[-1])


def is_alive(storage: StorageWeakRef | None) -> bool:
    """Whether the memory is still in use; False where it couldn't be told."""
    return storage is not None and not storage.expired()  # type: ignore[no-untyped-call]


def is_same_memory(one: StorageWeakRef | None, other: StorageWeakRef | None) -> bool:
    """Whether both are surely the same memory, and in use."""
    return one is not None and other is not None and is_alive(one) and one.cdata == other.cdata


class Owner(NamedTuple):
    """The parameters of one model."""

    ids: tuple[int, ...]
    storage: StorageWeakRef | None  # of the last one; None if it has none that could be told

    def is_same(self, other: Owner) -> bool:
        """Whether these are the same parameters, surely."""
        return self.ids == other.ids and is_same_memory(self.storage, other.storage)
