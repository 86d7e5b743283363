"""The files that a recorder writes. Whole lines only, so that a run that is killed leaves a file that can be read."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

FORMAT = "cwclip_kernels.run"
VERSION = 1
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
    """One kind of file."""

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
        if _is_new(path):
            self._append(json.dumps({"format": FORMAT, "version": VERSION, "components": list(names)}) + "\n")
            return
        with path.open(encoding="utf-8") as file:
            found = _parsed(file.readline())
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(f"path: {path} exists and is no run of cwclip_kernels; choose another name")
        if tuple(found["components"]) != names:
            raise ValueError(f"path: {path} exists and holds a run of other components; choose another name")
        _end_last_line(path)

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
        self._append("".join(lines))

    def close(self) -> None:
        """See ``Writer``."""

    def _append(self, text: str) -> None:
        _append(self._path, text)


class Csv:
    """One line for each step and component; arguments and errors as for ``JsonLines``."""

    def __init__(self, path: Path, names: tuple[str, ...]) -> None:
        self._path = path
        self._names = names
        if _is_new(path):
            _append(path, ",".join(CSV_COLUMNS) + "\n")
            return
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.reader(file)
            if tuple(next(rows, ())) != CSV_COLUMNS:
                raise ValueError(f"path: {path} exists and is no run of cwclip_kernels; choose another name")
            first = [row[1] for row, _ in zip(rows, names, strict=False) if len(row) == len(CSV_COLUMNS)]
        if tuple(first) != names[: len(first)]:
            raise ValueError(f"path: {path} exists and holds a run of other components; choose another name")
        _end_last_line(path)

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
        self._events: Any = SummaryWriter(str(path))

    def write(self, rows: Sequence[Row]) -> None:
        """See ``Writer``."""
        for row in rows:
            finite = sorted(n for n in row.norms if math.isfinite(n))
            count = max(1, len(row.norms))
            self._events.add_scalar("clip/rate", sum(c != 1 for c in row.coefs) / count, row.step)
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


def _is_new(path: Path) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    return not path.exists() or path.stat().st_size == 0


def _append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8", newline="") as file:
        file.write(text)


def _end_last_line(path: Path) -> None:
    """Cuts off a line that a killed run left unfinished."""
    with path.open("rb+") as file:
        file.seek(0, os.SEEK_END)
        end = file.tell()
        size = min(end, 1 << 24)
        file.seek(end - size)
        tail = file.read(size)
        file.truncate(end - size + tail.rfind(b"\n") + 1)
