"""The files that a recorder writes. Whole lines only, so that a run that is killed leaves a file that can be read."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol

FORMAT = "cwclip_kernels.run"
VERSION = 1
_RATE = "clip/rate"  # an event of every step
CSV_COLUMNS = ("step", "component", "norm", "cap", "coef", "clipped", "nonfinite")


@dataclass(frozen=True)
class Row:
    """One step on the host.

    Attributes:
        step: its number.
        norms: of the K components, before clipping.
        caps: theirs.
        coefs: what they were multiplied by.
    """

    step: int
    norms: list[float]
    caps: list[float]
    coefs: list[float]


class Writer(Protocol):
    """One kind of file. Making one looks at a file that exists, and changes nothing.

    Attributes:
        next_step: the number that follows the last step in the file; None where there is no step, or nobody looked.
    """

    next_step: int | None

    def begin(self) -> None:
        """Makes the file, or prepares one that exists for more steps."""

    def write(self, rows: Sequence[Row]) -> None:
        """Appends steps, so that they are on disk when it returns."""

    def close(self) -> None:
        """Ends it."""


class JsonLines:
    """A header, then one line a step. NaN and infinities are strings, which every JSON parser reads.

    Args:
        path: the file; one that exists is continued.
        names: the K component names.

    Raises:
        ValueError: the file is another kind of file, or of other components.
    """

    def __init__(self, path: Path, names: tuple[str, ...]) -> None:
        self._path = path
        self._header = json.dumps({"format": FORMAT, "version": VERSION, "components": list(names)}) + "\n"
        self.next_step: int | None = None
        self._is_new = _is_new(path, self._header)
        if self._is_new:
            return
        with path.open(encoding="utf-8") as file:
            found = _parsed(file.readline())
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(f"path: {path} exists and is no run of cwclip_kernels; choose another name")
        if tuple(found["components"]) != names:
            raise ValueError(f"path: {path} exists and holds a run of other components; choose another name")
        last, is_header = _last_line(path)
        if not is_header:
            row = _parsed(last)
            self.next_step = _step_of(row.get("step") if isinstance(row, dict) else None, path) + 1

    def begin(self) -> None:
        """See ``Writer``."""
        _begin(self._path, self._header if self._is_new else None)

    def write(self, rows: Sequence[Row]) -> None:
        """See ``Writer``."""
        lines = []
        for row in rows:
            caps: Any = [_number(c) for c in row.caps]
            if len(set(map(str, caps))) == 1:
                caps = caps[0]
            content = {
                "step": row.step,
                "norms": [_number(n) for n in row.norms],
                "caps": caps,
                "coefs": [_number(c) for c in row.coefs],
            }
            lines.append(json.dumps(content) + "\n")
        _append(self._path, "".join(lines))

    def close(self) -> None:
        """See ``Writer``."""


class Csv:
    """One line for each step and component; arguments and errors as for ``JsonLines``."""

    def __init__(self, path: Path, names: tuple[str, ...]) -> None:
        self._path = path
        self._names = names
        self._header = ",".join(CSV_COLUMNS) + "\n"
        self.next_step: int | None = None
        self._is_new = _is_new(path, self._header)
        if self._is_new:
            return
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.reader(file)
            if tuple(next(rows, ())) != CSV_COLUMNS:
                raise ValueError(f"path: {path} exists and is no run of cwclip_kernels; choose another name")
            # One row more than a step has, which begins the next: or else there are more components.
            first = [row[1] for row in islice(rows, len(names) + 1) if len(row) == len(CSV_COLUMNS)]
        if tuple(first) != (*names, *names[:1])[: len(first)]:
            raise ValueError(f"path: {path} exists and holds a run of other components; choose another name")
        last, is_header = _last_line(path)
        if not is_header:
            row = next(csv.reader([last]), [])
            is_whole = row[1:2] == [names[-1]]
            # A step of which some rows are missing comes again.
            self.next_step = _step_of(row[0] if row else None, path) + is_whole

    def begin(self) -> None:
        """See ``Writer``."""
        _begin(self._path, self._header if self._is_new else None)

    def write(self, rows: Sequence[Row]) -> None:
        """See ``Writer``."""
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        for row in rows:
            for name, norm, cap, coef in zip(self._names, row.norms, row.caps, row.coefs, strict=True):
                lines.writerow((row.step, name, norm, cap, coef, int(coef != 1), int(not math.isfinite(norm))))
        _append(self._path, text.getvalue())

    def close(self) -> None:
        """See ``Writer``."""


class TensorBoard:
    """Clip rate, non-finite components, median and largest norm, and a histogram of norms.

    Args:
        path: folder of the event files.
        names: unused; the histogram shows all components together.

    Raises:
        RuntimeError: TensorBoard isn't installed.
    """

    def __init__(self, path: Path, names: tuple[str, ...]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise RuntimeError(
                f"formats: 'tensorboard' needs TensorBoard ({error}): pip install tensorboard"
            ) from None
        self._make = SummaryWriter
        self._path = path
        self._events: Any = None
        self.next_step: int | None = None

    def look(self) -> None:
        """Finds ``next_step`` in the event files, which are read whole: for where no other file tells it."""
        files = sorted(self._path.glob("events.out.tfevents.*"))
        if not files:
            return
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

        for file in files:
            # The last step of the file that was begun last, so that a step that was gone back to counts.
            for event in EventFileLoader(str(file)).Load():
                if any(value.tag == _RATE for value in event.summary.value):
                    self.next_step = event.step + 1

    def begin(self) -> None:
        """See ``Writer``."""
        self._events = self._make(str(self._path))

    def write(self, rows: Sequence[Row]) -> None:
        """See ``Writer``."""
        for row in rows:
            finite = sorted(n for n in row.norms if math.isfinite(n))
            count = max(1, len(row.norms))
            self._events.add_scalar(_RATE, sum(c != 1 for c in row.coefs) / count, row.step)
            self._events.add_scalar("clip/nonfinite", len(row.norms) - len(finite), row.step)
            if finite:
                self._events.add_scalar("clip/median_norm", finite[len(finite) // 2], row.step)
                self._events.add_scalar("clip/max_norm", finite[-1], row.step)
        if rows and finite:
            import torch

            self._events.add_histogram("clip/norms", torch.tensor(finite), rows[-1].step)
        self._events.flush()

    def close(self) -> None:
        """See ``Writer``."""
        if self._events is not None:
            self._events.close()


WRITERS: dict[str, Callable[[Path, tuple[str, ...]], Writer]] = {
    "jsonl": JsonLines,
    "csv": Csv,
    "tensorboard": TensorBoard,
}


def _number(value: float) -> float | str:
    """As JSON: its only way to write NaN and infinities is as strings."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _parsed(line: str) -> object:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _step_of(value: object, path: Path) -> int:
    try:
        return int(value)  # type: ignore[call-overload, no-any-return]
    except (TypeError, ValueError):
        raise ValueError(f"path: the last line of {path} is not a step of a run; choose another name") from None


