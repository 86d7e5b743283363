"""Plots gradient norms over the steps, layer by layer, as the paper's figures."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure  # not pyplot, which wants a display
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from report import component_type

MAX_PANELS = 9
SMOOTHING = 9  # steps


def plot_norms(path: Path, model: nn.Module, names: tuple[str, ...], norms: Tensor, max_norm: float) -> Path:
    """Writes a PNG with one panel for each type of weight matrix and one line for each layer.

    Args:
        path: the file to write.
        names: of the K components.
        norms: [steps, K], before clipping.
        max_norm: the cap, drawn as a dashed line.

    Returns:
        `path`.
    """
    panels = _panels(model, names)
    layers = max(map(len, panels.values()))
    # The last tenth of viridis is too pale for a line on white.
    colours = ListedColormap(colormaps["viridis"](np.linspace(0.0, 0.9, layers)))
    columns = math.ceil(math.sqrt(len(panels)))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(1.2 + 3.6 * columns, 1.2 + 2.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axis, (title, indexes) in zip(axes.flat, panels.items(), strict=False):
        for layer, index in enumerate(indexes):
            steps, values = _smoothed(norms[:, index].numpy())
            axis.plot(steps, values, color=colours(layer), linewidth=1.1)
        if math.isfinite(max_norm):
            axis.axhline(max_norm, color="crimson", linestyle="--", linewidth=1.2, label=f"cap {max_norm:g}")
        axis.set_yscale("log")
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.25, linewidth=0.5)
    for axis in axes.flat[len(panels) - columns : len(panels)]:
        axis.tick_params(labelbottom=True)  # also where the last row ends before the panel's column
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle("Gradient norm of each weight matrix, before clipping", fontsize=13)
    figure.supxlabel("step", fontsize=10)
    figure.supylabel(f"norm (running median of {SMOOTHING} steps)", fontsize=10)
    scale = ScalarMappable(BoundaryNorm(np.arange(layers + 1) - 0.5, layers), colours)
    bar = figure.colorbar(scale, ax=axes, label="layer", ticks=range(0, layers, math.ceil(layers / 12)), pad=0.01)
    bar.minorticks_off()
    if math.isfinite(max_norm):
        axes.flat[0].legend(loc="best", fontsize=9)
    figure.savefig(path, dpi=150)
    return path


def _panels(model: nn.Module, names: tuple[str, ...]) -> dict[str, list[int]]:
    """Panel title -> the components drawn in it, first layer first; models without layers get one panel each."""
    dimensions = {name: parameter.dim() for name, parameter in model.named_parameters()}
    matrices = [(i, component_type(name, model)) for i, name in enumerate(names) if dimensions[name] >= 2]
    layered = [(i, kind) for i, kind in matrices if "*" in kind]
    panels: dict[str, list[int]] = {}
    for index, kind in layered or matrices:
        panels.setdefault(kind.rpartition("*.")[2], []).append(index)
    return dict(list(panels.items())[:MAX_PANELS])


def _smoothed(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Running median over the steps, at the middle of each window, because norms are noisy."""
    window = min(SMOOTHING, len(values))
    windows = np.lib.stride_tricks.sliding_window_view(values, window)
    return np.arange(len(windows)) + (window + 1) / 2, np.median(windows, axis=1)
