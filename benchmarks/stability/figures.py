"""The paper's figures, of all runs: scores, norms per layer and parameter type, clip rate, what is held back."""

from __future__ import annotations

import io
import math
from collections import defaultdict
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure  # not pyplot, which wants a display
from PIL import Image  # which matplotlib needs itself

from .gradients import place
from .runs import Run

MAX_TYPES = 6
SMOOTHING = 5  # steps

Runs = dict[str, list[Run]]


def scores(runs: Runs, metric: str, cutoff: float) -> bytes:
    """Every run's score, arm by arm; failed runs in red."""
    figure = Figure(figsize=(1.5 + 0.75 * max(4, len(runs)), 4.2), layout="constrained")
    axis = figure.subplots()
    rng = np.random.default_rng(0)
    for x, own in enumerate(runs.values()):
        for failed, colour in ((False, "tab:blue"), (True, "tab:red")):
            values = [run["score"] for run in own if run["failed"] == failed]
            axis.scatter(
                x + rng.uniform(-0.12, 0.12, len(values)), values, s=22, color=colour, alpha=0.75, linewidth=0
            )
        axis.hlines(np.mean([run["score"] for run in own]), x - 0.28, x + 0.28, color="black", linewidth=1.3)
    axis.axhline(cutoff, color="grey", linestyle="--", linewidth=1)
    axis.annotate(
        f"failed at or below {cutoff:.3g}", (0.995, cutoff), xycoords=("axes fraction", "data"), xytext=(0, 2),
        textcoords="offset points", ha="right", fontsize=8, color="dimgrey",
    )  # fmt: skip
    axis.set_xticks(
        range(len(runs)), list(runs), rotation=40 if len(runs) > 5 else 0, ha="right" if len(runs) > 5 else "center"
    )
    axis.set_xlim(-0.6, len(runs) - 0.4)
    axis.set_ylabel(f"{metric} on the dev set")
    axis.set_title("One dot a seed; red: failed; bar: mean", fontsize=11)
    axis.grid(axis="y", alpha=0.25, linewidth=0.5)
    return _png(figure)


