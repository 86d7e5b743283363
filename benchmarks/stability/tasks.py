"""What a run learns, how it is scored, and when it counts as failed."""

from __future__ import annotations

import hashlib
import json
import platform
from collections import Counter
from dataclasses import dataclass
from typing import Any

import docstrings

from . import hub, names
from .metrics import METRICS
from .problem import Problem
from .settings import Settings

Row = tuple[tuple[str, ...], int]

OFFLINE = ("names", "docstrings")
TASKS = (*OFFLINE, *hub.FORMS)

# Hyper-parameters where the command line gives none: those of the scouting, of the demo, of the paper.
_PAPER = {"epochs": 3, "batch_size": 16, "max_length": 128, "lr": 2e-5}
DEFAULTS: dict[str, dict[str, Any]] = {
    "names": {"epochs": 3, "batch_size": 16, "max_length": 24, "lr": 5e-5, "target": 0.6},
    "docstrings": {"epochs": 3, "batch_size": 16, "max_length": 40, "lr": 2e-4, "target": 0.6},
    "rte": {**_PAPER, "target": 0.65},
    "cola": {**_PAPER, "target": 0.5},
    "mrpc": {**_PAPER, "target": 0.85},
    "qnli": {**_PAPER, "target": 0.85},
}


@dataclass(frozen=True)
class Task:
    """Data and its rule.

    Attributes:
        about: a line for the report.
        train, dev: texts (one or two) and label of each example.
        classes: how many labels there are.
        metric: a name of `METRICS`.
        cutoff: a run whose score is not above this has failed.
        source: where the data is from, and its version.
    """

    name: str
    about: str
    train: list[Row]
    dev: list[Row]
    classes: int
    metric: str
    cutoff: float
    source: str

    @property
    def majority(self) -> float:
        """The score of always saying the commonest label of the training set."""
        [(label, _)] = Counter(label for _, label in self.train).most_common(1)
        return self.score([label] * len(self.dev))

    @property
    def fingerprint(self) -> str:
        """Changes whenever a text, a label or their order does."""
        return hashlib.sha256(json.dumps([self.train, self.dev]).encode()).hexdigest()[:16]

    def score(self, guesses: list[int]) -> float:
        """Of guesses for `dev`, in its order."""
        return METRICS[self.metric]([label for _, label in self.dev], guesses)


def load(settings: Settings) -> Task:
    """The task that the settings name.

    Raises:
        Problem: there is none of this name, or its data can't be had.
    """
    if settings.task not in TASKS:
        raise Problem(f"--task {settings.task!r}: no such task; there are {', '.join(TASKS)}")
    if settings.data is not None and settings.task in OFFLINE:
        raise Problem(f"--data is for {', '.join(hub.FORMS)}; --task {settings.task} makes its data itself")
    if settings.task in hub.FORMS:
        form = hub.FORMS[settings.task]
        train, dev, source = hub.load(settings.task, settings.data)
        about = f"GLUE's {settings.task.upper()}"
        return _checked(Task(settings.task, about, train[: settings.limit], dev, 2, form.metric, form.cutoff, source))
    source = f"the standard library of Python {platform.python_version()}"
    if settings.task == "names":
        train, dev = names.build(names.collect())
        about, classes = "does this standard-library name belong to this docstring summary?", 2
    else:
        sides = docstrings.split(docstrings.collect(), seed=0)
        train, dev = ([((example.text,), example.label) for example in side] for side in sides)
        about, classes = "from which part of the standard library is this docstring?", len(docstrings.FAMILIES)
    train = train[: settings.limit]
    task = Task(settings.task, about, train, dev, classes, "accuracy", 0.0, source)
    # Not beating the commonest class, whichever of dev's own or train's that scores higher.
    commonest = max(Counter(label for _, label in dev).values()) / len(dev)
    return _checked(
        Task(settings.task, about, train, dev, classes, "accuracy", max(task.majority, commonest), source)
    )


def _checked(task: Task) -> Task:
    if not task.train or not task.dev:
        raise Problem(f"--task {task.name}: no examples to {'train on' if not task.train else 'judge by'}")
    return task
