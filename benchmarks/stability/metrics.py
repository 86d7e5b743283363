"""The scores of the tasks, from counts; the same as scikit-learn's functions of these names."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence


def accuracy(labels: Sequence[int], guesses: Sequence[int]) -> float:
    """The share that is right."""
    return sum(a == b for a, b in zip(labels, guesses, strict=True)) / len(labels)


def f1(labels: Sequence[int], guesses: Sequence[int]) -> float:
    """Of class 1: 2 tp / (2 tp + fp + fn), 0 where there is none."""
    tp, fp, fn, _ = _counts(labels, guesses)
    return 2 * tp / (2 * tp + fp + fn) if tp else 0.0


def matthews(labels: Sequence[int], guesses: Sequence[int]) -> float:
    """Correlation of two binary variables, 0 where one of them is constant."""
    tp, fp, fn, tn = _counts(labels, guesses)
    spread = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / math.sqrt(spread) if spread else 0.0


def _counts(labels: Sequence[int], guesses: Sequence[int]) -> tuple[int, int, int, int]:
    pairs = [(int(a), int(b)) for a, b in zip(labels, guesses, strict=True)]
    return pairs.count((1, 1)), pairs.count((0, 1)), pairs.count((1, 0)), pairs.count((0, 0))


METRICS: dict[str, Callable[[Sequence[int], Sequence[int]], float]] = {
    "accuracy": accuracy,
    "F1": f1,
    "MCC": matthews,
}
