"""The pictures of these pages, drawn from the library itself: python docs/plots.py writes docs/img/."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch

from cwclip_kernels import ComponentClipper, ComponentSpec, thresholds

matplotlib.use("svg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent / "img"
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
    "svg.hashsalt": "cwclip_kernels",  # the same bytes at every run
}
STEPS = 300
NAMES = (
    "embed.weight",
    *(f"h.{i}.{leaf}" for i in range(2) for leaf in ("attn.qkv.weight", "attn.qkv.bias", "mlp.weight", "mlp.bias")),
    "head.weight",
)
GROUPINGS = {
    '"parameter"': None,
    '"module"': "module",
    '"layer"': "layer",
    '"type"': "type",
    '"all"': "all",
    'ComponentSpec("layer")\n.split("*.qkv.weight", ...)': ComponentSpec("layer").split(
        "*.qkv.weight", sizes=(2, 2, 2), names=("q", "k", "v")
    ),
}


def components() -> None:
    """Which parameters each grouping clips together: one column a grouping, one colour a component."""
    named = [(name, torch.nn.Parameter(torch.zeros(6, 1))) for name in NAMES]
    figure, axes = plt.subplots(figsize=(9.5, 4.4))
    colours = plt.get_cmap("tab20")
    for column, (title, grouping) in enumerate(GROUPINGS.items()):
        clipper = ComponentClipper(named, 1.0, components=grouping)
        axes.text(column + 0.5, -0.25, title, ha="center", va="bottom", family="monospace", fontsize=7.5)
        for position, component, place in clipper.members:
            top, height = (position, 1.0) if not place else (position + place[0][1] / 6, place[0][2] / 6)
            colour = colours(component % 20)
            axes.add_patch(plt.Rectangle((column + 0.04, top + 0.03), 0.92, height - 0.06, color=colour, alpha=0.55))
            label = clipper.names[component]
            axes.text(column + 0.5, top + height / 2, label, ha="center", va="center", fontsize=5.8)
    axes.set_xlim(0, len(GROUPINGS))
    axes.set_ylim(len(NAMES), -1.1)
    axes.set_yticks([i + 0.5 for i in range(len(NAMES))], NAMES, family="monospace")
    axes.set_xticks([])
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    _save(figure, "components")


def norms() -> torch.Tensor:
    """Norms of one component over training: a fall, a plateau, noise, and three spikes."""
    generator = torch.Generator().manual_seed(2)
    steps = torch.arange(STEPS, dtype=torch.float64)
    level = 0.25 + 1.2 * torch.exp(-steps / 40)
    values = level * torch.exp(0.25 * torch.randn(STEPS, generator=generator, dtype=torch.float64))
    for step, factor in ((90, 6.0), (180, 12.0), (181, 5.0), (250, 3.0)):
        values[step] *= factor
    return values


def caps(kind: thresholds.Threshold | float) -> tuple[torch.Tensor, torch.Tensor]:
    """Caps of the steps, and norms after clipping."""
    weight = torch.nn.Parameter(torch.full((1,), 20.0, dtype=torch.float64))
    clipper = ComponentClipper([weight], kind)
    found, after = [], []
    for norm in norms():
        weight.grad = norm.reshape(1).clone()
        result = clipper.clip_()
        found.append(result.caps.reshape(-1)[0].item())
        after.append(weight.grad.abs().item())
    return torch.tensor(found), torch.tensor(after)


def draw_thresholds() -> None:
    """Each threshold on the same norms: a panel each, caps as a line, what is cut off in red."""
    kinds = {
        "0.5": 0.5,
        "Schedule(lambda step: 1.5 / (1 + step / 30))": thresholds.Schedule(lambda step: 1.5 / (1 + step / 30)),
        "ParamRelative(0.02)": thresholds.ParamRelative(0.02),
        "EMA(warmup_steps=30)": thresholds.EMA(warmup_steps=30),
        "ZScore()": thresholds.ZScore(),
        "Percentile(50.0)": thresholds.Percentile(50.0),
    }
    figure, panels = plt.subplots(2, 3, figsize=(9.5, 4.6), sharex=True, sharey=True, layout="constrained")
    before = norms()
    for axes, (title, kind) in zip(panels.flat, kinds.items(), strict=True):
        found, after = caps(kind)
        axes.plot(before, color="tab:red", linewidth=0.9, label="norm before clipping")
        axes.plot(after, color="tab:blue", linewidth=0.9, label="and after")
        axes.plot(found, color="black", linewidth=1.3, linestyle="--", label="cap")
        axes.set_yscale("log")
        axes.set_title(title, family="monospace", fontsize=7.5)
        axes.grid(alpha=0.25)
    figure.supxlabel("step", fontsize=9)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    _save(figure, "thresholds")


def _save(figure: plt.Figure, name: str) -> None:
    FOLDER.mkdir(exist_ok=True)
    figure.savefig(FOLDER / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    with plt.rc_context(STYLE):
        components()
        draw_thresholds()
