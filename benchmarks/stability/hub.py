"""GLUE tasks: from the Hugging Face hub, or from a folder with the same data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .problem import Problem

HUB = "nyu-mll/glue"
_INSTALL = 'pip install "cwclip_kernels[stability]"'


@dataclass(frozen=True)
class Form:
    """Columns that hold the texts, the metric, and the score that a run has to beat, as the paper's code has it."""

    columns: tuple[str, ...]
    metric: str
    cutoff: float


FORMS = {
    "rte": Form(("sentence1", "sentence2"), "accuracy", 0.53),
    "cola": Form(("sentence",), "MCC", 0.0),
    "mrpc": Form(("sentence1", "sentence2"), "F1", 0.75),
    "qnli": Form(("question", "sentence"), "accuracy", 0.50),
}

Row = tuple[tuple[str, ...], int]


def load(task: str, folder: str | None = None) -> tuple[list[Row], list[Row], str]:
    """(training rows, validation rows, where they are from).

    Args:
        task: one of `FORMS`.
        folder: what `DatasetDict.save_to_disk` wrote, or train.* and validation.* files that `datasets` reads
            (.jsonl, .csv, .parquet), with GLUE's columns; None: the hub.

    Raises:
        Problem: `datasets` is not installed, the hub can't be reached, the data is not in this form.
    """
    try:
        import datasets
    except ImportError as error:
        raise Problem(f"--task {task} needs the datasets package ({error}): {_INSTALL}") from None
    datasets.disable_progress_bars()
    try:
        if folder is None:
            source, found = f"{HUB}, {task}", datasets.load_dataset(HUB, task)
        else:
            source, found = folder, _from_folder(datasets, Path(folder))
    except Problem:
        raise
    except Exception as error:  # of the network, the hub, the reader's: they share no class
        where = f"--data {folder}" if folder else f"the hub ({HUB})"
        raise Problem(
            f"--task {task}: no data from {where}: {_first_line(error)}. Without a connection, --data takes a folder "
            "with the data, and --task names needs none"
        ) from None
    return _rows(task, found, "train"), _rows(task, found, "validation"), source


def _from_folder(datasets: Any, folder: Path) -> Any:
    if not folder.is_dir():
        raise Problem(f"--data {folder}: no such folder")
    if (folder / "dataset_dict.json").is_file():
        return datasets.load_from_disk(str(folder))
    kinds = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    files = {
        path.stem: path
        for path in sorted(folder.iterdir())
        if path.stem in ("train", "validation") and path.suffix in kinds
    }
    if len(files) < 2 or len({path.suffix for path in files.values()}) > 1:
        raise Problem(f"--data {folder}: expected train and validation files, as .jsonl, .csv or .parquet")
    kind = kinds[files["train"].suffix]
    return datasets.load_dataset(kind, data_files={side: str(path) for side, path in files.items()})


def _rows(task: str, found: Any, side: str) -> list[Row]:
    """Texts and labels of one side, each row checked: a test set's labels are all -1."""
    form = FORMS[task]
    if side not in found:
        raise Problem(f"--task {task}: the data has no {side!r} split, only {', '.join(map(repr, found))}")
    rows = found[side]
    missing = {*form.columns, "label"} - set(rows.column_names)
    if missing:
        raise Problem(f"--task {task}: the {side} split has no column {', '.join(map(repr, sorted(missing)))}")
    labels = rows["label"]
    if not set(labels) <= {0, 1} or not len(rows):
        raise Problem(f"--task {task}: labels of the {side} split are to be 0 and 1, not {sorted(set(labels))[:5]}")
    return [
        (tuple(texts), int(label)) for *texts, label in zip(*(rows[c] for c in form.columns), labels, strict=True)
    ]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__