def norms(runs: Runs, arms: list[str]) -> bytes:
    """Median norm of weight matrices over the steps: a column for each type, a line for each layer; failed, good."""
    rows = [(arm, failed) for arm in arms for failed in (True, False)]
    names = next(iter(runs.values()))[0]["components"]
    kinds = _types(names)
    layers = max(len(members) for members in kinds.values())
    colours = ListedColormap(colormaps["viridis"](np.linspace(0.0, 0.9, layers)))
    figure = Figure(figsize=(1.6 + 2.6 * len(kinds), 0.9 + 2.2 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(kinds), sharex=True, sharey=True, squeeze=False)
    for line, (arm, failed) in zip(axes, rows, strict=True):
        own = [run for run in runs[arm] if run["failed"] == failed]
        word = "failed" if failed else "good"
        line[0].set_ylabel(f"{arm}\n{len(own)} {word}", fontsize=9)
        for axis, (title, members) in zip(line, kinds.items(), strict=True):
            if axis in axes[0]:
                axis.set_title(title, fontsize=9)
            axis.grid(alpha=0.25, linewidth=0.5)
            if not own:
                axis.text(0.5, 0.5, f"no {word} run", transform=axis.transAxes, ha="center", color="grey", fontsize=9)
                continue
            middle = _median([run["norms"] for run in own])
            for layer, column in enumerate(members):
                steps, values = _smoothed(np.array(own[0]["norm_steps"]), middle[:, column])
                axis.plot(steps, np.where(values > 0, values, np.nan), color=colours(layer), linewidth=1.1)
    if any(
        line.get_ydata().size and np.isfinite(line.get_ydata()).any() for axis in axes.flat for line in axis.lines
    ):
        axes[0, 0].set_yscale("log")
    figure.suptitle("Gradient norm before clipping, median run", fontsize=12)
    figure.supxlabel("step", fontsize=9)
    scale = ScalarMappable(BoundaryNorm(np.arange(layers + 1) - 0.5, layers), colours)
    bar = figure.colorbar(scale, ax=axes, label="layer", ticks=range(0, layers, math.ceil(layers / 12)), pad=0.01)
    bar.minorticks_off()
    return _png(figure)


def clip_rate(runs: Runs) -> bytes:
    """Share of components clipped, and share of the gradient kept, over the steps; failed runs apart."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)  # or a label touches the panel beside it
    panels = (("clip_rate", "share of components clipped"), ("kept", "share of the gradient's norm kept"))
    colours = colormaps["tab20" if len(runs) > 10 else "tab10"]
    for axis, (field, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for i, (arm, own) in enumerate(runs.items()):
            for failed, style in ((False, "-"), (True, ":")):
                some = [run for run in own if run["failed"] == failed]
                if some:
                    middle = _median([run[field] for run in some])
                    steps, values = _smoothed(np.arange(1, len(middle) + 1), middle)
                    name = f"{arm}, {len(some)} {'failed' if failed else 'good'}"
                    axis.plot(steps, values, style, color=colours(i), linewidth=1.2, label=name)
        axis.set_xlabel("step")
        axis.set_ylabel(label)
        axis.grid(alpha=0.25, linewidth=0.5)
        axis.set_ylim(-0.03, 1.03)
    figure.axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.suptitle("Clipping over the steps, median run", fontsize=11)
    return _png(figure)


def held_back(runs: Runs) -> bytes:
    """For each arm the coefficient of each component, the median over runs and steps: layers below, types beside."""
    names = next(iter(runs.values()))[0]["components"]
    layered: dict[str, dict[int, int]] = defaultdict(dict)
    for i, name in enumerate(names):
        layer, kind = place(name)
        layered[".".join(kind.split(".")[-3:]) if layer is None else kind][layer or 0] = i
    layers = 1 + max(layer for members in layered.values() for layer in members)
    size = (1.2 + 3.2 + len(runs) * 0.42 * layers, 1.2 + 0.21 * len(layered))
    figure = Figure(figsize=size, layout="constrained")
    for axis, (arm, own) in zip(
        figure.subplots(1, len(runs), sharey=True, squeeze=False)[0], runs.items(), strict=True
    ):
        norms = np.concatenate([np.array(run["norms"], dtype=float) for run in own])
        coefs = np.nanmedian(np.minimum(1.0, own[0]["cap"] / np.maximum(norms, 1e-12)), axis=0)
        table = np.full((len(layered), layers), np.nan)
        for row, members in enumerate(layered.values()):
            for layer, i in members.items():
                table[row, layer] = coefs[i]
        image = axis.imshow(table, vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto")
        axis.set_title(arm, fontsize=10)
        axis.set_xlabel("layer")
        axis.set_xticks(range(layers))
        axis.set_yticks(range(len(layered)), list(layered), fontsize=7)
    figure.colorbar(image, ax=figure.axes, label="coefficient (1: not clipped)", pad=0.01)
    figure.suptitle("What each component keeps: median over steps and runs", fontsize=11)
    return _png(figure)


def _types(names: list[str]) -> dict[str, list[int]]:
    """Type of a weight matrix -> its components, first layer first; where nothing has layers, each by itself."""
    found: dict[str, list[int]] = defaultdict(list)
    for i, name in enumerate(names):
        layer, kind = place(name)
        if layer is not None and kind.endswith(".weight") and "norm" not in name.lower():
            found[kind.removesuffix(".weight").replace("attention.", "att. ")].append(i)
    if not found:
        found.update({name: [i] for i, name in enumerate(names) if name.endswith("weight")} or {names[0]: [0]})
    return dict(list(found.items())[:MAX_TYPES])


def _median(values: list[Any]) -> np.ndarray:
    """Over runs; what was not finite (null) counts as infinitely large."""
    table = np.array(values, dtype=float)
    return np.median(np.where(np.isnan(table), np.inf, table), axis=0)


def _smoothed(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Running median, at the middle of each window."""
    window = min(SMOOTHING, len(values))
    windows = np.lib.stride_tricks.sliding_window_view(values, window)
    return steps[window // 2 :][: len(windows)], np.median(windows, axis=1)


def _png(figure: Figure) -> bytes:
    """In 256 colours, as many as a report's pictures need: a third of the bytes."""
    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", dpi=100)
    Image.open(full).convert("RGB").quantize(256).save(small, format="png", optimize=True)
    return small.getvalue()
