"""``python -m cwclip_kernels suggest RUN``: suggested caps as a table, a mapping to paste, JSON, a picture."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .caps import SuggestedCap, Suggestion, suggest

_MAX_ROWS = 80
_MAX_LABEL = 56  # characters
_INK, _NORMS, _CAP = "#333333", "#4878a8", "#c0392b"


def main(arguments: Sequence[str]) -> int:
    """Runs the command; the exit status: 0, or 2 after an error message."""
    parser = argparse.ArgumentParser(
        prog="python -m cwclip_kernels suggest",
        description="Suggests a cap for each type of component: the one that a wanted share of its recorded norms "
        "exceeds.",
    )
    parser.add_argument("run", help="a .jsonl or .csv of ClipRecorder, or a folder of status_*.json files")
    parser.add_argument("--rate", type=float, default=0.01, help="wanted clip rate (default: 0.01)")
    parser.add_argument("--by", choices=("type", "component"), default="type", help="what has a cap of its own")
    parser.add_argument("--skip", type=int, default=0, metavar="N", help="leaves out the first N steps, a warm-up")
    parser.add_argument("--plot", metavar="FILE", help="draws the norms and caps, into a .png, .svg or .pdf")
    parser.add_argument("--json", action="store_true", help="prints JSON, for scripts")
    given = parser.parse_args(arguments)
    try:
        suggestion = suggest(given.run, given.rate, by=given.by, skip=given.skip)
        if given.plot:
            print(plot_suggestion(suggestion, given.plot), file=sys.stderr)
        if given.json:
            print(json.dumps(suggestion.as_dict(), indent=2))
        else:
            print_suggestion(suggestion)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"suggest: {error}", file=sys.stderr)
        return 2
    return 0


def print_suggestion(suggestion: Suggestion) -> None:
    """Prints a table of types and caps, what the run doesn't show, and the mapping to paste.

    Raises:
        RuntimeError: rich isn't installed.
    """
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError as error:
        raise RuntimeError(
            f"the table needs rich ({error}): pip install 'cwclip_kernels[telemetry]', or use --json"
        ) from None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(suggestion.by, overflow="fold")
    for column in ("compo-\nnents", "median", "99 %", "max", "suggested\ncap", "rate\nat it", "non-\nfinite\nsteps"):
        table.add_column(column, justify="right", overflow="fold")
    for cap, label in zip(suggestion.caps, _short(suggestion.caps), strict=True):  # whole names follow below
        numbers = *map(_number, (cap.median, cap.percentile_99, cap.largest)), f"{cap.cap:g}"
        rate = f"{100 * cap.rate:.2f} %" if cap.counted else "-"
        table.add_row(Text(label), str(len(cap.components)), *numbers, rate, str(cap.nonfinite))
    skipped = f", without the first {suggestion.skipped}" if suggestion.skipped else ""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:  # a file or pipe, which has no width
        console.width = 120
    console.print(f"Norms before clipping in {suggestion.steps} steps{skipped}")
    console.print(table)
    wanted = f"wanted: {100 * suggestion.rate:g} % of each {suggestion.by}"
    console.print(f"Clip rate at these caps: {100 * suggestion.clip_rate:.2f} % ({wanted})")
    for note in suggestion.notes:
        console.print(f"Note: {note}")
    print(f"\n{mapping_text(suggestion)}")  # rich would break its lines


def mapping_text(suggestion: Suggestion) -> str:
    """The mapping as Python source, to be pasted as an argument."""
    lines = []
    for pattern, cap in suggestion.max_norm.items():
        number = repr(cap) if math.isfinite(cap) else 'float("inf")'
        lines.append(f"    {json.dumps(pattern, ensure_ascii=False)}: {number},\n")
    return f"max_norm={{\n{''.join(lines)}}}"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"


def plot_suggestion(suggestion: Suggestion, file: str | Path) -> Path:
    """Draws how each type's norms are distributed, on a logarithmic axis, with its cap.

    Args:
        suggestion: what ``suggest`` returned.
        file: a .png, .svg or .pdf to write.

    Raises:
        RuntimeError: matplotlib isn't installed.
        ValueError: the file has another suffix.

    Example:
        plot_suggestion(suggest("runs/seed1.jsonl"), "caps.png")
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError as error:
        raise RuntimeError(f"plots need matplotlib ({error}): pip install 'cwclip_kernels[telemetry]'") from None
    path = Path(file)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"plot: expected a .png, .svg or .pdf, not {path}")
    shown = _most_components(suggestion.caps)
    labels = _labels(shown)
    figure = Figure(figsize=(10, 1.9 + 0.27 * len(shown)), layout="constrained", facecolor="white")
    axis = figure.subplots()
    for y, cap in enumerate(shown):
        if not cap.counted:
            continue
        low, lower, median, upper, high = cap.quantiles
        axis.plot([low, high], [y, y], color=_NORMS, linewidth=1.2, zorder=2)
        axis.plot([lower, upper], [y, y], color=_NORMS, linewidth=5, alpha=0.6, solid_capstyle="butt", zorder=2)
        axis.plot([median], [y], "|", color=_INK, markersize=8, markeredgewidth=1.4, zorder=3)
        axis.plot([cap.largest], [y], "o", color=_NORMS, markersize=3.5, markerfacecolor="white", zorder=3)
        axis.plot([cap.cap], [y], "D", color=_CAP, markersize=4.5, zorder=4)
    axis.set_xscale("log")
    axis.set_ylim(len(shown) - 0.4, -0.6)
    axis.set_yticks(range(len(shown)), labels, fontsize=8)
    axis.tick_params(axis="both", length=0)
    axis.grid(axis="x", color="#dddddd", linewidth=0.7, zorder=0)
    axis.grid(axis="y", color="#eeeeee", linewidth=0.6, zorder=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.set_xlabel("gradient norm before clipping")
    right = axis.twinx()
    right.set_ylim(axis.get_ylim())
    caps = [f"{cap.cap:g}  ({100 * cap.rate:.2f} %)" if cap.counted else "no norms" for cap in shown]
    right.set_yticks(range(len(shown)), caps, fontsize=8, color=_CAP)
    right.tick_params(length=0)
    right.spines[:].set_visible(False)
    handles = [
        Line2D([], [], color=_NORMS, linewidth=1.2, label="1 to 99 %"),
        Line2D([], [], color=_NORMS, linewidth=5, alpha=0.6, label="25 to 75 %"),
        Line2D([], [], color=_INK, marker="|", linestyle="", markersize=8, markeredgewidth=1.4, label="median"),
        Line2D(
            [], [], color=_NORMS, marker="o", linestyle="", markersize=4, markerfacecolor="white", label="largest"
        ),
        Line2D([], [], color=_CAP, marker="D", linestyle="", markersize=4.5, label="suggested cap (clip rate at it)"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    left_out = len(suggestion.caps) - len(shown)
    more = f"; {left_out} more not shown" if left_out else ""
    count = f"{suggestion.steps} steps, by {suggestion.by}{more}"
    figure.suptitle(f"Caps for a clip rate of {100 * suggestion.rate:g} % ({count})", fontsize=11)
    figure.savefig(path, dpi=130)
    return path


def _most_components(caps: tuple[SuggestedCap, ...]) -> list[SuggestedCap]:
    """At most _MAX_ROWS, in their order."""
    kept = sorted(range(len(caps)), key=lambda i: -len(caps[i].components))[:_MAX_ROWS]
    return [caps[i] for i in sorted(kept)]


def _labels(caps: list[SuggestedCap]) -> list[str]:
    labels = []
    for cap, name in zip(caps, _short(caps), strict=True):
        layers = f"  \N{MULTIPLICATION SIGN}{len(cap.components)}" if len(cap.components) > 1 else ""
        cut = name if len(name) <= _MAX_LABEL else f"{name[:20]}\N{HORIZONTAL ELLIPSIS}{name[21 - _MAX_LABEL :]}"
        labels.append(f"{cut}{layers}")
    return labels


def _short(caps: Sequence[SuggestedCap]) -> list[str]:
    """What tells types apart: all after the layer's number, or the whole name."""
    short = [cap.name.rpartition("*.")[2] or cap.name for cap in caps]
    count = Counter(short)
    return [name if count[name] == 1 else cap.name for cap, name in zip(caps, short, strict=True)]
