"""``ClipRecorder``: each step's norms, caps and coefficients, buffered on the device and written to files."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_type, checked_int
from ..core.modes import outside_autograd
from ..result import ClipResult
from .live import LiveLine
from .to_host import ToHost
from .trackers import trackers
from .writers import WRITERS, TensorBoard, Writer


class ClipRecorder:
    """Records what each step's clipping found and did, without waiting for the device.

    It goes to files, to trackers that you have opened, or to both.

    Each step is copied to a buffer on the device. When the buffer holds ``every`` steps it is copied to the host
    while the next one fills, and then written to disk. The host waits only if it is ``every`` steps ahead of the
    device. Only one process should record, such as rank 0. The files of a killed run are readable; up to 2 *
    ``every`` steps may be missing.

    Args:
        path: of the files, without a suffix: ``runs/a`` gives ``runs/a.jsonl``, ``runs/a.csv``, and for TensorBoard
            the folder ``runs/a``. Existing files with the same components are continued after their last step. None,
            where there are ``writers``, for no files.
        every: steps that a buffer holds.
        formats: some of "jsonl", "csv", "tensorboard".
        writers: trackers that get ``clip/rate`` (of the components with a gradient), ``clip/nonfinite``,
            ``clip/median_norm`` and ``clip/max_norm`` of each step, in time for the buffer: one of these, or a list.
            An open ``torch.utils.tensorboard.SummaryWriter`` (which also gets a histogram); a W&B run; an MLflow run,
            or anything with ``log_metrics(dict, step=)``, such as a logger of Lightning; or a function of a dict and
            the step. They stay open: close the recorder before them. W&B has these numbers over ``clip/step``, since
            they come later than your own; don't pass ``step=`` to ``log`` of the same run, or W&B ignores what you
            log with a step that is less than its count of rows.
        live: True, or a ``LiveLine``, also shows a line in the terminal or notebook.

    Raises:
        TypeError, ValueError: an invalid argument.
        RuntimeError: TensorBoard is asked for and not installed; or rich, which the live line needs.

    Example:
        >>> import tempfile, torch
        >>> from cwclip_kernels import ComponentClipper
        >>> from cwclip_kernels.telemetry import ClipRecorder, read_run
        >>> model = torch.nn.Linear(2, 1)
        >>> clipper = ComponentClipper(model, max_norm=0.1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with ClipRecorder(f"{folder}/run") as recorder:
        ...         for _ in range(3):
        ...             model(torch.ones(1, 2)).sum().backward()
        ...             recorder.record(clipper.clip_())
        ...     run = read_run(f"{folder}/run.jsonl")
        >>> run.names, run.norms.shape, run.steps
        (('weight', 'bias'), torch.Size([3, 2]), [0, 1, 2])
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        every: int = 100,
        formats: Sequence[str] = ("jsonl",),
        writers: Any = None,
        live: bool | LiveLine = False,
    ) -> None:
        if isinstance(formats, str) or not formats or not set(formats) <= set(WRITERS):
            raise ValueError(f"formats: expected some of {', '.join(WRITERS)}, not {formats!r}")
        check_type(live, "live", bool | LiveLine, "a bool or a LiveLine")
        if path is None and not writers:
            raise TypeError("path: expected the path of files, or None beside writers=")
        self._path = None if path is None else Path(path)
        self._formats = tuple(dict.fromkeys(formats))
        self._live = LiveLine() if live is True else live or None
        self._names: tuple[str, ...] | None = None  # None until the first step
        self._step = 0
        self._buffer = _Buffer(checked_int(every, "every", 1))
        self._trackers = trackers(writers)
        self._closed = False

    def record(self, result: ClipResult, step: int | None = None) -> None:
        """Records one step; nothing waits for the device.

        Args:
            result: what ``ComponentClipper.clip_()`` returned.
            step: the step's number, of any integer type; by default one more than the last, from 0 or, in continued
                files, from the step after their last. Pass it after a restart from an older checkpoint: the last
                recording of a step counts.

        Raises:
            TypeError, ValueError: ``step`` isn't a whole number; the result has other components than before.
            RuntimeError: the recorder is closed.
            OSError: earlier steps could not be written. They are kept, and the next call tries again. A tracker's
                own errors do the same.
        """
        if self._closed:
            raise RuntimeError(f"this ClipRecorder{self._shown_path()} is closed")
        given = None if step is None else checked_int(step, "step")  # before files are made
        if self._names is None:
            self._open(result.names)
        elif result.names != self._names:
            raise ValueError("result: of other components than those recorded before; use another ClipRecorder")
        number = self._step if given is None else given
        self._step = number + 1
        if self._live is not None:
            self._live.record(result, number)
        self._buffer.put(number, result)

    def flush(self) -> None:
        """Writes all that has been recorded; waits for the device."""
        self._buffer.flush()

    def close(self) -> None:
        """Writes all that has been recorded and ends recording. Steps are also written when the program exits."""
        if self._live is not None:
            self._live.close()
        self.flush()
        self._closed = True
        for writer in self._buffer.writers:
            if isinstance(writer, TensorBoard):
                writer.events.close()

    def __getstate__(self) -> dict[str, Any]:
        if self._names is not None and not self._closed:
            raise TypeError(
                f"this ClipRecorder{self._shown_path()} has files open, which a copy would write to as well: "
                "copy or pickle it before the first step is recorded, or after close()"
            )
        return {**self.__dict__, "_buffer": _Buffer(self._buffer.every)}

    def __enter__(self) -> ClipRecorder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _shown_path(self) -> str:
        return "" if self._path is None else f" ({self._path})"

    def _open(self, names: tuple[str, ...]) -> None:
        path = self._path
        files = [] if path is None else [WRITERS[kind](path, names) for kind in self._formats]
        for writer in files:
            if isinstance(writer, TensorBoard) and all(other.next_step is None for other in files):
                writer.look()
        writers: list[Writer] = [*files, *self._trackers]
        for each in writers:  # when none has refused its file
            each.begin()
        self._names = names
        self._step = max(writer.next_step or 0 for writer in writers)
        self._buffer.writers = writers
        weakref.finalize(self, self._buffer.flush)  # at the end of the program, too


