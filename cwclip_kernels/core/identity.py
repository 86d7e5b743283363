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


class Owner(NamedTuple):
    """The parameters of one model."""

    ids: tuple[int, ...]
    storage: StorageWeakRef | None  # of the last one; None if it has none that could be told

    @property
    def is_alive(self) -> bool:
        """Whether its memory is still in use."""
        return self.storage is not None and not self.storage.expired()  # type: ignore[no-untyped-call]

    def is_same(self, other: Owner) -> bool:
        """Whether these are the same parameters, surely."""
        if self.ids != other.ids or self.storage is None or other.storage is None:
            return False
        return self.is_alive and self.storage.cdata == other.storage.cdata
