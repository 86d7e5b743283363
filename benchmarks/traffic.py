"""DRAM bytes of one clip, from Nsight Compute's counters, beside the bytes that must be moved.

``python benchmarks/traffic.py`` runs ``ncu`` on itself: the inner run clips once per set, case and method, with a
marker kernel before each clip. Bytes left in L2 at a kernel's end are written later and not counted: up to the size
of L2 may be missing.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from _lib.gradients import Gradients, clipped_share
from _lib.measure import clock_for
from _lib.options import add_choices, chosen_backends, chosen_sets, chosen_torch
from _lib.providers import Provider, explain, ours, set_environment
from _lib.runs import variant
from _lib.shapes import ShapeSet

READ, WRITE = "dram__bytes_read.sum", "dram__bytes_write.sum"
UNITS = {"byte": 1, "Kbyte": 10**3, "Mbyte": 10**6, "Gbyte": 10**9}
MARKER = "spin_kernel"  # torch.cuda._sleep's
SETS = ("bert-base", "roberta-large:bfloat16")

Step = tuple[ShapeSet, torch.dtype, str, Provider]


@dataclass
class Kernel:
    """One kernel as ncu saw it: its name and the bytes it read from DRAM and wrote there."""

    name: str
    read: float = 0.0
    written: float = 0.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs ncu on the inner run, reads what it wrote, prints the table."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _parse(arguments)
    if options.inner:
        for step in _steps(options):
            _clip_once(step, options)
        return
    ncu = shutil.which(options.ncu)
    if ncu is None:
        sys.exit(f"traffic.py: no {options.ncu} here: it comes with the CUDA toolkit, as Nsight Compute")
    options.csv.unlink(missing_ok=True)
    command = [ncu, "--csv", "--print-units", "base", "--log-file", str(options.csv), "--metrics", f"{READ},{WRITE}"]
    # Caches as the inner run left them, clocks as they are, and nothing but the one call of each step.
    command += ["--cache-control", "none", "--clock-control", "none", "--profile-from-start", "off"]
    done = subprocess.run([*command, sys.executable, __file__, "--inner", *arguments], check=False)
    text = options.csv.read_text() if options.csv.exists() else ""
    found = by_step(kernels_in(text))
    steps = list(_steps(options))
    if done.returncode or len(found) != len(steps):
        said = [line for line in text.splitlines() if line.startswith("==ERROR==")]
        saw = f"traffic.py: ncu (exit {done.returncode}) saw {len(found)} of {len(steps)} clips"
        sys.exit("\n".join([saw, *said]))
    _print(Console(width=120, highlight=False), steps, found)


def kernels_in(text: str) -> list[Kernel]:
    """The kernels in ncu's CSV, in the order they ran.

    Raises:
        ValueError: a unit that isn't one of bytes.
    """
    lines = text.splitlines()
    header = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    kernels: dict[str, Kernel] = {}
    # ncu's own messages, which start with ==, may stand between the rows as well.
    for row in csv.DictReader(line for line in lines[header:] if line.startswith('"')):
        kernel = kernels.setdefault(row["ID"], Kernel(row["Kernel Name"]))
        if row["Metric Name"] in (READ, WRITE):
            if row["Metric Unit"] not in UNITS:
                raise ValueError(f"{row['Metric Name']} in {row['Metric Unit']!r}, not in bytes")
            amount = float(row["Metric Value"].replace(",", "")) * UNITS[row["Metric Unit"]]
            if row["Metric Name"] == READ:
                kernel.read = amount
            else:
                kernel.written = amount
    return list(kernels.values())


def by_step(kernels: Iterable[Kernel]) -> list[list[Kernel]]:
    """The kernels of each step: those after one marker, up to the next."""
    steps: list[list[Kernel]] = []
    for kernel in kernels:
        if MARKER in kernel.name:
            steps.append([])
        elif steps:
            steps[-1].append(kernel)
    return steps


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    # One of torch's ways, with few launches: ncu takes its time over each.
    add_choices(parser, SETS, ["tolist"])
    parser.add_argument("--csv", type=Path, default=Path("ncu.csv"), help="where ncu writes (default ncu.csv)")
    parser.add_argument("--ncu", default="ncu", help="Nsight Compute's program")
    parser.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _steps(options: argparse.Namespace) -> Iterator[Step]:
    """Set, dtype, case and method of each clip, the same in the inner and the outer run."""
    tiny = [("weight", torch.nn.Parameter(torch.zeros(1, device=options.device)))]
    tiny[0][1].grad = torch.zeros(1, device=options.device)
    ours_here: list[Provider] = []
    for spec in chosen_backends(options):
        try:
            explain(tiny, spec)
        except (RuntimeError, ValueError) as refusal:
            if not options.inner:
                print(f"skipped: {spec}: {refusal}")
        else:
            ours_here += ours(spec, ["clipper"])
    for shape_set, dtype in chosen_sets(options):
        for case in options.clipped:
            for provider in (*chosen_torch(options, shape_set), *ours_here):
                if provider.componentwise or case != "half":
                    yield shape_set, dtype, case, provider


def _clip_once(step: Step, options: argparse.Namespace) -> None:
    """One step, with the counters on for the marker and the call alone."""
    shape_set, dtype, case, provider = step
    gradients = _gradients(shape_set, dtype, options.device, options.seed)
    one = variant(provider, gradients, case)
    clock = clock_for(options.device)
    one.before(0)
    one.call()  # kernels are compiled and plans made
    one.before(0)
    clock.settle(clock.scratch)  # nothing of the gradients in L2, and nothing to be written back
    on_gpu = options.device.type == "cuda"
    sleep: Callable[[int], None] = torch.cuda._sleep if on_gpu else lambda cycles: None
    counting: AbstractContextManager[None] = _counting() if on_gpu else nullcontext()
    with counting:
        sleep(1)
        one.call()
    set_environment({})


@lru_cache(maxsize=1)  # steps come set by set
def _gradients(shape_set: ShapeSet, dtype: torch.dtype, device: torch.device, seed: int) -> Gradients:
    return Gradients(shape_set, dtype, device, seed=seed)


@contextmanager
def _counting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    yield
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def _print(console: Console, steps: Sequence[Step], found: Sequence[Sequence[Kernel]]) -> None:
    console.print("DRAM bytes of one call, in units of N, the gradients' bytes; floor: N read, clipped bytes written")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("clipped", "kernels", "read", "written", "sum", "floor", "floor / sum"):
        table.add_column(heading, justify="right", no_wrap=True)
    for index, ((shape_set, dtype, case, provider), kernels) in enumerate(zip(steps, found, strict=True)):
        nbytes = shape_set.nbytes(dtype)
        if index == 0 or steps[index - 1][:3] != steps[index][:3]:
            name = str(dtype).removeprefix("torch.")
            table.add_section()
            table.add_row(f"{shape_set.name}, {name}, {nbytes / 1e6:.1f} MB", case)
        read, written = (sum(each) / nbytes for each in ([k.read for k in kernels], [k.written for k in kernels]))
        floor = 1.0 + clipped_share(shape_set, case)
        total = read + written
        cells = [f"{value:.2f}" for value in (read, written, total, floor)]
        table.add_row(f"  {provider.label}", "", str(len(kernels)), *cells, f"{floor / total:.0%}" if total else "-")
    console.print(table)


if __name__ == "__main__":
    main()
