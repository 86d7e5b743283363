"""The demo's tables."""

from __future__ import annotations

from argparse import Namespace
from collections import defaultdict
from itertools import groupby

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from timing import OURS, UNCLIPPED, Row, StepTimes

OPTIMIZERS = {
    "torch": "torch.optim.AdamW, after clipping",
    "fused": "ComponentClipAdamW, which clips in its step",
}


def component_type(name: str, model: nn.Module) -> str:
    """What the same component of every layer shares: `encoder.layer.*.output.dense.weight`."""
    return ".".join("*" if part.isdigit() else part for part in short_name(name, model).split("."))


def short_name(name: str, model: nn.Module) -> str:
    """A parameter's name without the part that all of the encoder's have in common, such as `bert.`."""
    return name.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.")


def print_header(
    console: Console, model: nn.Module, args: Namespace, training: int, held_out: int, backend: str
) -> None:
    """Model, device, data and settings."""
    parameters = list(model.parameters())
    device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else f"{args.device}"
    threads = f", {torch.get_num_threads()} threads" if args.device.type == "cpu" else ""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in {
        "model": f"{args.model}, {sum(p.numel() for p in parameters) / 1e6:.1f} M parameters",
        "device": f"{device}{threads}, torch {torch.__version__}",
        "task": "from which part of the Python standard library is a docstring?",
        "data": f"{training} docstrings to train on, {held_out} held out",
        "clipping": f"each of {len(parameters)} components by itself, to a norm of {args.max_norm:g}",
        "optimizer": OPTIMIZERS[args.optimizer],
        "backend": backend,
    }.items():
        table.add_row(key, escape(value))
    console.print(table)
    console.print()


def print_components(
    console: Console, model: nn.Module, names: tuple[str, ...], norms: Tensor, max_norm: float
) -> None:
    """Norms and how often each type of component was clipped.

    Args:
        names: of the K components.
        norms: [steps, K], before clipping.
        max_norm: the cap of each.
    """
    clipped = norms + 1e-6 > max_norm
    columns: dict[str, list[int]] = defaultdict(list)
    for column, name in enumerate(names):
        columns[component_type(name, model)].append(column)

    table = _table(f"Gradient norms before clipping, {len(norms)} steps")
    table.add_column("component", overflow="fold")
    for heading in ("number", "median", "max", "clipped"):
        table.add_column(heading, justify="right", no_wrap=True)
    for stem, types in groupby(columns, key=lambda kind: kind[: kind.rfind("*") + 1]):
        if stem:  # the layers' shared part on a line of its own: the full names are too long for 80 columns
            table.add_section()
            table.add_row(f"[bold]{escape(stem)}")
        for kind in types:
            own = norms[:, columns[kind]]
            share = clipped[:, columns[kind]].float().mean().item()
            label = "  " + kind[len(stem) + 1 :] if stem else kind
            table.add_row(escape(label), f"{own.shape[1]}", f"{own.median():.2g}", f"{own.max():.2g}", f"{share:.0%}")
        table.add_section()
    table.add_row(
        "[bold]all",
        f"{len(names)}",
        f"{norms.median():.2g}",
        f"{norms.max():.2g}",
        f"{clipped.float().mean():.0%}",
    )
    console.print(table)


def print_accuracy(console: Console, held_out: int, *, always: float, before: float, after: float) -> None:
    """Accuracy on the held-out examples, beside that without training."""
    table = _table(f"Accuracy on {held_out} held-out docstrings")
    table.add_column("")
    table.add_column("accuracy", justify="right")
    table.add_row("always the most common family", f"{always:.1%}")
    table.add_row("before training", f"{before:.1%}")
    table.add_row("[bold]after training", f"[bold]{after:.1%}")
    console.print(table)


def print_timing(console: Console, rows: list[Row], rounds: int) -> None:
    """One section per case; ratios are of the shortest rounds."""
    table = _table(f"Clipping this model's gradients, {rounds} interleaved rounds")
    table.add_column("", overflow="fold")
    for heading in ("min ms", "median ms", "ratio to ours"):
        table.add_column(heading, justify="right", no_wrap=True)
    for case, group in groupby(rows, key=lambda row: row.case):
        same = list(group)
        [ours] = [row for row in same if row.way == OURS]
        table.add_row(f"[bold]{case}")
        for row in same:
            table.add_row(f"  {row.way}", f"{row.best:.2f}", f"{row.median:.2f}", f"{row.best / ours.best:.1f} x")
        table.add_section()
    console.print(table)


def print_steps(console: Console, times: StepTimes, steps: int) -> None:
    """What each way to clip adds to a training step without clipping."""
    alone = times.update[UNCLIPPED]
    whole = times.model + alone
    table = _table(f"Clipping and AdamW's step: median of {steps} training steps with each way, in turns")
    table.add_column("", overflow="fold")
    for heading in ("update ms", "clipping ms", "of the step"):
        table.add_column(heading, justify="right", no_wrap=True)
    for way, taken in times.update.items():
        added = ("", "") if way == UNCLIPPED else (f"{taken - alone:+.1f}", f"{(taken - alone) / whole:+.1%}")
        table.add_row(way, f"{taken:.1f}", *added)
    console.print(table)
    console.print(f"Forward and backward pass take {times.model:.0f} ms, a step without clipping {whole:.0f} ms.\n")


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
