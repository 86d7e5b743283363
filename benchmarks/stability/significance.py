"""The tests of a component cap against its global control, paired by seed, and what they could have found.

failures    McNemar's exact test: of the seeds where one arm alone failed, is either arm's share more than chance?
scores      the sign-flip permutation test of the mean difference: under no effect either sign is as likely
Holm        keeps the chance of one false finding among all of an experiment's tests at `LEVEL`
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np

from .runs import Run

LEVEL = 0.05
POWER = 0.8
DRAWS = 100_000
OTHERS = 0.05  # share of seeds that go the other way, where power is reckoned


def of_pairs(pairs: dict[tuple[str, str], tuple[list[Run], list[Run]]]) -> list[dict[str, Any]]:
    """Both tests of each pair of arms, with p-values of their own and Holm's; one row a test."""
    rows = []
    for (label, control), (runs, others) in pairs.items():
        own, other = ({run["seed"]: run for run in side} for side in (runs, others))
        seeds = sorted(set(own) & set(other))
        if not seeds:
            continue
        failed = np.array([[side[s]["failed"] for s in seeds] for side in (own, other)])
        alone = [int((failed[0] & ~failed[1]).sum()), int((failed[1] & ~failed[0]).sum())]
        scores = np.array([own[s]["score"] - other[s]["score"] for s in seeds])
        about = {"arm": label, "control": control, "seeds": len(seeds)}
        rows += [
            {**about, "of": "failures", "p": mcnemar(*alone), "alone": alone},
            {**about, "of": "scores", "p": sign_flip(scores), "mean": float(scores.mean()), "std": _std(scores)},
        ]
    for row, corrected in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["holm"] = corrected
        # The first test that Holm's procedure looks at has the hardest level.
        row["detectable"] = detectable(row, LEVEL / len(rows))
    return rows


def mcnemar(first: int, second: int) -> float:
    """The two-sided p-value where `first` seeds failed in one arm alone, and `second` in the other alone."""
    pairs = first + second
    tail = sum(math.comb(pairs, k) for k in range(min(first, second) + 1)) / 2**pairs
    return min(1.0, 2 * tail)


def sign_flip(differences: np.ndarray, draws: int = DRAWS, seed: int = 0) -> float:
    """The two-sided p-value of their mean."""
    signs = np.random.default_rng(seed).integers(2, size=(draws, len(differences))) * 2 - 1
    sums = np.abs(signs @ differences)
    reached = np.abs(differences.sum()) - 1e-9  # sums of the same numbers in another order are no larger
    return float((1 + (sums >= reached).sum()) / (1 + draws))


def holm(values: list[float]) -> list[float]:
    """Holm's corrected p-values, in the given order."""
    order = sorted(range(len(values)), key=values.__getitem__)
    corrected, largest = [0.0] * len(values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[i]))
        corrected[i] = largest
    return corrected


def detectable(row: dict[str, Any], level: float) -> float | None:
    """The difference that this test would have found at this level, four times in five.

    Of failures in share of seeds, where `OTHERS` of the seeds go the other way; None where no difference would do. Of
    scores by the normal approximation, with the standard deviation that was found.
    """
    if row["of"] == "scores":
        normal = NormalDist()
        width = normal.inv_cdf(1 - level / 2) + normal.inv_cdf(POWER)
        return None if row["std"] is None else width * row["std"] / math.sqrt(row["seeds"])
    for share in np.arange(OTHERS, 1 - OTHERS, 0.005):
        if mcnemar_power(row["seeds"], float(share), OTHERS, level) >= POWER:
            return float(share) - OTHERS
    return None


def mcnemar_power(seeds: int, first: float, second: float, level: float) -> float:
    """The chance of a p-value of at most `level`, where these shares of seeds fail in one arm alone."""
    total = 0.0
    for pairs in range(seeds + 1):
        both = first + second
        chance = math.comb(seeds, pairs) * both**pairs * (1 - both) ** (seeds - pairs)
        for k in range(pairs + 1):
            if mcnemar(k, pairs - k) <= level:
                total += chance * math.comb(pairs, k) * (first / both) ** k * (second / both) ** (pairs - k)
    return total


def _std(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1)) if len(values) > 1 else None