class _Buffer:
    """Steps on their way to the files: on the device, then copied to the host, then written."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.writers: list[Writer] = []
        self._rows: list[tuple[int, Tensor]] = []  # step; norms, caps and coefficients [3, K] on the device
        self._sent: tuple[Iterable[int], ToHost] | None = None  # steps, [S, 3, K]
        self._left: list[Writer] = []  # to which the steps that were sent have yet to be written

    @outside_autograd
    def put(self, step: int, result: ClipResult) -> None:
        # A copy: a later step may overwrite the result's tensors, as under CUDA graphs.
        self._rows.append((step, torch.stack((result.norms, result.caps.expand_as(result.norms), result.coefs))))
        if len(self._rows) >= self.every:
            self._send()
        self._write(wait=False)

    @outside_autograd
    def flush(self) -> None:
        if self._rows:
            self._send()
        self._write()

    def _send(self) -> None:
        """Starts the copy to the host, after what was sent before has been written."""
        self._write()
        steps, rows = zip(*self._rows, strict=True)
        device = rows[-1].device
        self._sent = steps, ToHost(torch.stack([row.to(device) for row in rows]))  # the model may have been moved
        self._left = list(self.writers)
        self._rows = []

    def _write(self, wait: bool = True) -> None:
        """Writes the steps that were sent, once they have arrived. Where that fails they are kept."""
        if self._sent is None or not (wait or self._sent[1].has_arrived()):
            return
        steps, values = self._sent
        rows = list(zip(steps, values.read().tolist(), strict=True))
        while self._left:
            self._left[0].write(rows)
            del self._left[0]
        self._sent = None
