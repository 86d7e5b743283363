"""``read_run``: recorded runs as tensors."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .writers import CSV_COLUMNS, FORMAT

_Steps = dict[int, dict[str, tuple[float, float, float]]]  # step -> component -> norm, cap, coefficient


@dataclass(frozen=True)
class Run:
    """What clipping found and did over S steps.

    Attributes:
        names: the K components.
        steps: the S steps' numbers.
        norms: float64 [S, K], before clipping.
        caps: float64 [S, K]; NaN where the file has none (the paper's status files).
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
    """Reads a file of ``ClipRecorder`` (.jsonl or .csv), or a folder of the paper's ``status_*.json`` files.

    The last recording of a step counts. An unfinished last line is ignored.

    Raises:
        FileNotFoundError: there is no such file, or no status file in the folder.
        ValueError: the file is none of these; with its name and line.
    """
    path = Path(path)
    if path.is_dir():
        names, steps = _read_status_files(path)
    elif not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{path}: not a recorded run, but some binary file") from None
        lines = text[: text.rfind("\n") + 1].splitlines()
        names, steps = (_read_csv if path.suffix == ".csv" else _read_json_lines)(path, lines)
    no_gradient = (0.0, math.nan, 1.0)
    rows = [[own.get(name, no_gradient) for name in names] for _, own in sorted(steps.items())]
    values = torch.tensor(rows, dtype=torch.float64, device="cpu").reshape(len(steps), len(names), 3)
    return Run(names, sorted(steps), *values.movedim(2, 0).contiguous())


def _read_json_lines(path: Path, lines: list[str]) -> tuple[tuple[str, ...], _Steps]:
    steps: _Steps = {}
    names: tuple[str, ...] = ()
    for number, line in enumerate(lines or [""], start=1):
        try:
            row = json.loads(line)
            if number == 1:
                if row["format"] != FORMAT:
                    raise ValueError(row["format"])
                names = tuple(row["components"])
                continue
            caps = row["caps"] if isinstance(row["caps"], list) else [row["caps"]] * len(names)
            columns = [map(float, values) for values in (row["norms"], caps, row["coefs"])]
            steps[int(row["step"])] = dict(zip(names, zip(*columns, strict=True), strict=True))
        except (LookupError, TypeError, ValueError) as error:
            what = "the header" if number == 1 else "a step"
            raise ValueError(f"{path}, line {number}: not {what} of a run ({error!r})") from None
    return names, steps


def _read_csv(path: Path, lines: list[str]) -> tuple[tuple[str, ...], _Steps]:
    takes: dict[int, list[dict[str, tuple[float, float, float]]]] = {}  # of each step, as often as it was recorded
    rows = csv.reader(lines)
    if tuple(next(rows, ())) != CSV_COLUMNS:
        raise ValueError(f"{path}, line 1: expected the columns {', '.join(CSV_COLUMNS)}")
    for number, row in enumerate(rows, start=2):
        try:
            step, name, norm, cap, coef, _, _ = row
            own = takes.setdefault(int(step), [{}])
            if name in own[-1]:
                own.append({})
            own[-1][name] = float(norm), float(cap), float(coef)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not a step of a run ({error})") from None
    names = _names(take for own in takes.values() for take in own)
    whole = {step: [take for take in own if len(take) == len(names)] for step, own in takes.items()}
    return names, {step: own[-1] for step, own in whole.items() if own}


def _read_status_files(folder: Path) -> tuple[tuple[str, ...], _Steps]:
    files = [*folder.glob("status_*.json"), *folder.glob("gradClipMemoryJsons/status_*.json")]
    if not files:
        has_events = any(folder.glob("events.out.tfevents.*"))
        hint = "; TensorBoard's files have no norms of components: record as jsonl or csv, too" if has_events else ""
        raise FileNotFoundError(f"{folder}: holds no status_*.json{hint}")
    steps: _Steps = {}
    for file in files:
        try:
            status = json.loads(file.read_text(encoding="utf-8"))
            own = steps.setdefault(int(status.pop("step")), {})
            for name, entry in status.items():
                norm = float(entry["previous_grad_norm"])
                coef = float(entry["current_grad_norm"]) / (norm or math.inf) if entry["clipped_num"] else 1.0
                own[name] = norm, math.nan, coef
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: not a status file ({error!r})") from None
    return _names(steps.values()), steps


def _names(steps: Iterable[Mapping[str, object]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for own in steps for name in own))
