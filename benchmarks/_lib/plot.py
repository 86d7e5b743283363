"""Bar chart: share of the machine's ceiling by method, one panel each for none, half and all clipped."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no display, no global state

from .gradients import CASES
from .report import CaseResult, Row

# Greys for torch's ways, a strong colour for each of our backends: readable in print and by the colour-blind.
TORCH_COLOURS = ("#c9ced6", "#a3abb8", "#7d8796", "#565f6e")
OUR_COLOURS = ("#d1495b", "#1f6f8b", "#e0a030", "#3a7d44")
TITLES = {
    "none": "no component clipped",
    "half": "every other component clipped",
    "all": "every component clipped",
}


def draw(results: Sequence[CaseResult], metadata: dict[str, Any], path: Path) -> None:
    """Writes the figure; the file's ending says the format.

    Args:
        results: of one run.
        metadata: of the same run, for the line under the title.
        path: where to.
    """
    cases = [case for case in CASES if any(r.clipped == case for r in results)]
    sets = {(r.set, r.dtype): r for r in results}
    figure = Figure(figsize=(max(7.0, 1.4 + 1.5 * len(sets)), 1.6 + 2.3 * len(cases)), layout="constrained")
    panels = figure.subplots(len(cases), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    bars: dict[str, Any] = {}
    for case, panel in zip(cases, panels, strict=True):
        # No single panel has every bar: "half" has no global clip.
        bars |= _draw_case(panel, case, [r for r in results if r.clipped == case])
    panels[-1].set_xticks(range(len(sets)), [_tick(result) for result in sets.values()])
    panels[-1].set_ylim(0, max(118.0, 1.06 * panels[-1].get_ylim()[1]))
    figure.legend(list(bars.values()), list(bars), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.suptitle("Gradient clipping: share of what the memory allows", fontsize=11, fontweight="bold")
    machine = metadata.get("gpu") or f"{metadata['cpu']}, {metadata['threads']} threads"
    panels[0].annotate(
        f"{machine}; torch {metadata['torch']}; fastest round of each\n"
        "Above our bars: times as fast as the fastest of torch's component-wise ways",
        (0, 1),
        (0, 22),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=8,
    )
    figure.savefig(path, dpi=160)


def _draw_case(panel: Axes, case: str, results: Sequence[CaseResult]) -> dict[str, Any]:
    """Draws one panel; the bars by label, for the legend."""
    # A backend may serve some sets only.
    rows = {row.key: row for result in results for row in result.rows}
    shown = [row for row in rows.values() if row.is_torch or row.key.startswith("clipper/")]
    width = 0.84 / len(shown)
    torch_colours, our_colours = cycle(TORCH_COLOURS), cycle(OUR_COLOURS)
    bars = {}
    for index, provider in enumerate(shown):
        found = [(x, row) for x, result in enumerate(results) for row in result.rows if row.key == provider.key]
        places = [x + (index - (len(shown) - 1) / 2) * width for x, _ in found]
        heights = [100 * row.of_ceiling for _, row in found]
        colour = next(torch_colours if provider.is_torch else our_colours)
        bars[provider.label] = panel.bar(places, heights, 0.92 * width, color=colour, zorder=2)
        if not provider.is_torch:
            for place, height, (_, row) in zip(places, heights, found, strict=True):
                panel.annotate(
                    _times(row),
                    (place, height),
                    (0, 2),
                    textcoords="offset points",
                    ha="center",
                    fontsize=7.5,
                )
    panel.axhline(100, color="#333333", linewidth=0.8, linestyle="--", zorder=1)
    panel.set_ylabel("% of ceiling", fontsize=9)
    panel.set_title(TITLES[case], loc="left", fontsize=9.5)
    panel.tick_params(labelsize=8)
    panel.tick_params(axis="x", length=0)
    panel.grid(axis="y", color="#e6e6e6", linewidth=0.6, zorder=0)
    panel.spines[["top", "right"]].set_visible(False)
    return bars


def _times(row: Row) -> str:
    """How many times as fast as the fastest of torch's component-wise ways, if any took part."""
    ratios = [ratio for key, (ratio, _) in row.speedup.items() if key != "global"]
    return f"{min(ratios):.1f} x" if ratios else ""


def _tick(result: CaseResult) -> str:
    size = f"{result.nbytes / 1e9:.2f} GB" if result.nbytes >= 1e9 else f"{result.nbytes / 1e6:.0f} MB"
    return f"{result.set}\n{result.tensors} tensors\n{size} {result.dtype}"
