"""An arm in numbers, and two arms' difference with what chance may do to it."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np

from .calibrate import median_of
from .runs import Run

RESAMPLES = 10_000
LEVEL = 0.95


def summary(runs: list[Run]) -> dict[str, Any]:
    """Of one arm's runs, at least one."""
    scores = [run["score"] for run in runs]
    failed = sum(run["failed"] for run in runs)
    reached = [run["steps_to_target"] for run in runs if run["steps_to_target"] is not None]
    good = [run["score"] for run in runs if not run["failed"]]
    return {
        "runs": len(runs),
        "mean": statistics.fmean(scores),
        "mean_of_good": statistics.fmean(good) if good else None,
        "std": statistics.stdev(scores) if len(scores) > 1 else None,
        "min": min(scores),
        "max": max(scores),
        "failed": failed,
        "failed_share": failed / len(runs),
        "failed_interval": wilson(failed, len(runs)),
        "one_answer": sum(run["one_answer"] for run in runs),
        "reached": len(reached),
        "steps_to_target": statistics.median(reached) if reached else None,
        "kept": median_of(runs, "kept"),
        "clip_rate": median_of(runs, "clip_rate"),
        "lr": runs[0]["lr"],
        "cap": runs[0]["cap"],
        "seconds": statistics.median(run["seconds"] for run in runs),
    }


def difference(runs: list[Run], others: list[Run], seed: int = 0) -> dict[str, Any] | None:
    """The first arm less the second, each with its bootstrap interval.

    In mean, std and share of failed runs; in steps to the target score, where a run that never gets there counts as
    long as it is; and in the mean score of seeds that failed in neither, if there are two or more.

    Seeds are drawn with replacement, and with a seed its run in both arms, whose head, order and dropout are the
    same. None where they share fewer than two seeds.
    """
    own, other = ({run["seed"]: run for run in side} for side in (runs, others))
    seeds = sorted(set(own) & set(other))
    if len(seeds) < 2:
        return None
    scores = np.array([[side[s]["score"] for s in seeds] for side in (own, other)])
    failed = np.array([[float(side[s]["failed"]) for s in seeds] for side in (own, other)])
    steps = np.array([[_steps(side[s]) for s in seeds] for side in (own, other)])
    good = 1 - failed.max(axis=0)
    drawn = np.random.default_rng(seed).integers(len(seeds), size=(RESAMPLES, len(seeds)))
    statistic = {
        "mean": lambda at: scores[:, at].mean(-1),
        "std": lambda at: scores[:, at].std(-1, ddof=1),
        "failed_share": lambda at: failed[:, at].mean(-1),
        "steps": lambda at: steps[:, at].mean(-1),
    }
    if good.sum() >= 2:
        # Draws without a good seed have no mean; there are next to none of them.
        statistic["mean_of_good"] = lambda at: (scores[:, at] * good[at]).sum(-1) / np.maximum(good[at].sum(-1), 1e-9)
    found: dict[str, Any] = {"runs": len(seeds)}
    for name, of in statistic.items():
        here = of(np.arange(len(seeds)))
        resampled = of(drawn)
        low, high = np.quantile(resampled[0] - resampled[1], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        found[name] = {"difference": float(here[0] - here[1]), "low": float(low), "high": float(high)}
    return found


def _steps(run: Run) -> float:
    reached = run["steps_to_target"]
    return float(len(run["kept"]) if reached is None else reached)


def wilson(hits: int, count: int) -> list[float]:
    """The 95 % interval of a share, that is sensible also at 0 of 20."""
    z = 1.959964
    share, extra = hits / count, z * z / count
    half = z * math.sqrt(share * (1 - share) / count + extra / (4 * count))
    low, high = ((share + extra / 2 + side * half) / (1 + extra) for side in (-1, 1))
    return [max(0.0, low), min(1.0, high)]
