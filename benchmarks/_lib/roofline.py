"""Roofline: speed over size with the ceilings of the same run, one panel each for none, half and all clipped."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no display, no global state

from .gradients import CASES
from .plot import OUR_COLOURS, TITLES, TORCH_COLOURS
from .report import CaseResult

MARKERS = "osD^vP"


def draw(results: Sequence[CaseResult], metadata: dict[str, Any], path: Path) -> None:
    """Writes the figure; the file's ending says the format.

    x axis: the bytes that must be moved, N read and f N written. y axis: those bytes over the fastest round's time.
    They are the same for every method, so one that moves more is slower.

    Args:
        results: of one run.
        metadata: of the same run, for the line under the title.
        path: where to.
    """
    cases = [case for case in CASES if any(r.clipped == case for r in results)]
    figure = Figure(figsize=(3.2 + 3.6 * max(1, len(cases)), 5.2), layout="constrained")
    panels = figure.subplots(1, max(1, len(cases)), sharey=True, squeeze=False)[0]
    lines: dict[str, Any] = {}
    for case, panel in zip(cases, panels, strict=False):
        lines |= _draw_case(panel, case, [r for r in results if r.clipped == case])
    low, high = panels[0].get_ylim()
    panels[0].set_ylim(low, 4 * high)  # room for the names of the sets
    panels[0].set_ylabel("bytes that must be moved / time, GB/s", fontsize=9)
    figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    machine = metadata.get("gpu") or f"{metadata['cpu']}, {metadata['threads']} threads"
    figure.suptitle(
        f"Gradient clipping below what the memory allows\n{machine}; torch {metadata['torch']}; {metadata['date']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=160)


def _draw_case(panel: Axes, case: str, results: Sequence[CaseResult]) -> dict[str, Any]:
    """Draws one panel; the lines by label, for the legend."""
    results = sorted(results, key=_must_move)
    sizes = [_must_move(result) for result in results]
    roof = [_must_move(result) / result.floor_ms / 1e6 for result in results]
    (line,) = panel.plot(sizes, roof, color="#333333", linestyle="--", marker="_", zorder=3)
    lines = {"ceiling measured at this size": line}
    for size, height, result in zip(sizes, roof, results, strict=True):
        name = result.set if result.dtype == "float32" else f"{result.set} {result.dtype}"
        panel.annotate(name, (size, height), (0, 4), textcoords="offset points", fontsize=6.5, rotation=60)
    rows = {row.key: row for result in results for row in result.rows}
    # Ours is the clipper, or the function where only that was measured.
    call = "clipper/" if any(key.startswith("clipper/") for key in rows) else "function/"
    torch_looks = cycle(zip(TORCH_COLOURS, MARKERS, strict=False))
    our_looks = cycle(zip(OUR_COLOURS, MARKERS, strict=False))
    for key, way in rows.items():
        if not (way.is_torch or key.startswith(call)):
            continue
        points = [(_must_move(r), row.min_ms) for r in results for row in r.rows if row.key == key]
        colour, marker = next(torch_looks if way.is_torch else our_looks)
        (lines[way.label],) = panel.plot(
            [size for size, _ in points],
            [size / ms / 1e6 for size, ms in points],
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=0.8,
        )
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlabel("bytes that must be moved", fontsize=9)
    panel.set_title(TITLES[case], loc="left", fontsize=9.5)
    panel.tick_params(which="both", labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(color="#e6e6e6", linewidth=0.6)
    panel.margins(x=0.12)
    return lines


def _must_move(result: CaseResult) -> float:
    return (1.0 + result.clipped_share) * result.nbytes
