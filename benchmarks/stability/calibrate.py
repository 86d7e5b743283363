"""What has to be known of an arm before it is judged, found on seeds that judge none.

matched:X   a global cap C under which the median step keeps the same share of the gradient as under component:X

    kept = |clipped g| / |g|, over all parameters;  under a global cap min(1, C / |g|), the median of which is
    C / median |g|:  so C = (median kept under component:X) * median |g|

            As |g| depends on how a run was clipped, C is tried, and corrected by the |g| found, up to three times.

stable      of a few lower learning rates the one with the fewest failed runs without clipping; of those the best mean
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .arms import Arm
from .runs import Run

ROUNDS = 3
CLOSE = 0.05  # relative error of the share that is good enough
NOT_TIGHT = 0.995  # a cap that keeps this much or more at the median step has nothing to match
STABLE_RATES = (0.6, 0.4, 0.2)  # of the experiment's learning rate

Make = Callable[[list[Arm]], dict[str, list[Run]]]


def choose(arms: list[Arm], lr: float, make: Make) -> tuple[list[Arm], dict[str, Any]]:
    """Settles every arm that leaves something open.

    Args:
        make: makes runs of arms with the calibration seeds, or finds them; label -> runs.

    Returns:
        The arms as they are to be judged, those without a counterpart left out; and what was found, for the report.
    """
    found: dict[str, Any] = {}
    found.update(_match([arm for arm in arms if arm.kind == "matched"], make))
    if any(arm.kind == "stable" for arm in arms):
        found.update(_stable(lr, [arm for arm in arms if arm.kind == "stable"], make))
    settled = []
    for arm in arms:
        choice = found.get(arm.label)
        if choice is None:
            settled.append(arm)
        elif arm.kind == "stable":
            settled.append(replace(arm, kind="none", lr=choice["lr"]))
        elif choice["cap"] is not None:
            settled.append(replace(arm, kind="global", cap=choice["cap"]))
    return settled, found


def _match(matched: list[Arm], make: Make) -> dict[str, Any]:
    if not matched:
        return {}
    # All arms together in each round, so that processes have enough to do.
    models = {arm.label: _tried(arm, "component", arm.cap) for arm in matched}
    runs = make(list(models.values()))
    found: dict[str, Any] = {}
    for arm in matched:
        of = runs[models[arm.label].label]
        share = median_of(of, "kept")
        found[arm.label] = {
            "component_kept": share,
            "cap": None,
            "kept": None,
            "tried": [],
            "next": share * median_of(of, "total_norm") if share < NOT_TIGHT else None,
        }
    for _ in range(ROUNDS):
        tries = {
            arm.label: _tried(arm, "global", _three_digits(cap))
            for arm in matched
            if (cap := found[arm.label]["next"])
        }
        runs = make(list(tries.values()))
        for label, tried in tries.items():
            choice, of = found[label], runs[tried.label]
            wanted, kept = choice["component_kept"], median_of(of, "kept")
            choice["tried"].append({"cap": tried.cap, "kept": kept})
            best = min(choice["tried"], key=lambda one: abs(math.log(one["kept"] / wanted)))
            choice.update(best)
            close = abs(best["kept"] / wanted - 1) <= CLOSE
            again = _three_digits(wanted * median_of(of, "total_norm"))
            choice["next"] = None if close or again in [one["cap"] for one in choice["tried"]] else again
    for choice in found.values():
        del choice["next"]
    return found


def _stable(lr: float, arms: list[Arm], make: Make) -> dict[str, Any]:
    rates = [_three_digits(lr * share) for share in STABLE_RATES]
    runs = make([Arm(f"none@{rate:g}", "none", lr=rate) for rate in rates])
    tried = []
    for rate in rates:
        of = runs[f"none@{rate:g}"]
        failed, mean = sum(run["failed"] for run in of), statistics.fmean(run["score"] for run in of)
        tried.append({"lr": rate, "failed": failed, "mean": mean})
    best = min(tried, key=lambda one: (one["failed"], -one["mean"]))
    return {arm.label: {"lr": best["lr"], "tried": tried} for arm in arms}


def _tried(arm: Arm, kind: str, cap: float) -> Arm:
    rate = "" if arm.lr is None else f"@{arm.lr:g}"
    return Arm(f"{kind}:{cap:g}{rate}", kind, cap=cap, lr=arm.lr)


def median_of(runs: list[Run], field: str) -> float:
    """Over all steps of all these runs; what was not finite is left out."""
    values = [value for run in runs for value in run[field] if value is not None]
    return statistics.median(values) if values else math.nan


def _three_digits(value: float) -> float:
    return float(f"{value:.3g}")
