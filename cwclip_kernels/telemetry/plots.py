"""The paper's figures of a recorded run."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..components.grouping import layer_of, type_of
from .runs import Run, read_run

_MOST_PANELS = 24
_MOST_STEPS = 500


def plot_run(run: str | Path | Run, out: str | Path | None = None) -> list[Path]:
    """Draws a run: norms over steps per layer for each parameter type, clip rate over steps, a layer x type heat map.

    Args:
        run: what ``read_run`` reads, or what it returned.
        out: folder for the figures, made if need be; without, ``figures`` beside the run.

    Returns:
        The three files: norms.png, clip_rate.png, heat_map.png.

    Raises:
        RuntimeError: matplotlib isn't installed.
        FileNotFoundError, ValueError: as ``read_run``; a run without a step.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(f"plots need matplotlib ({error}): pip install 'cwclip_kernels[plot]'") from None
    if not isinstance(run, Run):
        if out is None:
            out = Path(run) / "figures" if Path(run).is_dir() else Path(run).with_suffix("") / "figures"
        run = read_run(run)
    folder = Path("figures" if out is None else out)
    if not run.steps or not run.names:
        raise ValueError("run: has no steps yet")
    drawn = []
    for name, draw in (("norms", _draw_norms), ("clip_rate", _draw_clip_rate), ("heat_map", _draw_heat_map)):
        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure, run)
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{name}.png", dpi=130)
        drawn.append(folder / f"{name}.png")
    return drawn


def main(arguments: Sequence[str]) -> int:
    """``python -m cwclip_kernels plot RUN``: exit status 0, or 2 after one line that says what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m cwclip_kernels plot", description="Draws the figures of a run.")
    parser.add_argument("run", help="a .jsonl or .csv of ClipRecorder, or a folder of status_*.json files")
    parser.add_argument("--out", help="folder for the figures (default: figures, beside the run)")
    given = parser.parse_args(arguments)
    try:
        for path in plot_run(given.run, given.out):
            print(path)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"plot: {error}", file=sys.stderr)
        return 2
    return 0


# ------------------------------------------------------------------------------------------------------------
# What is drawn
# ------------------------------------------------------------------------------------------------------------


def _by_type(run: Run) -> dict[str, list[tuple[str, int]]]:
    """Parameter type -> its layers and components, the types with most layers first."""
    types: dict[str, list[tuple[str, int]]] = {}
    beside = frozenset(run.names)
    for i, name in enumerate(run.names):
        kind = type_of(name, beside)
        types.setdefault(kind, []).append((layer_of(name, beside) if kind != name else "", i))
    return dict(sorted(types.items(), key=lambda item: -len(item[1])))


def _short(kind: str) -> str:
    """What tells a type from others: all behind the layer's number."""
    return kind.rpartition("*.")[2] or kind


def _thinned(run: Run) -> list[int]:
    """Rows to draw, evenly spread, the last among them."""
    count = len(run.steps)
    step = max(1, math.ceil(count / _MOST_STEPS))
    return sorted({*range(0, count, step), count - 1})


def _drawable(values: Tensor) -> list[float]:
    """For a logarithmic axis: NaN, a gap in the line, where there is no logarithm."""
    return torch.where(values.isfinite() & (values > 0), values, math.nan).tolist()


def _draw_norms(figure: Any, run: Run) -> None:
    from matplotlib import colormaps

    rows = _thinned(run)
    steps = [run.steps[i] for i in rows]
    kinds = list(_by_type(run).items())
    shown = kinds[:_MOST_PANELS]
    columns = min(4, len(shown))
    height = math.ceil(len(shown) / columns)
    figure.set_size_inches(4.2 * columns, 2.6 * height + 0.6)
    axes = figure.subplots(height, columns, squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis, (kind, members) in zip(axes.flat, shown, strict=False):
        for n, (layer, i) in enumerate(members):
            color = colormaps["viridis"](n / max(1, len(members) - 1))
            values = _drawable(run.norms[rows, i])
            axis.plot(steps, values, color=color, linewidth=1, label=layer, marker="." if len(rows) == 1 else None)
        if any(math.isfinite(v) for _, i in members for v in _drawable(run.norms[rows, i])):
            axis.set_yscale("log")
        axis.set_title(_short(kind), fontsize=8)
        axis.tick_params(labelsize=7)
        if 1 < len(members) <= 6:
            axis.legend(fontsize=6)
    left_out = f" ({len(kinds) - len(shown)} more types not shown)" if len(kinds) > len(shown) else ""
    figure.suptitle(f"Gradient norm before clipping, by layer (dark: first){left_out}", fontsize=10)
    figure.supxlabel("step", fontsize=9)


def _draw_clip_rate(figure: Any, run: Run) -> None:
    figure.set_size_inches(8, 4)
    axis = figure.subplots()
    rows = _thinned(run)
    steps = [run.steps[i] for i in rows]
    clipped = (run.coefs != 1).double()
    axis.plot(steps, clipped[rows].mean(1).tolist(), color="black", label="all components", marker=_dot(rows))
    for kind, members in list(_by_type(run).items())[:6]:
        if 1 < len(members) < len(run.names):
            rate = clipped[rows][:, [i for _, i in members]].mean(1).tolist()
            axis.plot(steps, rate, linewidth=0.8, alpha=0.7, label=_short(kind), marker=_dot(rows))
    bad = [run.steps[i] for i in run.nonfinite.any(1).nonzero().flatten().tolist()]
    if bad:
        axis.plot(bad, [0.0] * len(bad), "rx", label="a norm is inf or NaN")
    axis.set_ylim(-0.02, 1.02)
    axis.set_xlabel("step")
    axis.set_ylabel("share of components clipped")
    axis.legend(fontsize=7)


def _dot(rows: list[int]) -> str | None:
    return "." if len(rows) == 1 else None


def _draw_heat_map(figure: Any, run: Run) -> None:
    types = _by_type(run)
    layers = list(dict.fromkeys(layer for members in types.values() for layer, _ in members if layer))
    columns = [kind for kind, members in types.items() if any(layer for layer, _ in members)] or list(types)
    layers = layers or [""]
    rate = (run.coefs != 1).double().mean(0).tolist()
    table = [[math.nan] * len(columns) for _ in layers]
    for x, kind in enumerate(columns):
        for layer, i in types[kind]:
            table[layers.index(layer)][x] = rate[i]
    figure.set_size_inches(max(6.0, 0.35 * len(columns) + 3), max(3.0, 0.3 * len(layers) + 2.5))
    axis = figure.subplots()
    image = axis.imshow(table, aspect="auto", vmin=0, vmax=1, cmap="magma")
    axis.set_xticks(range(len(columns)), [_short(kind) for kind in columns], rotation=90, fontsize=6)
    axis.set_yticks(range(len(layers)), layers, fontsize=6)
    figure.colorbar(image, ax=axis, label="share of steps clipped")
