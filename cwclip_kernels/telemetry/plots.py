"""The paper's figures of a recorded run."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..components.grouping import layer_of, type_of
from .runs import Run, read_run

_MAX_PANELS = 24
_MAX_STEPS = 500
_Types = dict[str, list[tuple[str, int]]]  # parameter type -> (layer, index of the component)


def plot_run(run: str | Path | Run, out: str | Path | None = None) -> list[Path]:
    """Plots a run: norms over steps per layer for each parameter type, clip rate over steps, a layer x type heat map.

    Args:
        run: what ``read_run`` reads, or what it returned.
        out: folder for norms.png, clip_rate.png and heat_map.png; default ``figures`` beside the run.

    Raises:
        RuntimeError: matplotlib isn't installed.
        FileNotFoundError, ValueError: as ``read_run``; a run without a step.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(f"plots need matplotlib ({error}): pip install 'cwclip_kernels[plot]'") from None
    if not isinstance(run, Run):
        path = Path(run)
        out = out or (path if path.is_dir() else path.with_suffix("")) / "figures"
        run = read_run(path)
    if not run.steps or not run.names:
        raise ValueError("run: has no steps yet")
    folder = Path(out or "figures")
    files = []
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in (("norms", _draw_norms), ("clip_rate", _draw_clip_rate), ("heat_map", _draw_heat_map)):
        figure = Figure(layout="constrained")
        draw(figure, run, _by_type(run))
        files.append(folder / f"{name}.png")
        figure.savefig(files[-1], dpi=130)
    return files


def main(arguments: Sequence[str]) -> int:
    """``python -m cwclip_kernels plot RUN``; the exit status: 0, or 2 after an error message."""
    parser = argparse.ArgumentParser(prog="python -m cwclip_kernels plot", description="Plots the figures of a run.")
    parser.add_argument("run", help="a .jsonl or .csv of ClipRecorder, or a folder of status_*.json files")
    parser.add_argument("--out", help="folder for the figures (default: figures, beside the run)")
    given = parser.parse_args(arguments)
    try:
        print(*plot_run(given.run, given.out), sep="\n")
    except (OSError, RuntimeError, ValueError) as error:
        print(f"plot: {error}", file=sys.stderr)
        return 2
    return 0


def _by_type(run: Run) -> _Types:
    """The types with most layers first."""
    types: _Types = {}
    names = frozenset(run.names)
    for i, name in enumerate(run.names):
        kind = type_of(name, names)
        types.setdefault(kind, []).append((layer_of(name, names) if kind != name else "", i))
    return dict(sorted(types.items(), key=lambda item: -len(item[1])))


def _short(kind: str) -> str:
    """What distinguishes a type from others: all after the layer's number."""
    return kind.rpartition("*.")[2] or kind


def _plot(axis: Any, run: Run, values: Tensor, **style: Any) -> None:
    """One line over at most _MAX_STEPS steps, evenly spaced up to the last."""
    last = len(run.steps) - 1
    stride = last // _MAX_STEPS + 1
    shown = slice(last % stride, None, stride)
    axis.plot(run.steps[shown], values[shown].tolist(), marker=None if last else ".", **style)


def _clipped(run: Run) -> tuple[Tensor, Tensor]:
    """Bool [S, K], twice: what was clipped, and what had a gradient, of which clip rates are a share."""
    has_gradient = run.norms != 0
    return (run.coefs != 1) & has_gradient, has_gradient


def _share(clipped: Tensor, has_gradient: Tensor, dim: int) -> Tensor:
    return clipped.sum(dim) / has_gradient.sum(dim).clamp(min=1)


def _draw_norms(figure: Any, run: Run, types: _Types) -> None:
    from matplotlib import colormaps

    norms = run.norms.where(run.norms.isfinite() & (run.norms > 0), math.nan)  # a gap on a logarithmic axis
    columns = min(4, len(types))
    height = math.ceil(min(len(types), _MAX_PANELS) / columns)
    figure.set_size_inches(4.2 * columns, 2.6 * height + 0.6)
    axes = figure.subplots(height, columns, squeeze=False).flat
    for axis in axes[len(types) :]:
        axis.set_visible(False)
    for axis, (kind, members) in zip(axes, types.items(), strict=False):
        for n, (layer, i) in enumerate(members):
            shade = n / max(1, len(members) - 1)
            _plot(axis, run, norms[:, i], color=colormaps["viridis"](shade), linewidth=1, label=layer)
        if norms[:, [i for _, i in members]].isfinite().any():
            axis.set_yscale("log")
        axis.set_title(_short(kind), fontsize=8)
        axis.tick_params(labelsize=7)
        if 1 < len(members) <= 6:
            axis.legend(fontsize=6)
    more = f" ({len(types) - len(axes)} more types not shown)" if len(types) > len(axes) else ""
    figure.suptitle(f"Gradient norm before clipping, by layer (dark: first){more}", fontsize=10)
    figure.supxlabel("step", fontsize=9)


def _draw_clip_rate(figure: Any, run: Run, types: _Types) -> None:
    figure.set_size_inches(8, 4)
    axis = figure.subplots()
    clipped, has_gradient = _clipped(run)
    _plot(axis, run, _share(clipped, has_gradient, 1), color="black", label="all components")
    for kind, members in list(types.items())[:6]:
        if 1 < len(members) < len(run.names):
            own = [i for _, i in members]
            rate = _share(clipped[:, own], has_gradient[:, own], 1)
            _plot(axis, run, rate, linewidth=0.8, alpha=0.7, label=_short(kind))
    if run.nonfinite.any():
        steps = [run.steps[i] for i in run.nonfinite.any(1).nonzero()]
        axis.plot(steps, [0.0] * len(steps), "rx", label="a norm is inf or NaN")
    axis.set(ylim=(-0.02, 1.02), xlabel="step", ylabel="share of components clipped")
    axis.legend(fontsize=7)


def _draw_heat_map(figure: Any, run: Run, types: _Types) -> None:
    layers = list(dict.fromkeys(layer for members in types.values() for layer, _ in members if layer)) or [""]
    kinds = [kind for kind, members in types.items() if any(layer for layer, _ in members)] or list(types)
    rate = _share(*_clipped(run), 0).tolist()
    table = [[math.nan] * len(kinds) for _ in layers]
    for x, kind in enumerate(kinds):
        for layer, i in types[kind]:
            table[layers.index(layer)][x] = rate[i]
    figure.set_size_inches(max(6.0, 0.35 * len(kinds) + 3), max(3.0, 0.3 * len(layers) + 2.5))
    axis = figure.subplots()
    image = axis.imshow(table, aspect="auto", vmin=0, vmax=1, cmap="magma")
    axis.set_xticks(range(len(kinds)), [_short(kind) for kind in kinds], rotation=90, fontsize=6)
    axis.set_yticks(range(len(layers)), layers, fontsize=6)
    figure.colorbar(image, ax=axis, label="share of steps clipped")
