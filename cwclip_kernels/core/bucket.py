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
    """The gradients of one device that one backend serves, in any mix of dtypes; m pieces, each whole or a slice."""

    device: torch.device
    backend: str
    reason: str  # why that backend, for ``explain()``
    positions: tuple[int, ...]  # of each gradient in the call's list of parameters
    components: Tensor  # of each piece, int64 [m] on the CPU, values in [0, count)
    slices: tuple[tuple[int, Slice], ...] | None  # of each piece its gradient's index here; None if all are whole
    count: int  # of components of the whole call: every [K] tensor has this length
    norm_dtype: torch.dtype  # float32, or float64 if any gradient of the call is
    plain: bool  # all are real and strided, so that backends take them as they are
    addresses: Addresses | None = None  # compares a call's gradients with these; None if ``ClipPlan`` does
    state: Any = None  # what the backend keeps with the bucket, such as tables
    step_state: Any = None  # the same for an optimizer's steps
    _like_results: Tensor | None = None

    def results(self) -> tuple[Tensor, Tensor]:
        """Uninitialized norms and coefficients, both [K] in ``norm_dtype`` on the device."""
        like = self._like_results
        if like is None:  # kept, since making one like another takes half as long as making one
            like = self._like_results = torch.empty(self.count, dtype=self.norm_dtype, device=self.device)
        return torch.empty_like(like), torch.empty_like(like)

    def pieces(self, grads: list[Tensor]) -> list[Tensor]:
        """The m pieces of the bucket's gradients, as views."""
        return grads if self.slices is None else [narrowed(grads[i], place) for i, place in self.slices]

    def gradient_of_pieces(self) -> list[int]:
        """Of each of the m pieces, which of the bucket's gradients it is of."""
        return list(range(len(self.positions))) if self.slices is None else [i for i, _ in self.slices]

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
