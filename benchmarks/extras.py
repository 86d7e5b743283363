"""The cost of loss scales, slices, thresholds and recording, beside a plain clip of the same gradients.

``python benchmarks/extras.py`` prints, for one model's gradients with every component clipped: unscaling in the same
pass against torch's methods, slices against whole tensors, thresholds against a number, recording against none. All
rows of a table are measured in the same rounds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from _lib.gradients import Gradients
from _lib.machine import metadata
from _lib.measure import Variant, clock_for, interleave
from _lib.options import count
from _lib.report import print_metadata
from _lib.shapes import SETS
from cwclip_kernels import ComponentClipper, ComponentSpec
from cwclip_kernels.telemetry import ClipRecorder
from cwclip_kernels.thresholds import EMA, FromGlobal, ParamRelative, Percentile, ZScore

INVERSE = 2.0**-16


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--set", choices=sorted(SETS), default="minilm-l6", help="whose gradients (default: minilm-l6)"
    )
    parser.add_argument("--rounds", type=count, default=20, help="timed rounds (default 20)")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, each round's time included")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints, writes."""
    options = parse(arguments)
    console = Console(width=110, highlight=False)
    facts = metadata(options.device)
    print_metadata(console, facts)
    clock = clock_for(options.device)
    shape_set = SETS[options.set]
    gradients = Gradients(shape_set, torch.float32, options.device)
    result: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as open_files:
        tables = {
            "loss scale": loss_scale(gradients),
            "slices": slices(gradients),
            "thresholds": threshold_kinds(gradients, options.rounds),
            "recording": recording(gradients, Path(folder), open_files),
        }
        for title, calls in tables.items():
            timings = interleave([_variant(gradients, *item) for item in calls.items()], clock, options.rounds)
            result[title] = {key: timings[key].samples for key in calls}
            _print(console, f"{shape_set.description}: {title}", result[title])
    if options.json:
        options.json.write_text(json.dumps({"machine": facts, "set": shape_set.name, "ms": result}, indent=1) + "\n")


Calls = dict[str, Callable[[], object]]


def loss_scale(gradients: Gradients) -> Calls:
    """Unscaling and clipping; the first is what the others are compared with."""
    device = gradients.current[0].device
    inverse = torch.tensor(INVERSE, device=device)
    found = torch.zeros((), device=device)
    # The cap applies to the unscaled gradients.
    cap = INVERSE * float(min(gradients.norms)) / 2
    clipper = ComponentClipper(gradients.named, cap)
    parameters = [p for _, p in gradients.named]

    def unscale() -> None:
        torch._amp_foreach_non_finite_check_and_unscale_(gradients.current, found, inverse)

    def loop() -> None:
        unscale()
        for p in parameters:
            torch.nn.utils.clip_grad_norm_([p], cap)

    def foreach() -> None:
        unscale()
        norms = torch.stack(torch._foreach_norm(gradients.current))
        coefs = (cap / (norms + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients.current, coefs.unbind())

    def ours_after() -> None:
        unscale()
        clipper.clip_()

    return {
        "ours, in one pass": lambda: clipper.clip_(inv_scale=inverse, found_inf=found),
        "torch's unscaling, then ours": ours_after,
        "torch's unscaling, then _foreach_norm + _foreach_mul_": foreach,
        "torch's unscaling, then the loop of clip_grad_norm_": loop,
    }


def slices(gradients: Gradients) -> Calls:
    """Whole tensors, and the matrices among them in slices."""
    matrices = [(name, p.shape) for name, p in gradients.named if p.ndim == 2]

    def cut(dim: int, pieces: int) -> ComponentSpec:
        spec = ComponentSpec()
        for name, shape in matrices:
            if shape[dim] % pieces == 0:
                spec = spec.split(name, shape[dim] // pieces, dim=dim)
        return spec

    specs = {
        "whole tensors": ComponentSpec(),
        "matrices in 3 slices of rows (q, k, v)": cut(0, 3),
        "matrices in 12 slices of rows (heads)": cut(0, 12),
        "every row of every matrix": ComponentSpec().unitwise("*"),
        "matrices in 3 slices of columns": cut(1, 3),
    }
    clippers = {key: ComponentClipper(gradients.named, 1e-3, components=spec) for key, spec in specs.items()}
    return {f"{key}, K = {len(clipper.names):,}": clipper.clip_ for key, clipper in clippers.items()}


def threshold_kinds(gradients: Gradients, rounds: int) -> Calls:
    """A number as cap, and thresholds that compute their caps."""
    cap = float(min(gradients.norms)) / 2
    given = {
        "a number": cap,
        "FromGlobal": FromGlobal(cap),
        "EMA, during warm-up": EMA(warmup_steps=10 * rounds, warmup_norm=cap),
        "EMA, after warm-up": EMA(warmup_steps=0),
        "ZScore": ZScore(),
        "Percentile": Percentile(),
        "ParamRelative": ParamRelative(),
    }
    # ParamRelative reads the parameters, so these must be as large as the gradients.
    parameters = [(name, torch.nn.Parameter(torch.zeros_like(p.grad))) for name, p in gradients.named]
    clippers = {}
    for key, max_norm in given.items():
        clippers[key] = ComponentClipper(gradients.named if key != "ParamRelative" else parameters, max_norm)

    def relative() -> None:
        for (_, own), grad in zip(parameters, gradients.current, strict=True):
            own.grad = grad
        clippers["ParamRelative"].clip_()

    calls: Calls = {key: clipper.clip_ for key, clipper in clippers.items()}
    calls["ParamRelative"] = relative
    return calls


def recording(gradients: Gradients, folder: Path, open_files: ExitStack) -> Calls:
    """A clip, and one whose result is recorded."""
    clipper = ComponentClipper(gradients.named, float(min(gradients.norms)) / 2)
    recorders = {
        every: open_files.enter_context(ClipRecorder(folder / f"every{every}", every=every)) for every in (10_000, 1)
    }
    calls: Calls = {"not recorded": clipper.clip_}
    calls["recorded, not drained in this call"] = lambda: recorders[10_000].record(clipper.clip_())
    calls["recorded, drained to JSON lines in this call"] = lambda: recorders[1].record(clipper.clip_())
    return calls


def _variant(gradients: Gradients, key: str, call: Callable[[], object]) -> Variant:
    return Variant(key, lambda turn: gradients.restore(), call, lambda: gradients.current)


def _print(console: Console, title: str, samples: dict[str, list[float]]) -> None:
    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    table.add_column("")
    for column in ("min ms", "median ms", "min / first row's"):
        table.add_column(column, justify="right")
    first = min(next(iter(samples.values())))
    for key, times in samples.items():
        median = sorted(times)[len(times) // 2]
        table.add_row(key, f"{min(times):.3f}", f"{median:.3f}", f"{min(times) / first:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
