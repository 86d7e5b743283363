"""Copies of static data to a device, and what captured CUDA graphs keep alive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

# Replays of a graph read these; nothing else may hold them any more. A few KB each.
_KEPT_FOR_GRAPHS: list[object] = []

BEFORE_CAPTURE = (
    "the first call with these gradients was made while a CUDA graph is being captured: make one before, so that "
    "kernels are loaded and tables are on the device"
)


def upload(table: Tensor, device: torch.device) -> Tensor:
    """Copies a table to the device, without waiting for it."""
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)


class OnDevice:
    """A table brought to a device on its current stream, for kernels on this stream and others.

    Attributes:
        tensor: the table there.
    """

    def __init__(self, table: Tensor, device: torch.device) -> None:
        self.tensor = upload(table, device)
        self._arrived: torch.cuda.Event | None = None  # None on the CPU
        self._seen: set[int] = set()  # numbers of streams that have waited
        if self.tensor.is_cuda:
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(device))

    def wait(self, number: int) -> None:
        """Lets the current stream wait until the table is there; ``number`` is one that no other stream ever has."""
        if self._arrived is None or number in self._seen:
            return
        current = torch.cuda.current_stream(self.tensor.device)
        current.wait_event(self._arrived)
        self.tensor.record_stream(current)
        self._seen.add(number)


def keep_for_graphs(*used: object) -> None:
    """Keeps what a graph being captured reads for as long as the program runs."""
    _KEPT_FOR_GRAPHS.append(used)


T = TypeVar("T", bound="Tables")


class Tables(Protocol):
    """Static tables on the host."""

    def to(self: T, device: torch.device) -> T:
        """The same on a device."""

    def tensors(self) -> list[Tensor]:
        """What they consist of."""


def stream_of(device: torch.device) -> int | None:
    """The current stream's id, 0 where there are no streams; None while it is captured into a CUDA graph."""
    if device.type == "cpu":
        return 0
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None
    return torch.accelerator.current_stream().stream_id


class Copy:
    """Tensors just copied to a device on its current stream, for kernels on this stream and on others.

    All use the one copy, and wait for it until it has once been seen to be there. With a copy for each stream, found
    by the stream's id, a new stream that got the id of a destroyed one could read what is still on its way.

    Args:
        tensors: there.
        stream: ``stream_of`` that device.
    """

    def __init__(self, tensors: list[Tensor], device: torch.device, stream: int) -> None:
        self._tensors, self._stream = tensors, stream
        self._module: Any = None if device.type == "cpu" else torch.get_device_module(device)
        self._device, self._arrived = device, None
        if self._module is not None:
            self._arrived = self._module.Event()
            self._arrived.record(self._module.current_stream(device))

    def wait(self, stream: int) -> None:
        """Lets the current stream, which this number stands for, wait for the copy. Not while it is captured."""
        arrived = self._arrived
        if arrived is None and stream == self._stream:
            return
        current = self._module.current_stream(self._device)
        if arrived is not None:
            if arrived.query():
                self._arrived = None
            else:
                current.wait_event(arrived)
        if stream != self._stream:  # where freed memory goes to, whatever stream has that id by then
            for tensor in self._tensors:
                tensor.record_stream(current)


class Placed(Generic[T]):
    """Static tables that are brought to their device once.

    Attributes:
        tables: on the host.
    """

    def __init__(self, tables: T) -> None:
        self.tables = tables
        self._there: tuple[T, Copy] | None = None

    def on(self, device: torch.device, stream: int | None) -> T:
        """The tables on that device, for its current stream.

        Args:
            device: the same at each call.
            stream: ``stream_of(device)``.

        Raises:
            RuntimeError: while capturing, before they have been brought there.
        """
        there = self._there
        if stream is None:
            # The copy was made before the capture, and torch.cuda.graph waits for all that was.
            if there is None:
                raise RuntimeError(BEFORE_CAPTURE)
            keep_for_graphs(there[0])
        elif there is None:
            tables = self.tables.to(device)
            there = self._there = tables, Copy(tables.tensors(), device, stream)
        else:
            there[1].wait(stream)
        return there[0]


@dataclass
class Numbers:
    """int64 numbers on a device, copied there again whenever they change, without waiting."""

    sent: tuple[bytes, Tensor, Copy] | None = None
    spare: Tensor | None = None  # pinned, for a call that is captured

    def on(self, device: torch.device, numbers: bytes, stream: int | None) -> Tensor:
        """These numbers on the device: int64 [n]; ``stream`` as in ``Placed.on``."""
        if stream is None:
            return self._captured(device, numbers)
        if device.type == "cuda" and (self.spare is None or self.spare.nbytes != len(numbers)):
            self.spare = _pinned(numbers)
        sent = self.sent
        if sent is None or sent[0] != numbers:
            there = upload(_on_host(numbers), device)
            sent = self.sent = numbers, there, Copy([there], device, stream)
        else:
            sent[2].wait(stream)
        return sent[1]

    def _captured(self, device: torch.device, numbers: bytes) -> Tensor:
        """The graph's own, copied at each replay from host memory that is never written again."""
        host, self.spare = self.spare, None
        if host is None or host.nbytes != len(numbers):
            host = _pinned(numbers)  # allocating now may fail in older versions of torch
        host.copy_(_on_host(numbers))
        copy = torch.empty(len(host), dtype=torch.int64, device=device)
        copy.copy_(host, non_blocking=True)
        keep_for_graphs(host)
        return copy


def _on_host(numbers: bytes) -> Tensor:
    if not numbers:
        return torch.empty(0, dtype=torch.int64, device="cpu")
    return torch.frombuffer(bytearray(numbers), dtype=torch.int64)


def _pinned(numbers: bytes) -> Tensor:
    return torch.empty(len(numbers) // 8, dtype=torch.int64, device="cpu", pin_memory=True)
