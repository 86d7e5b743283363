"""Where in the model the gradients of failed runs differ from those of good ones, and where a cap holds them back.

Norms are of gradients before clipping. A part of the model is a set of components; its norm is that of them together.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .runs import Run

HEADS = ("classifier", "pooler", "score", "pre_classifier")
HUGE = 1e100  # whose square is finite


def place(name: str) -> tuple[int | None, str]:
    """A component's layer, and its name there: "layer.3.output.dense.bias" is (3, "output.dense.bias").

    Outside of layers it is None, and the whole name.
    """
    parts = name.split(".")
    at = next((at for at in reversed(range(len(parts))) if parts[at].isdigit()), None)
    return (None, name) if at is None else (int(parts[at]), ".".join(parts[at + 1 :]))


def by_depth(names: list[str]) -> dict[str, list[int]]:
    """Embeddings, every layer, head, and what is none of these -> their components, in that order."""
    layered: dict[int, list[int]] = {}
    parts: dict[str, list[int]] = {"embeddings": [], "head": [], "others": []}
    for i, name in enumerate(names):
        layer, _ = place(name)
        if layer is not None:
            layered.setdefault(layer, []).append(i)
        elif any(part in HEADS for part in name.split(".")):
            parts["head"].append(i)
        else:
            parts["embeddings" if "embed" in name else "others"].append(i)
    found = {"embeddings": parts["embeddings"]}
    found |= {f"layer {layer}": layered[layer] for layer in sorted(layered)}
    found |= {"head": parts["head"], "others": parts["others"]}
    return {part: members for part, members in found.items() if members}


def by_type(names: list[str]) -> dict[str, list[int]]:
    """Name within a layer -> its components in all layers; what has no layer is left out."""
    found: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        layer, kind = place(name)
        if layer is not None:
            found.setdefault(kind, []).append(i)
    return found


def compare(runs: list[Run], capped: dict[str, list[Run]]) -> dict[str, list[dict[str, Any]]]:
    """One row for each part of the model, by depth and by type.

    Args:
        runs: the baseline's, failed and good.
        capped: label -> runs of an arm with one cap for all components.

    Returns:
        "depth" and "type" -> rows: `part`; `early` and `late`, each with the median norm of `failed` and of `good`
        runs in the first and the last third of the steps (None where there is no such run); `kept`, label -> the
        part's norm after clipping over that before, the median run's median step.
    """
    names = runs[0]["components"]
    return {
        "depth": [_row(part, members, runs, capped) for part, members in by_depth(names).items()],
        "type": [_row(part, members, runs, capped) for part, members in by_type(names).items()],
    }


def _row(part: str, members: list[int], runs: list[Run], capped: dict[str, list[Run]]) -> dict[str, Any]:
    thirds = {}
    for when, start in (("early", 0.0), ("late", 2 / 3)):
        thirds[when] = {
            word: _median([_third(run, members, start) for run in runs if run["failed"] == failed])
            for word, failed in (("failed", True), ("good", False))
        }
    kept = {label: _median([_kept(run, members) for run in own]) for label, own in capped.items()}
    return {"part": part, "components": len(members), **thirds, "kept": kept}


def _third(run: Run, members: list[int], start: float) -> np.ndarray:
    """The part's norm, in a third of the steps."""
    norms = _norms(run, members)
    first = round(start * len(norms))
    return np.linalg.norm(norms[first : first + math.ceil(len(norms) / 3)], axis=1)


def _kept(run: Run, members: list[int]) -> np.ndarray:
    norms = _norms(run, members)
    before, after = np.linalg.norm(norms, axis=1), np.linalg.norm(np.minimum(norms, run["cap"]), axis=1)
    return after[before > 0] / before[before > 0]


def _norms(run: Run, members: list[int]) -> np.ndarray:
    """Of the part's components, [S, k]; what wasn't finite (null in the file) counts as very large."""
    norms = np.array(run["norms"], dtype=float)[:, members]
    return np.where(np.isnan(norms), HUGE, norms)


def _median(values: list[np.ndarray]) -> float | None:
    """The median run's median step."""
    medians = [float(np.median(steps)) for steps in values if len(steps)]
    return float(np.median(medians)) if medians else None
