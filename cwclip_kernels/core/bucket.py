"""What a backend is handed: the gradients of one device, and the components that they belong to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.native import Addresses
from ..components.membership import Slice


class Found(NamedTuple):
    """A bucket's gradients at one call, and their addresses, int64 each; None if no native pass has read these."""

    own: list[Tensor]
    addresses: bytes | None


@dataclass(eq=False)
class Bucket:
    """The gradients of one device that one backend serves, in any mix of dtypes.

    Attributes:
        device: of the gradients.
        backend: name of the backend that serves them.
        reason: why that backend, for ``explain()``.
        positions: of each gradient in the call's list of parameters.
        components: component of each piece, int64 [m] on the CPU, values in [0, count). A piece is a gradient, or
            one of ``slices``.
        slices: of each piece its gradient's index in the bucket, and the slice of it; None if all are whole.
        count: number of components K of the whole call, the length of every [K] tensor.
        norm_dtype: float32, or float64 if any gradient of the call is.
        plain: whether all are real and strided, so that backends take them as they are.
        addresses: compares a call's gradients with these and reads their addresses; None if ``ClipPlan`` compares.
        state: what the backend keeps with the bucket, such as tables.
    """

    device: torch.device
    backend: str
    reason: str
    positions: tuple[int, ...]
    components: Tensor
    slices: tuple[tuple[int, Slice], ...] | None
    count: int
    norm_dtype: torch.dtype
    plain: bool
    addresses: Addresses | None = None
    state: Any = None

    def pieces(self, grads: list[Tensor]) -> list[Tensor]:
        """The m pieces of the bucket's gradients, as views."""
        return grads if self.slices is None else [narrowed(grads[i], place) for i, place in self.slices]

    def cuts(self) -> list[int] | None:
        """``slices`` for native code: of each piece its gradient, the number of cut dims, each dim, start, size."""
        if self.slices is None:
            return None
        return [n for i, place in self.slices for n in (i, len(place), *(n for cut in place for n in cut))]


def narrowed(tensor: Tensor, place: Slice) -> Tensor:
    """The slice of a tensor, as a view."""
    for dim, start, size in place:
        tensor = tensor.narrow(dim, start, size)
    return tensor
