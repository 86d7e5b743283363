"""The report of an experiment: report.md, report.json, pictures, and a table on the terminal."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from rich import box
from rich.console import Console
from rich.table import Table

import cwclip_kernels

from . import figures, gradients, significance
from .arms import Arm
from .findings import Findings, gather
from .runs import Run, write_whole
from .settings import Settings
from .tasks import Task

Facts = dict[str, Any]


def facts(
    settings: Settings, task: Task, arms: list[Arm], seeds: list[int], calibration_seeds: list[int], device: str
) -> Facts:
    """What the report says of the experiment itself, besides what came out."""
    return {
        "task": task.name,
        "about": task.about,
        "source": task.source,
        "data_hash": task.fingerprint,
        "train": len(task.train),
        "dev": len(task.dev),
        "metric": task.metric,
        "cutoff": task.cutoff,
        "majority": task.majority,
        "settings": settings.as_dict(),
        "asked": [arm.label for arm in arms],
        "seeds": seeds,
        "calibration_seeds": calibration_seeds,
        "machine": f"{_processor()}, {os.cpu_count()} CPUs" + ("" if device == "cpu" else f", {device}"),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "cwclip_kernels": cwclip_kernels.__version__,
        },
    }


def write(
    folder: Path, about: Facts, arms: list[Arm], runs: dict[str, list[Run]], chosen: dict[str, Any], command: str
) -> Findings:
    """Writes all files of the report; arms without a finished run are named as missing.

    Args:
        arms: as given, those of `chosen` not yet settled.
        chosen: what calibration found.
    """
    runs = {label: own for label, own in runs.items() if own}
    days = sorted(run["made_by"]["date"][:10] for own in runs.values() for run in own)
    about = {**about, "date": " to ".join(dict.fromkeys((days[0], days[-1])))}
    found = gather(arms, runs)
    baseline = found["baseline"]
    pictures = {
        "scores.png": figures.scores(runs, about["metric"], about["cutoff"]),
        "norms.png": figures.norms(runs, _shown(baseline, arms, runs)),
        "clip_rate.png": figures.clip_rate(runs),
    }
    capped = {label: runs[label] for label in _capped(arms, found)}
    if capped:
        pictures["held_back.png"] = figures.held_back(capped)
    found["gradients"] = gradients.compare(runs[baseline], capped)
    for name, picture in pictures.items():
        write_whole(folder / name, picture)
    brief = (
        "arm",
        "kind",
        "cap",
        "lr",
        "seed",
        "score",
        "failed",
        "one_answer",
        "steps_to_target",
        "scores",
        "seconds",
    )
    document = {
        **about,
        "command": command,
        "calibration": chosen,
        **found,
        "runs": [{key: run[key] for key in brief} for own in runs.values() for run in own],
    }
    write_whole(folder / "report.json", json.dumps(document, indent=1))
    write_whole(folder / "report.md", markdown(about, found, arms, chosen, command))
    return found


def _shown(baseline: str, arms: list[Arm], runs: dict[str, list[Run]]) -> list[str]:
    """The arms whose norms are drawn: the baseline, and the component cap with fewest failed runs."""
    capped = [arm.label for arm in arms if arm.kind == "component" and arm.label in runs and arm.label != baseline]
    best = sorted(capped, key=lambda label: sum(run["failed"] for run in runs[label]) / len(runs[label]))[:1]
    return [baseline, *best]


def _capped(arms: list[Arm], found: Findings) -> list[str]:
    """The arms with one cap for all components."""
    return [arm.label for arm in arms if arm.kind == "component" and arm.label in found["arms"]]


def markdown(about: Facts, found: Findings, arms: list[Arm], chosen: dict[str, Any], command: str) -> str:
    """The whole report."""
    settings = about["settings"]
    correction = "with" if settings["bias_correction"] else "without"
    lower = ", bfloat16 autocast" if settings.get("precision") == "bfloat16" else ""
    fused = settings.get("optimizer") == "fused"
    one_pass = ", with clipping in its step (`ComponentClipAdamW`) in arms without a global norm" if fused else ""
    model = settings["model"]
    data = f"{about['train']} examples to train on, {about['dev']} to judge by"
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    parts = [
        f"# Fine-tuning stability: {about['task']}, {Path(model).name}",
        f"{about['date']}, {about['machine']}; {versions}.",
        f"    {command}",
        f"- Task: {about['about']} {data}, from {about['source']}, hash of the data `{about['data_hash']}`.",
        f"- Score: {about['metric']} on the dev set after the last step. The commonest label scores "
        f"{about['majority']:.3f}; a run that does not beat {about['cutoff']:.3f} has failed.{_lenient(about)}",
        f"- Training: {model}, {settings['epochs']} epochs of batches of {settings['batch_size']}, at most "
        f"{settings['max_length']} tokens{lower}, AdamW {correction} bias correction (eps {settings['eps']:g}, "
        f"weight decay {settings['weight_decay']:g}, not on biases and normalisation){one_pass}, learning rate "
        f"{settings['lr']:g} with linear decay, warm-up over {settings['warmup']:.0%} of the steps. Head, order of "
        "the data and dropout depend on the seed alone and are the same in each arm.",
        f"- Judged seeds: {_ranges(about['seeds'])}. {_before(about, chosen)}",
        _missing(about, arms, found, chosen),
        "## What comes out",
        "\n".join(f"- {sentence}" for sentence in found["sentences"]),
        "## Arms",
        _arms_table(found, about),
        "Good mean: of runs that didn't fail. Failed: runs, share, 95 % interval (Wilson). One answer: runs that "
        "end up giving every example one label. "
        f"To {settings['target']:g}: median of the steps after which a look at the dev set (one each {_every(about)} "
        "steps) first gave that score, and how many runs did. Kept: norm of all gradients after clipping over that "
        "before, clipped: share of components; both at the median step of all runs.",
        "![scores](scores.png)",
        *_differences(found),
        *_tests(found),
        *_calibration(chosen),
        *_gradients(found),
        "## Figures",
        "![norms](norms.png)",
        "![clip rate](clip_rate.png)",
        "![held back](held_back.png)" if _capped(arms, found) else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _before(about: Facts, chosen: dict[str, Any]) -> str:
    fixed = (
        "Hyper-parameters and caps are those of the command line and its defaults, set before these seeds were run."
    )
    if about["task"] == "names":
        fixed += " (The defaults come from scouting, on an earlier build of this task.)"
    if not chosen:
        return f"{fixed} Nothing was calibrated."
    seeds = _ranges(about["calibration_seeds"])
    return f"{fixed} What calibration chose ({', '.join(chosen)}) was chosen on seeds {seeds}, which judge nothing."


def _lenient(about: Facts) -> str:
    if about["majority"] <= about["cutoff"]:
        return ""
    return (
        " By this cut-off, which is the paper's, a run that only knows the commonest label counts as good: see the "
        "column 'one answer'."
    )


def _missing(about: Facts, arms: list[Arm], found: Findings, chosen: dict[str, Any]) -> str:
    lines = []
    for arm in arms:
        runs = found["arms"].get(arm.label, {"runs": 0})["runs"]
        if arm.kind == "matched" and arm.label in chosen and chosen[arm.label]["cap"] is None:
            lines.append(
                f"`{arm.label}` was not run: at the median step component:{arm.cap:g} keeps "
                f"{chosen[arm.label]['component_kept']:.1%} of the gradient: its control would be no clipping."
            )
        elif runs < len(about["seeds"]):
            lines.append(f"`{arm.label}` has {runs} of {len(about['seeds'])} runs so far.")
    return "\n".join(f"- {line}" for line in lines)


def _arms_table(found: Findings, about: Facts) -> str:
    heads = ["arm", "cap", "lr", "runs", "mean", "std", "min", "max", "good mean", "failed", "one answer"]
    heads += [f"to {about['settings']['target']:g}", "kept", "clipped", "s a run"]
    rows = []
    for label, one in found["arms"].items():
        low, high = one["failed_interval"]
        reached = f"{one['steps_to_target']:g} ({one['reached']})" if one["reached"] else "never"
        rows.append(
            [
                label,
                "-" if one["cap"] is None else f"{one['cap']:g}",
                f"{one['lr']:g}",
                f"{one['runs']}",
                f"{one['mean']:.3f}",
                "-" if one["std"] is None else f"{one['std']:.3f}",
                f"{one['min']:.3f}",
                f"{one['max']:.3f}",
                "-" if one["mean_of_good"] is None else f"{one['mean_of_good']:.3f}",
                f"{one['failed']}, {one['failed_share']:.0%} ({low:.0%} to {high:.0%})",
                f"{one['one_answer']}",
                reached,
                f"{one['kept']:.2g}",
                f"{one['clip_rate']:.0%}",
                f"{one['seconds']:.0f}",
            ]
        )
    return _table(heads, rows)


def _differences(found: Findings) -> list[str]:
    parts = []
    heads = ["arm", "against", "seeds", "mean", "std", "share failed", "steps to the target", "mean, neither failed"]
    against = {(label, found["baseline"]): one for label, one in found["against_baseline"].items() if one}
    controls = {(label, one["control"]): one for label, one in found["against_control"].items() if "mean" in one}
    for title, pairs in (("baseline", against), ("global control of matched tightness", controls)):
        if pairs:
            names = ("mean", "std", "failed_share", "steps", "mean_of_good")
            rows = [
                [
                    label,
                    other,
                    f"{one['runs']}",
                    *(_interval(one.get(name), 1 if name == "steps" else 3) for name in names),
                ]
                for (label, other), one in pairs.items()
            ]
            parts += [f"## Difference from the {title}", _table(heads, rows)]
    if parts:
        parts.append(
            "In brackets 95 % bootstrap intervals (10,000 draws of seeds, both arms' runs of a seed together). "
            "Steps: a run that never gets to the target score counts with all its steps."
        )
    return parts


def _calibration(chosen: dict[str, Any]) -> list[str]:
    if not chosen:
        return []
    rows = []
    for label, one in chosen.items():
        if "component_kept" in one:
            tried = ", ".join(f"{t['cap']:g} keeps {t['kept']:.3g}" for t in one["tried"]) or "-"
            rows.append(
                [label, f"keep {one['component_kept']:.3g}", tried, "-" if one["cap"] is None else f"{one['cap']:g}"]
            )
        else:
            tried = ", ".join(f"{t['lr']:g}: {t['failed']} failed, mean {t['mean']:.3f}" for t in one["tried"])
            rows.append([label, "fewest failed, best mean", tried, f"{one['lr']:g}"])
    return ["## Calibration", _table(["arm", "wanted", "tried", "chosen"], rows)]


def _tests(found: Findings) -> list[str]:
    if not found["tests"]:
        return []
    rows = []
    for one in found["tests"]:
        failures = one["of"] == "failures"
        saw = f"{one['alone'][0]} and {one['alone'][1]} failed alone" if failures else f"{one['mean']:+.4f}"
        least = (
            "-"
            if one["detectable"] is None
            else f"{one['detectable']:.2f}"
            if failures
            else f"{one['detectable']:.3f}"
        )
        pair = f"{one['arm']} against {one['control']}"
        rows.append([pair, one["of"], f"{one['seeds']}", saw, f"{one['p']:.3g}", f"{one['holm']:.3g}", least])
    return [
        "## Tests",
        _table(["", "of", "seeds", "found", "p", "p by Holm", "detectable"], rows),
        "Failures: McNemar's exact test. Scores: sign-flip permutation test of the mean difference. Holm's "
        f"correction is over these {len(rows)} tests. Detectable: the difference that the test, at the first of "
        f"Holm's levels, finds four times in five: in share of failed runs, if {significance.OTHERS:.0%} of the "
        "seeds go the other way; in mean score, if differences scatter as they did.",
    ]


def _gradients(found: Findings) -> list[str]:
    compared = found["gradients"]
    parts = ["## Where failed runs differ, and what caps hold back"]
    labels = list(compared["depth"][0]["kept"]) if compared["depth"] else []
    for heading, rows in (("depth", compared["depth"]), ("type, all layers", compared["type"])):
        heads = [heading, "components", "early, failed", "early, good", "late, failed", "late, good"]
        heads += [f"kept by {label}" for label in labels]
        table = []
        for row in rows:
            norms = [row[when][word] for when in ("early", "late") for word in ("failed", "good")]
            kept = [row["kept"][label] for label in labels]
            cells = ["-" if value is None else f"{value:.2g}" for value in (*norms, *kept)]
            table.append([row["part"], f"{row['components']}", *cells])
        if table:
            parts.append(_table(heads, table))
    parts.append(
        "Early, late: median norm of the part's gradient before clipping in the first and the last third of the "
        f"steps, in failed and in good runs of `{found['baseline']}`. Kept: the part's norm after clipping over that "
        "before, the median step of the median run."
    )
    return parts


def _interval(one: dict[str, float] | None, digits: int = 3) -> str:
    if one is None:
        return "-"
    return f"{one['difference']:+.{digits}f} ({one['low']:+.{digits}f} to {one['high']:+.{digits}f})"


def _every(about: Facts) -> str:
    settings = about["settings"]
    steps = settings["epochs"] * -(-about["train"] // settings["batch_size"])
    return f"{steps / min(settings['evaluations'], steps):.3g}"


def _ranges(seeds: list[int]) -> str:
    if len(seeds) < 2:
        return ", ".join(map(str, seeds)) or "none"
    return f"{seeds[0]} to {seeds[-1]}"


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def show(console: Console, found: Findings) -> None:
    """The report's core on the terminal."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("arm", overflow="fold")
    for head in ("runs", "mean", "std", "min", "max", "failed"):
        table.add_column(head, justify="right", no_wrap=True)
    for label, one in found["arms"].items():
        std = "-" if one["std"] is None else f"{one['std']:.3f}"
        numbers = (f"{one['mean']:.3f}", std, f"{one['min']:.3f}", f"{one['max']:.3f}", f"{one['failed_share']:.0%}")
        table.add_row(label, f"{one['runs']}", *numbers)
    console.print(table)
    for sentence in found["sentences"]:
        console.print(f"- {sentence}", markup=False)
