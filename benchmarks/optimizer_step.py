"""AdamW's step with clipping by component: in one pass, or clip first and step then.

``python benchmarks/optimizer_step.py`` prints, for each shape set with none and all of the components clipped, the
time of torch's fused AdamW alone, of the same after each way to clip, and of ``ComponentClipAdamW``, which clips as
it steps. All rows of a table are measured in the same rounds, on the same parameters and states; Python is included.
On a GPU times are the device's, and "host" is the time until the call returned.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

from _lib.gradients import Cap, Gradients
from _lib.machine import metadata
from _lib.measure import Ceilings, Timing, Variant, clock_for, interleave
from _lib.options import count, names
from _lib.report import print_metadata
from _lib.shapes import SETS, ShapeSet
from cwclip_kernels import ComponentClipper
from cwclip_kernels.optim import ComponentClipAdamW

DEFAULT_SETS = ("minilm-l6", "lora-384", "bert-large")
CASES = ("none", "all")
LABELS = {
    "step": "torch's fused AdamW, no clipping",
    "ours": "ComponentClipAdamW",
    "clip": "ComponentClipper, then torch's",
    "global": "one global clip_grad_norm_, then torch's",
    "loop": "loop of clip_grad_norm_, then torch's",
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=names(sorted(SETS)), default=DEFAULT_SETS, help=f"default: {DEFAULT_SETS}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of parameters")
    parser.add_argument("--state-dtype", choices=("same", "float32"), default="same", help="of our running means")
    parser.add_argument(
        "--backends", type=_backends, default=(None,), help='of ours, e.g. "cuda,triton" (default: the best)'
    )
    parser.add_argument("--rounds", type=count, default=20, help="timed rounds (default 20)")
    parser.add_argument("--threads", type=count, help="CPU threads (default: torch's choice)")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, each round's time included")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints, writes."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console(width=120, highlight=False)
    facts = metadata(options.device)
    print_metadata(console, facts)
    found = []
    for name in options.sets:
        for case in CASES:
            timings, ceilings = measure(SETS[name], case, options)
            _print(console, f"{SETS[name].description}: {case} clipped", timings, ceilings)
            host_ms = {key: timing.host_median for key, timing in timings.items()}
            found.append(
                {
                    "set": name,
                    "case": case,
                    "dtype": options.dtype,
                    "state_dtype": options.state_dtype,
                    "ms": {key: timing.samples for key, timing in timings.items()},
                    "host_ms": host_ms,
                    "floor_ms": floor(ceilings),
                    "ceilings": {key: timing.samples for key, timing in ceilings.items()},
                }
            )
        if options.json:  # after every set, so that an interrupted run leaves its results
            options.json.write_text(json.dumps({"machine": facts, "results": found}, indent=1) + "\n")


def measure(
    shape_set: ShapeSet, case: str, options: argparse.Namespace
) -> tuple[dict[str, Timing], dict[str, Timing]]:
    """Timings of each way, and of the ceilings, which move as many bytes as the gradients have."""
    gradients = Gradients(shape_set, getattr(torch, options.dtype), options.device)
    named = [(name, nn.Parameter(torch.randn_like(p.grad) * 0.02)) for name, p in gradients.named]
    for (_, p), grad in zip(named, gradients.current, strict=True):
        p.grad = grad
    variants = [
        Variant(key, lambda turn: gradients.restore(), call, lambda: gradients.current)
        for key, call in ways(named, gradients.cap(case), options).items()
    ]
    own = Ceilings(shape_set.nbytes(gradients.current[0].dtype), options.device)
    timings = interleave([*variants, *own.variants()], clock_for(options.device), options.rounds)
    ceilings = own.take(timings)
    return {variant.key: timings[variant.key] for variant in variants}, ceilings


def ways(
    named: list[tuple[str, nn.Parameter]], cap: Cap, options: argparse.Namespace
) -> dict[str, Callable[[], object]]:
    """What is compared. The optimizers share their states, as far as these have one dtype, to save memory."""
    parameters = [p for _, p in named]
    theirs = AdamW(parameters, lr=1e-5, fused=True)
    theirs.step()
    state_dtype = torch.float32 if options.state_dtype == "float32" else None

    def ours(backend: str | None) -> Callable[[], object]:
        optimizer = ComponentClipAdamW(named, lr=1e-5, max_norm=cap, state_dtype=state_dtype, backend=backend)
        if state_dtype is None or options.dtype == "float32":
            optimizer.state.update(theirs.state)
        return optimizer.step

    clipper = ComponentClipper(named, cap)

    def after(clip: Callable[[], object]) -> Callable[[], object]:
        def clip_and_step() -> None:
            clip()
            theirs.step()

        return clip_and_step

    def loop() -> None:
        for p in parameters:
            clip_grad_norm_([p], cap)

    return {
        "step": theirs.step,
        **{_key(backend): ours(backend) for backend in options.backends},
        "clip": after(clipper.clip_),
        "global": after(lambda: clip_grad_norm_(parameters, cap)),
        "loop": after(loop),
    }


def floor(ceilings: dict[str, Timing]) -> float:
    """Time to read four and write three times the gradients' bytes, as AdamW does in one dtype, at the best speed."""
    return 3.5 * min(ceilings[key].min for key in Ceilings.WRITE)


def _backends(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _key(backend: str | None) -> str:
    return "ours" if backend is None else f"ours/{backend}"


def _label(key: str) -> str:
    return LABELS[key] if key in LABELS else f"{LABELS['ours']} ({key.partition('/')[2]})"


def _print(console: Console, title: str, timings: dict[str, Timing], ceilings: dict[str, Timing]) -> None:
    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    table.add_column("")
    step = timings["step"]
    ours = next(timing for key, timing in timings.items() if key.startswith("ours"))
    host = ["host ms"] if step.host else []
    for column in ("min ms", "median ms", *host, "min / step alone", "median / step alone", "times ours (median)"):
        table.add_column(column, justify="right")
    for key, own in timings.items():
        ratios = own.min / step.min, own.median / step.median, own.median / ours.median
        waited = [] if own.host_median is None else [f"{own.host_median:.3f}"]
        times = f"{own.min:.3f}", f"{own.median:.3f}", *waited
        table.add_row(_label(key), *times, *(f"{ratio:.2f}" for ratio in ratios))
    table.add_row("reads of 4 and writes of 3 times the bytes, at mul_'s speed", f"{floor(ceilings):.3f}")
    console.print(table)


if __name__ == "__main__":
    main()
