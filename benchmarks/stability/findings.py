"""What the runs say: all of the report's numbers, and the sentences that follow from them and no others."""

from __future__ import annotations

from typing import Any

from . import significance, statistics
from .arms import Arm
from .runs import Run

FEW = 10  # runs of an arm, under which intervals are hardly worth their name

Findings = dict[str, Any]


def gather(arms: list[Arm], runs: dict[str, list[Run]]) -> Findings:
    """Summaries, differences from the baseline, and each component cap's from its global control.

    Args:
        arms: as given, "matched" not yet settled.
        runs: label -> finished runs; arms without one are left out.
    """
    present = [arm for arm in arms if runs.get(arm.label)]
    baseline = next((arm for arm in present if arm.kind == "none" and arm.lr is None), present[0])
    summaries = {arm.label: statistics.summary(runs[arm.label]) for arm in present}
    against = {
        arm.label: statistics.difference(runs[arm.label], runs[baseline.label])
        for arm in present
        if arm is not baseline
    }
    controls = {}
    for arm in present:
        control = next(
            (c for c in present if (c.kind, c.cap, c.lr) == ("matched", arm.cap, arm.lr) and arm.kind == "component"),
            None,
        )
        if control is not None:
            controls[arm.label] = {
                "control": control.label,
                **(statistics.difference(runs[arm.label], runs[control.label]) or {}),
            }
    pairs = {(label, one["control"]): (runs[label], runs[one["control"]]) for label, one in controls.items()}
    found = {
        "baseline": baseline.label,
        "arms": summaries,
        "against_baseline": against,
        "against_control": controls,
        "tests": significance.of_pairs(pairs),
    }
    return {**found, "sentences": _sentences(found)}


def _sentences(found: Findings) -> list[str]:
    base = found["baseline"]
    arms = found["arms"]
    said = [
        _compared(label, base, difference)
        for label, difference in found["against_baseline"].items()
        if difference is not None
    ]
    for label, difference in found["against_control"].items():
        if "mean" in difference:
            kept = f"keeps {arms[label]['kept']:.2g}, the control {arms[difference['control']]['kept']:.2g}"
            said.append(
                f"{_compared(label, difference['control'], difference)} (The median step of `{label}` {kept}.)"
            )
    said += [_tested(row) for row in found["tests"]]
    if arms[base]["failed"] == 0:
        said.append(f"No run of `{base}` failed: there is nothing here for clipping to mend.")
    if found["against_baseline"] and not found["against_control"]:
        said.append(
            "There is no global control of matched tightness in this report: whether clipping by component, and not "
            "just clipping tightly, does anything is not asked here."
        )
    fewest = min(one["runs"] for one in arms.values())
    if fewest < FEW:
        said.append(
            f"With {fewest} runs of an arm intervals come out too narrow; under {FEW} seeds none is taken for a "
            "difference."
        )
    elif len(found["against_baseline"]) > 1:
        said.append("Each interval stands alone; of twenty of them one may well be off.")
    return said


def _tested(row: dict[str, Any]) -> str:
    """A test in words."""
    verdict = "differs from chance" if row["holm"] <= significance.LEVEL else "doesn't differ from chance"
    if row["of"] == "failures":
        own, other = row["alone"]
        what = f"{own} seeds failed under `{row['arm']}` alone and {other} under `{row['control']}` alone"
    else:
        what = f"the mean difference of scores between `{row['arm']}` and `{row['control']}`, {row['mean']:+.3f}"
    return f"Test, {row['seeds']} seeds: {what}: {verdict} (p = {row['p']:.3g}, by Holm {row['holm']:.3g})."


def _compared(label: str, other: str, difference: dict[str, Any]) -> str:
    """One arm against another; a difference is one only where its interval leaves 0 out, and seeds aren't few."""
    shown, open_ = [], []
    words = {
        "failed_share": ("fails less often", "fails more often", "how often runs fail"),
        "std": ("scatters less", "scatters more", "how scores scatter"),
        "mean": ("scores lower", "scores higher", "the mean score"),
    }
    for name, (below, above, neutral) in words.items():
        one = difference[name]
        numbers = f"{one['difference']:+.3f}, {one['low']:+.3f} to {one['high']:+.3f}"
        if difference["runs"] >= FEW and (one["high"] < 0 or one["low"] > 0):
            shown.append(f"{below if one['high'] < 0 else above} ({numbers})")
        else:
            open_.append(f"{neutral} ({numbers})")
    sentence = f"`{label}` against `{other}`, {difference['runs']} seeds: "
    if shown:
        sentence += "it " + ", ".join(shown) + ("; " if open_ else ".")
    if open_:
        sentence += "no difference is shown in " + ", ".join(open_) + "."
    return sentence
