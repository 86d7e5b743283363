"""What the handles of clipping that goes on by itself have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn, SupportsIndex, TypeVar

from .result import ClipResult
from .thresholds.constant import MaxNorm
from .thresholds.learning import learnt, load_learnt

Self = TypeVar("Self", bound="Handle")


class Handle(ABC):
    """Clipping that goes on until ``remove()``. As a context manager it ends itself.

    Attributes:
        last: what the last clipping found and did; None before the first.
    """

    last: ClipResult | None = None
    _max_norm: MaxNorm
    _not_copied: ClassVar[str]  # why it can't be copied, and the way out

    @abstractmethod
    def remove(self) -> None:
        """Ends clipping."""

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            f"{self._not_copied}; state_dict() and load_state_dict() carry over what its caps have learnt"
        )

    def state_dict(self) -> dict[str, Any]:
        """What caps have learnt: {"max_norm": ``Threshold.state_dict()``}, or {} where they learn nothing."""
        return learnt(self._max_norm)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from a ``state_dict()``.

        Raises:
            TypeError, ValueError: not that of such caps, or of other components. Nothing is changed.
        """
        load_learnt(self._max_norm, state_dict)
