"""Power sums of the same components on several ranks, made whole by one all-reduce.

p > 0       sums are added up: SUM of float64
p = inf     the largest: MAX. Backends lose a NaN among floats, so their bits are compared as integers: for numbers
>= 0 these have the same order, and NaN comes above inf
p = -inf    the smallest: MAX of integers in the opposite order, below them all -1 for "no elements here"
p < 0       SUM, and beside each sum whether there are elements
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends.memory import upload
from ..core.formula import neutral
from .groups import Group, Pending

Measured = Tensor | None  # bool, whether there are elements; wanted for p < 0 alone

_BITS = {torch.float64: torch.int64, torch.float32: torch.int32}


@dataclass(frozen=True, eq=False)
class Reduction:
    """Which of this rank's sums are added up over which ranks.

    Attributes:
        group: the ranks.
        own: which of the sums here, int64.
        lanes: where in the payload each goes, int64, in an order that all ranks share.
        width: of the payload: more than there are lanes where other ranks have components that this one hasn't.
        is_all: the payload is this rank's sums as they are.
    """

    group: Group
    own: Tensor
    lanes: Tensor
    width: int
    is_all: bool
    _on: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, group: Group, own: list[int], lanes: list[int], width: int, count: int) -> Reduction:
        """From plain numbers, of ``count`` sums."""
        places, into = (torch.tensor(numbers, dtype=torch.int64, device="cpu") for numbers in (own, lanes))
        return cls(group, places, into, width, own == lanes == list(range(width)) and width == count)

    def start(self, sums: Tensor, measured: Measured, norm_type: float) -> Pending:
        """Sends off what is here, which may then be overwritten."""
        if self.is_all:
            return self.group.reduce(*_encoded(sums, measured, norm_type))
        own, lanes = self._indices(sums.device)
        payload = sums.new_full((self.width,), neutral(norm_type)).index_copy_(0, lanes, sums[own])
        known = None
        if measured is not None:
            known = measured.new_zeros(self.width).index_copy_(0, lanes, measured[own])
        return self.group.reduce(*_encoded(payload, known, norm_type))

    def finish(self, pending: Pending, sums: Tensor, measured: Measured, norm_type: float) -> tuple[Tensor, Measured]:
        """``sums`` and ``measured`` with what came back in them."""
        whole, known = _decoded(pending.result(), sums.dtype, norm_type)
        if self.is_all:
            return whole, known
        own, lanes = self._indices(sums.device)
        sums.index_copy_(0, own, whole[lanes])
        if measured is not None and known is not None:
            measured.index_copy_(0, own, known[lanes])
        return sums, measured

    def _indices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._on:
            self._on[device] = upload(self.own, device), upload(self.lanes, device)
        return self._on[device]


def _encoded(sums: Tensor, measured: Measured, norm_type: float) -> tuple[Tensor, Any]:
    """What is sent, and how it is reduced."""
    if not math.isinf(norm_type):
        sent = sums if measured is None else torch.cat((sums, measured.to(sums.dtype)))
        return sent, dist.ReduceOp.SUM
    kind = _BITS[sums.dtype]
    bits = torch.where(sums.isnan(), math.nan, sums).abs().view(kind)
    if norm_type > 0:
        return bits, dist.ReduceOp.MAX
    top = torch.iinfo(kind).max
    bits = torch.where(sums.isnan(), top, top - 1 - bits)
    return (bits if measured is None else torch.where(measured, bits, -1)), dist.ReduceOp.MAX


def _decoded(received: Tensor, dtype: torch.dtype, norm_type: float) -> tuple[Tensor, Measured]:
    if not math.isinf(norm_type):
        if norm_type >= 0:
            return received, None
        sums, measured = received.chunk(2)
        return sums, measured > 0
    if norm_type > 0:
        return received.view(dtype), None
    top = torch.iinfo(received.dtype).max
    sums = torch.where(received == -1, math.inf, (top - 1 - received).view(dtype))
    return torch.where(received == top, math.nan, sums), received != -1
