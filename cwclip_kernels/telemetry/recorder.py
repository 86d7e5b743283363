"""``ClipRecorder``: every step's norms, caps and coefficients, kept on the device and written out now and then."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..arguments import checked_int
from ..core.modes import outside_autograd
from .writers import WRITERS, Row, TensorBoard, Writer

if TYPE_CHECKING:
    from ..result import ClipResult

_NORMS, _CAPS, _COEFS = range(3)


class ClipRecorder:
    """Records what clipping found and did, without stalling a step.

    Each step is copied into a buffer on the device. When ``every`` steps are in it, the buffer goes to the host while
    training goes on in a second one, and is written to disk when that is full, too: the host never waits, unless it
    is ``every`` steps ahead of the device. On the CPU a full buffer is written at once.

    Only one process should record, rank 0 say. What is on disk when a run is killed can be read; up to 2 * ``every``
    steps may be missing.

    Args:
        path: of the files, without a suffix: ``runs/a`` gives ``runs/a.jsonl``, ``runs/a.csv``, and for TensorBoard
            the folder ``runs/a``. Files that exist are continued if they are of the same components, from the step
            after the last that is in them.
        every: steps between two drains.
        formats: of "jsonl", "csv", "tensorboard".

    Raises:
        TypeError, ValueError: an argument that isn't what it should be.
        RuntimeError: TensorBoard is asked for and not installed.

    Example:
        >>> import tempfile, torch
        >>> from cwclip_kernels import ComponentClipper
        >>> from cwclip_kernels.telemetry import ClipRecorder, read_run
        >>> model = torch.nn.Linear(2, 1)
        >>> clipper = ComponentClipper(model, max_norm=0.1)
        >>> folder = tempfile.TemporaryDirectory()
        >>> with ClipRecorder(folder.name + "/run") as recorder:
        ...     for _ in range(3):
        ...         model(torch.ones(1, 2)).sum().backward()
        ...         recorder.record(clipper.clip_())
        >>> run = read_run(folder.name + "/run.jsonl")
        >>> run.names, run.norms.shape, run.steps
        (('weight', 'bias'), torch.Size([3, 2]), [0, 1, 2])
        >>> folder.cleanup()
    """

    def __init__(self, path: str | Path, *, every: int = 100, formats: Sequence[str] = ("jsonl",)) -> None:
        if isinstance(formats, str) or not formats or not set(formats) <= set(WRITERS):
            raise ValueError(f"formats: expected some of {', '.join(WRITERS)}, not {formats!r}")
        self._path = Path(path)
        self._every = checked_int(every, "every", 1)
        self._formats = tuple(dict.fromkeys(formats))
        self._names: tuple[str, ...] | None = None
        self._step = 0
        self._ring: _Ring | None = None
        self._closed = False
        self._at_exit: weakref.finalize[..., ClipRecorder] | None = None

    def record(self, result: ClipResult, step: int | None = None) -> None:
        """Takes a step's result; nothing waits for the device.

        Args:
            result: what ``ComponentClipper.clip_()`` returned.
            step: its number, an int or what stands for one (numpy's, a Tensor of one integer); without, one more than
                the last, from 0 or, in files that are continued, from the step after their last. Give it after a
                restart from an older checkpoint: a step that is recorded twice counts as it was recorded last.

        Raises:
            TypeError: ``step`` isn't a whole number; nothing is recorded.
            ValueError: of other components than before.
            RuntimeError: after ``close()``.
            OSError: steps that were due could not be written. They are kept, and the next call tries again.
        """
        if self._closed:
            raise RuntimeError(f"this ClipRecorder ({self._path}) is closed")
        given = None if step is None else checked_int(step, "step")  # before files are made
        if self._ring is None:
            self._open(result)
        elif result.names != self._names:
            raise ValueError("result: of other components than those recorded before; use another ClipRecorder")
        assert self._ring is not None
        if not self._ring.fits(result):  # the model has moved, or been converted
            self._ring.flush()
            self._start(_Ring(self._every, result, self._ring.writers))
        at = self._step if given is None else given
        self._step = at + 1
        self._ring.put(at, result)

    def flush(self) -> None:
        """Writes all that has been recorded; waits for the device."""
        if self._ring is not None:
            self._ring.flush()

    def close(self) -> None:
        """Writes all that has been recorded and ends; also done when the program ends."""
        if self._closed:
            return
        self.flush()
        self._closed = True
        if self._at_exit is not None:
            self._at_exit.detach()
        if self._ring is not None:
            self._ring.close()

    def __getstate__(self) -> dict[str, Any]:
        if self._ring is not None and not self._closed:
            raise TypeError(
                f"this ClipRecorder ({self._path}) has files open, which a copy would write to as well: copy or "
                "pickle what holds it before the first step is recorded, or after close()"
            )
        return {**self.__dict__, "_ring": None, "_at_exit": None}

    def __enter__(self) -> ClipRecorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, result: ClipResult) -> None:
        writers: list[Writer] = []
        for kind in self._formats:
            place = self._path if kind == "tensorboard" else self._path.with_name(f"{self._path.name}.{kind}")
            writers.append(WRITERS[kind](place, result.names))
        if all(writer.next_step is None for writer in writers):
            for writer in writers:
                if isinstance(writer, TensorBoard):
                    writer.look()
        for writer in writers:
            writer.begin()
        self._names = result.names
        self._step = max((writer.next_step or 0 for writer in writers), default=0)
        self._start(_Ring(self._every, result, writers))

    def _start(self, ring: _Ring) -> None:
        if self._at_exit is not None:
            self._at_exit.detach()
        self._ring = ring
        self._at_exit = weakref.finalize(self, _Ring.flush, ring)


@dataclass
class _Half:
    """One of the two buffers.

    Attributes:
        values: [every, 3, K] on the device: norms, caps, coefficients.
        on_host: as large, where ``values`` goes.
        steps: numbers of the steps in it.
        arrived: when they have arrived on the host; None where there is no need to wait.
        is_leaving: whether they are on their way, or there, and not written yet.
    """

    values: Tensor
    on_host: Tensor
    steps: list[int] = field(default_factory=list)
    arrived: torch.cuda.Event | None = None
    is_leaving: bool = False


class _Ring:
    """The two buffers, and where they are written to."""

    @outside_autograd
    def __init__(self, every: int, result: ClipResult, writers: list[Writer]) -> None:
        device, count = result.norms.device, len(result.names)
        is_cuda = device.type == "cuda"
        self._every = checked_int(every, "every", 1)
        self.writers = writers
        self._halves = []
        for _ in range(2):
            values = torch.zeros((every, 3, count), dtype=result.norms.dtype, device=device)
            on_host = torch.zeros_like(values, device="cpu", pin_memory=True) if is_cuda else values.cpu()
            arrived = torch.cuda.Event() if is_cuda else None  # type: ignore[no-untyped-call]
            self._halves.append(_Half(values, on_host, arrived=arrived))

    def fits(self, result: ClipResult) -> bool:
        """Whether the buffers are of its device and dtype."""
        values = self._halves[0].values
        return values.device == result.norms.device and values.dtype == result.norms.dtype

    @outside_autograd
    def put(self, step: int, result: ClipResult) -> None:
        now, before = self._halves
        if before.is_leaving and (before.arrived is None or before.arrived.query()):  # type: ignore[no-untyped-call]
            self._write(before)
        row = now.values[len(now.steps)]
        row[_NORMS].copy_(result.norms, non_blocking=True)
        row[_CAPS].copy_(result.caps, non_blocking=True)
        row[_COEFS].copy_(result.coefs, non_blocking=True)
        now.steps.append(step)
        if len(now.steps) < self._every:
            return
        self._send(now)
        self._halves.reverse()
        if before.is_leaving:
            self._write(before)
        if now.arrived is None:
            self._write(now)

    @outside_autograd
    def flush(self) -> None:
        now, before = self._halves
        if before.is_leaving:
            self._write(before)
        if now.steps:
            self._send(now)
            self._write(now)

    def close(self) -> None:
        for writer in self.writers:
            writer.close()

    def _send(self, half: _Half) -> None:
        half.on_host.copy_(half.values, non_blocking=True)
        if half.arrived is not None:
            half.arrived.record(torch.cuda.current_stream(half.values.device))
        half.is_leaving = True

    def _write(self, half: _Half) -> None:
        if half.arrived is not None:
            half.arrived.synchronize()  # long over, unless the host is far ahead
        rows = [
            Row(step, *(column.tolist() for column in half.on_host[i].double())) for i, step in enumerate(half.steps)
        ]
        for writer in self.writers:
            writer.write(rows)
        half.steps.clear()
        half.is_leaving = False
