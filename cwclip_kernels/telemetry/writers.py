"""The files that a recorder writes: JSON lines, CSV, TensorBoard events.

Text files grow by whole lines, so a killed run leaves a readable file. A constructor only looks at an existing file;
``begin`` is the first to change it.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import islice
from mmap import ACCESS_READ, mmap
from pathlib import Path

from .trackers import RATE, EventWriter, Row, Tracker

FORMAT = "cwclip_kernels.run"
CSV_COLUMNS = ("step", "component", "norm", "cap", "coef", "clipped", "nonfinite")
_JSON_NAMES = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


class _TextFile(ABC):
    """A file of a header and whole lines. An existing file of the same components is continued."""

    next_step: int | None = None  # after the last step in the file

    def __init__(self, path: Path, header: str) -> None:
        self._path = path
        self._header = header.encode()
        self._end = 0  # where the last whole line of an existing file ends
        start = b""
        if path.exists():
            with path.open("rb") as file:
                start = file.read(len(self._header))
        if start == self._header:
            self._look()
        elif not self._header.startswith(start):  # neither empty nor cut off when a run was killed
            what = "holds a run of other components" if FORMAT.encode() in start else "is no run of cwclip_kernels"
            raise ValueError(f"path: {path} exists and {what}; choose another name")

    def _look(self) -> None:
        with self._path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as text:
            self._end = text.rfind(b"\n") + 1
            last = text[text.rfind(b"\n", 0, self._end - 1) + 1 : self._end]
        try:
            self.next_step = None if last == self._header else self._step_after(last.decode())
        except (LookupError, TypeError, ValueError):
            raise ValueError(f"path: the last line of {self._path} is not a step; choose another name") from None

    @abstractmethod
    def _step_after(self, line: str) -> int: ...

    @abstractmethod
    def _text(self, rows: Sequence[Row]) -> str: ...

    def begin(self) -> None:
        """Creates the file, or cuts an unfinished last line off an existing one."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            file.truncate(self._end)
        if self._end == 0:
            _append(self._path, self._header)

    def write(self, rows: Sequence[Row]) -> None:
        """Appends steps; they are on disk when it returns."""
        _append(self._path, self._text(rows).encode())


class JsonLines(_TextFile):
    """One line a step. NaN and infinities are strings, which every JSON parser reads."""

    def __init__(self, path: Path, names: tuple[str, ...]) -> None:
        header = {"format": FORMAT, "version": 1, "components": names}
        super().__init__(Path(f"{path}.jsonl"), json.dumps(header) + "\n")

    def _step_after(self, line: str) -> int:
        return int(json.loads(line)["step"]) + 1

    def _text(self, rows: Sequence[Row]) -> str:
        lines = []
        for step, columns in rows:
            norms, caps, coefs = ([v if math.isfinite(v) else _JSON_NAMES[str(v)] for v in own] for own in columns)
            content = {"step": step, "norms": norms, "caps": caps[0] if len(set(caps)) == 1 else caps, "coefs": coefs}
            lines.append(json.dumps(content) + "\n")
        return "".join(lines)


class Csv(_TextFile):
    """One line for each step and component."""

    def __init__(self, path: Path, names: tuple[str, ...]) -> None:
        self._names = names
        path = Path(f"{path}.csv")
        super().__init__(path, ",".join(CSV_COLUMNS) + "\n")
        if self.next_step is not None:
            with path.open(encoding="utf-8", newline="") as file:
                # One row more than a step has must begin the next step, unless the file has more components.
                rows = islice(csv.reader(file), 1, len(names) + 2)
                first = tuple(row[1] for row in rows if len(row) == len(CSV_COLUMNS))
            if first != (*names, *names[:1])[: len(first)]:
                raise ValueError(f"path: {path} exists and holds a run of other components; choose another name")

    def _step_after(self, line: str) -> int:
        step, name, *_ = next(csv.reader([line]))
        return int(step) + (name == self._names[-1])  # a step with rows missing is recorded again

    def _text(self, rows: Sequence[Row]) -> str:
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        for step, columns in rows:
            for name, norm, cap, coef in zip(self._names, *columns, strict=True):
                lines.writerow((step, name, norm, cap, coef, int(coef != 1), int(not math.isfinite(norm))))
        return text.getvalue()


class TensorBoard(EventWriter):
    """Event files in the folder ``path``: clip rate, non-finite norms, median and largest norm, a histogram."""

    def __init__(self, path: Path, names: tuple[str, ...]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise RuntimeError(f"formats: TensorBoard is missing ({error}): pip install tensorboard") from None
        super().__init__(None)
        self._make = SummaryWriter
        self._path = path

    def look(self) -> None:
        """Finds ``next_step`` by reading all event files: slow, so only where no other file tells it."""
        files = sorted(self._path.glob("events.out.tfevents.*"))
        if not files:
            return
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

        for file in files:
            # The last step in the newest file, so that a return to an earlier step counts.
            for event in EventFileLoader(str(file)).Load():
                if any(value.tag == RATE for value in event.summary.value):
                    self.next_step = event.step + 1

    def begin(self) -> None:
        """Starts a new event file."""
        self.events = self._make(str(self._path))


FileWriter = JsonLines | Csv | TensorBoard
Writer = FileWriter | Tracker
WRITERS: dict[str, type[FileWriter]] = {"jsonl": JsonLines, "csv": Csv, "tensorboard": TensorBoard}


def _append(path: Path, text: bytes) -> None:
    """Appends all of the text or nothing: half a line left by a full disk would spoil the next attempt."""
    end = path.stat().st_size
    try:
        with path.open("ab") as file:
            file.write(text)
    except OSError:
        os.truncate(path, end)
        raise
