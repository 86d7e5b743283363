"""Recorded runs, read again."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .writers import CSV_COLUMNS, FORMAT


@dataclass(frozen=True)
class Run:
    """What clipping found and did over S steps.

    Attributes:
        names: the K components.
        steps: the S steps' numbers.
        norms: float64 [S, K], before clipping.
        caps: float64 [S, K]; NaN where the file doesn't say (the paper's status files).
        coefs: float64 [S, K], what gradients were multiplied by.
    """

    names: tuple[str, ...]
    steps: list[int]
    norms: Tensor
    caps: Tensor
    coefs: Tensor

    @property
    def nonfinite(self) -> Tensor:
        """Bool [S, K]: where a norm is inf or NaN."""
        return ~self.norms.isfinite()


def read_run(path: str | Path) -> Run:
    """Reads what ``ClipRecorder`` wrote (.jsonl or .csv), or a folder of the paper's ``status_*.json`` files.

    A step that was recorded twice, after a restart, counts as it was recorded last. An unfinished last line is left
    out.

    Raises:
        FileNotFoundError: there is no such file, or no status file in the folder.
        ValueError: a file that is none of these; with its name and line.
    """
    path = Path(path)
    if path.is_dir():
        return _read_status_files(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    return _read_csv(path) if path.suffix == ".csv" else _read_json_lines(path)


def _run(names: tuple[str, ...], rows: dict[int, tuple[list[float], list[float], list[float]]]) -> Run:
    steps = sorted(rows)
    norms, caps, coefs = (
        torch.tensor([rows[step][i] for step in steps], dtype=torch.float64, device="cpu").reshape(
            len(steps), len(names)
        )
        for i in range(3)
    )
    return Run(names, steps, norms, caps, coefs)


def _read_json_lines(path: Path) -> Run:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    header = _parse(path, 1, lines[0]) if lines else None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"{path}, line 1: not the header of a run of cwclip_kernels")
    names = tuple(header["components"])
    rows = {}
    for number, line in enumerate(lines[1:], start=2):
        if not line.endswith("\n"):
            break
        row = _parse(path, number, line)
        try:
            caps = row["caps"] if isinstance(row["caps"], list) else [row["caps"]] * len(names)
            values = tuple([float(v) for v in column] for column in (row["norms"], caps, row["coefs"]))
            if any(len(column) != len(names) for column in values):
                raise ValueError("not one value for each component")
            rows[int(row["step"])] = values
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: not a step of a run ({error})") from None
    return _run(names, rows)  # type: ignore[arg-type]  # three columns


def _parse(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}") from None


def _read_csv(path: Path) -> Run:
    names: dict[str, int] = {}
    steps: dict[int, dict[str, tuple[float, float, float]]] = {}
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    if text and not text.endswith("\n"):
        lines.pop()
    rows = csv.reader(lines)
    if tuple(next(rows, ())) != CSV_COLUMNS:
        raise ValueError(f"{path}, line 1: expected the columns {', '.join(CSV_COLUMNS)}")
    for number, row in enumerate(rows, start=2):
        try:
            step, name, norm, cap, coef, _, _ = row
            names.setdefault(name, len(names))
            steps.setdefault(int(step), {})[name] = float(norm), float(cap), float(coef)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not a step of a run ({error})") from None
    whole = {step: values for step, values in steps.items() if len(values) == len(names)}
    columns = {step: tuple([values[name][i] for name in names] for i in range(3)) for step, values in whole.items()}
    return _run(tuple(names), columns)  # type: ignore[arg-type]  # three columns


def _read_status_files(folder: Path) -> Run:
    files = [*folder.glob("status_*.json"), *folder.glob("gradClipMemoryJsons/status_*.json")]
    if not files:
        raise FileNotFoundError(f"{folder}: holds no status_*.json")
    names: dict[str, int] = {}
    found = []
    for file in files:
        status = _parse(file, 1, file.read_text(encoding="utf-8"))
        try:
            step = int(status.pop("step"))
            values = {name: (entry["previous_grad_norm"], _coef_of(entry)) for name, entry in status.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: not a status file ({error!r})") from None
        for name in values:
            names.setdefault(name, len(names))
        found.append((step, values))
    nan = float("nan")
    rows = {}
    for step, values in found:
        pairs = [values.get(name, (0.0, 1.0)) for name in names]  # no entry: it had no gradient
        rows[step] = [float(n) for n, _ in pairs], [nan] * len(names), [c for _, c in pairs]
    return _run(tuple(names), rows)


def _coef_of(entry: dict[str, Any]) -> float:
    if not entry["clipped_num"]:
        return 1.0
    before = float(entry["previous_grad_norm"])
    return float(entry["current_grad_norm"]) / before if before else 0.0