def _is_new(path: Path, header: str) -> bool:
    """Whether there is nothing in the file yet, or a header that a killed run left unfinished."""
    if not path.exists():
        return True
    with path.open("rb") as file:
        start = file.read(len(header.encode()))
    return len(start) < len(header.encode()) and header.encode().startswith(start)


def _begin(path: Path, header: str | None) -> None:
    """Makes the file, with its header; of one that is continued, without one, cuts off an unfinished last line."""
    if header is None:
        with path.open("rb+") as file:
            file.truncate(_end_of_lines(file))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    _append(path, header)


def _append(path: Path, text: str) -> None:
    """All of the text, or nothing: a disk that is full would leave half a line for the next try to go on from."""
    data = memoryview(text.encode())
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(end)
            raise


def _last_line(path: Path) -> tuple[str, bool]:
    """The last line that is whole, and whether it is the first."""
    with path.open("rb") as file:
        end = _end_of_lines(file)
        start = _end_of_lines(file, end - 1)
        file.seek(start)
        return file.read(end - start).decode(), start == 0


def _end_of_lines(file: BinaryIO, before: int | None = None) -> int:
    """Where the last line break ends, of those before a place; 0 if there is none."""
    end = file.seek(0, os.SEEK_END) if before is None else before
    while end > 0:
        start = max(0, end - (1 << 16))
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
