"""Trackers that the caller has opened (TensorBoard, W&B, MLflow): recognized by their methods, never imported."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, TypeAlias

import torch

from ..arguments import type_name

Row: TypeAlias = "tuple[int, Sequence[list[float]]]"  # a step's number; its norms, caps and coefficients
RATE = "clip/rate"  # the tag that every step has
_STEP = "clip/step"
_EXPECTED = (
    "writers: expected an open SummaryWriter, a W&B run, an MLflow run, something with log_metrics(dict, step=) or a "
    "function of a dict and a step, or several of these in a list"
)
_MLFLOW_BATCH = 1000  # metrics in a request


class EventWriter:
    """TensorBoard's ``SummaryWriter``: numbers of each step, and a histogram of the norms of the last."""

    next_step: int | None = None

    def __init__(self, events: Any) -> None:
        self.events = events

    def begin(self) -> None:
        """Nothing to do."""

    def write(self, rows: Sequence[Row]) -> None:
        """Appends steps, and the histogram of the last of them."""
        for step, row in rows:
            for tag, value in numbers_of(row).items():
                self.events.add_scalar(tag, value, step)
        step, (norms, *_) = rows[-1]
        finite = [norm for norm in norms if norm != 0 and math.isfinite(norm)]
        if finite:
            self.events.add_histogram("clip/norms", torch.tensor(finite), step)
        self.events.flush()


class CallWriter:
    """Anything that is called with a step's numbers and its number."""

    next_step: int | None = None

    def __init__(self, log: Callable[[dict[str, float], int], object]) -> None:
        self._log = log
        self._taken = 0  # of steps that an error broke off, and that come once more: those that were taken

    def begin(self) -> None:
        """Nothing to do."""

    def write(self, rows: Sequence[Row]) -> None:
        """Hands over the steps, one after the other, each once."""
        for step, row in rows[self._taken :]:
            self._log(numbers_of(row), step)
            self._taken += 1
        self._taken = 0


class WandbWriter(CallWriter):
    """A W&B run. Steps arrive later than the caller's own, which W&B would drop: ``clip/step`` is their axis."""

    def __init__(self, run: Any) -> None:
        run.define_metric(_STEP, hidden=True)
        run.define_metric("clip/*", step_metric=_STEP)
        super().__init__(lambda numbers, step: run.log({**numbers, _STEP: step}))


class MlflowWriter(CallWriter):
    """An MLflow run: as few requests as possible."""

    def __init__(self, run: Any) -> None:
        self._run_id = run.info.run_id

    def write(self, rows: Sequence[Row]) -> None:
        """Sends all steps."""
        mlflow: Any = sys.modules["mlflow"]  # where the run is from
        now, client = int(time.time() * 1000), mlflow.MlflowClient()
        metrics = [
            mlflow.entities.Metric(tag, value, now, step)
            for step, row in rows
            for tag, value in numbers_of(row).items()
        ]
        for start in range(0, len(metrics), _MLFLOW_BATCH):
            client.log_batch(self._run_id, metrics=metrics[start : start + _MLFLOW_BATCH])


Tracker: TypeAlias = EventWriter | CallWriter


def trackers(writers: Any) -> list[Tracker]:
    """The writers for what a caller has opened, one or several; TypeError for what isn't a tracker."""
    if writers is None:
        return []
    several = writers if isinstance(writers, list | tuple) else [writers]
    return [_tracker(writer) for writer in several]


def _tracker(writer: Any) -> Tracker:
    if isinstance(writer, type):
        raise TypeError(f"{_EXPECTED}; not the class {writer.__qualname__}: open one first")
    if _has(writer, "add_scalar", "add_histogram", "flush"):
        return EventWriter(writer)
    if _has(writer, "log", "define_metric"):
        return WandbWriter(writer)
    if _has(writer, "log_metrics"):
        return CallWriter(lambda numbers, step: writer.log_metrics(numbers, step=step))
    if hasattr(getattr(writer, "info", None), "run_id") and "mlflow" in sys.modules:
        return MlflowWriter(writer)
    if _has(writer, "log_batch", "log_metric"):
        raise TypeError(f"{_EXPECTED}; not {type_name(writer)}, which has no run of its own: pass the MLflow run")
    if callable(writer) and not isinstance(writer, Mapping):
        return CallWriter(writer)
    raise TypeError(f"{_EXPECTED}; not {type_name(writer)}")


def _has(writer: object, *methods: str) -> bool:
    return all(callable(getattr(writer, name, None)) for name in methods)


def numbers_of(row: Sequence[list[float]]) -> dict[str, float]:
    """What trackers get of a step: norm statistics, and the clip rate, of components with a gradient."""
    norms, _, coefs = row
    finite = [norm for norm in norms if norm != 0 and math.isfinite(norm)]
    clipped = [coef != 1 for norm, coef in zip(norms, coefs, strict=True) if norm != 0]
    numbers = {
        RATE: sum(clipped) / max(1, len(clipped)),
        "clip/nonfinite": sum(not math.isfinite(norm) for norm in norms),
    }
    if finite:
        numbers |= {"clip/median_norm": median(finite), "clip/max_norm": max(finite)}
    return numbers
