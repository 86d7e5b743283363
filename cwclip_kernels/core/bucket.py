"""What a backend is handed: the gradients of one device, and the components that they belong to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.native import Addresses
from ..components.membership import Slice
from .checks import Gradients


class Found(NamedTuple):
    """A bucket's gradients at one call.

    Attributes:
        own: the gradients.
        addresses: where they lie, int64 each; None where no native pass has looked at them.
    """

    own: list[Tensor]
    addresses: bytes | None


@dataclass(eq=False)
class Bucket:
    """The gradients of one device that one backend serves, in any mix of dtypes.

    Attributes:
        device: where the gradients live.
        backend: name of the backend that serves them.
        reason: why that backend, for ``explain()``.
        positions: index of each gradient in the call's list of parameters.
        components: component of each piece, int64 [m] on the CPU, values in [0, count). Pieces are the gradients,
            unless there are ``boxes``.
        boxes: gradient (its place in the bucket) and place of each of the m pieces; None if none is cut.
        count: number of components K of the whole call; every [K] tensor has this length.
        norm_dtype: float32, or float64 if any gradient of the call is float64.
        plain: all are real and strided, so that they can be handed over as they are.
        addresses: reads them off a call's gradients, and notices others; None where only a signature tells.
        state: what the backend keeps with the bucket, such as tables.
    """

    device: torch.device
    backend: str
    reason: str
    positions: tuple[int, ...]
    components: Tensor
    boxes: tuple[tuple[int, Slice], ...] | None
    count: int
    norm_dtype: torch.dtype
    plain: bool
    addresses: Addresses | None = None
    state: Any = None

    def pick(self, grads: Gradients) -> list[Tensor]:
        """This bucket's own out of the call's gradients; the list itself where that is all of them."""
        if len(self.positions) == len(grads) and isinstance(grads, list):
            return grads
        return [grads[i] for i in self.positions]  # type: ignore[misc]  # none of these is None

    def pieces(self, grads: list[Tensor]) -> list[Tensor]:
        """The m pieces of this bucket's own gradients, as views on them."""
        if self.boxes is None:
            return grads
        return [narrowed(grads[i], box) for i, box in self.boxes]

    def cuts(self) -> list[int] | None:
        """``boxes`` for native code; None if no gradient is cut.

        Of each piece its gradient, how many dims are cut, and of each of these dim, start and size.
        """
        if self.boxes is None:
            return None
        return [n for i, box in self.boxes for n in (i, len(box), *(n for part in box for n in part))]


def narrowed(tensor: Tensor, box: Slice) -> Tensor:
    """The slice of a tensor, as a view."""
    for dim, start, size in box:
        tensor = tensor.narrow(dim, start, size)
    return tensor
