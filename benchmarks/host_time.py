"""Host time per call: many tiny gradients, so that Python and per-tensor work are all that is measured.

    python benchmarks/host_time.py                      # this checkout
    python benchmarks/host_time.py --against PATH       # and another one, alternating
    python benchmarks/host_time.py --cuda               # the CUDA backend too, without a GPU and without launches

Each run is a process, with one thread by default; its figure is its fastest round. Shown are the medians of the runs
and the fastest of them. ``--cuda`` takes the suite's stand-in for a GPU, compiled first, and skips its kernels.
What is left is what the host does for a call, but for CUDA's own functions: the launches, and four that ask about the
current device and stream.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from _lib.machine import metadata

ROOT = Path(__file__).parent.parent


def parameters(shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    made = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.randn_like(parameter) * 1e-6
    return made


def cases(stand_in: Path | None) -> Iterator[tuple[str, Callable[[], object]]]:
    from cwclip_kernels import ComponentClipper, fused_component_clip_

    for count in (200, 2000):
        tiny = parameters([(8,)] * count)
        clipper = ComponentClipper(tiny, 1.0)
        yield f"clip_(), {count} tensors of 8", clipper.clip_
        yield f"fused_component_clip_, {count} tensors of 8", lambda tiny=tiny: fused_component_clip_(tiny, 1.0)
    tiny = parameters([(8,)] * 200)
    strict = ComponentClipper(tiny, 1.0, error_if_nonfinite=True)
    yield "clip_() with error_if_nonfinite, 200 tensors of 8", strict.clip_
    clipper = ComponentClipper(tiny, 1.0)
    gradient = tiny[0].grad

    def alternating() -> None:
        tiny[0].grad = None if tiny[0].grad is not None else gradient
        clipper.clip_()

    yield "clip_(), a gradient that comes and goes, 200 tensors of 8", alternating
    if stand_in is not None:
        yield from cuda_cases(stand_in)
    lora = parameters([(8, 1024), (1024, 8)] * 192)
    yield "clip_(), 384 LoRA factors in cache (12.6 MB)", ComponentClipper(lora, 1e9).clip_
    yield "clip_(), 384 LoRA factors in cache, all clipped", clipped(lora)


def cuda_cases(target: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """The CUDA backend's, without launches; built where it isn't yet."""
    sys.path.insert(0, str(Path.cwd() / "tests/_support"))
    import cuda_on_host
    from cwclip_kernels import ComponentClipper

    if not target.exists():
        cuda_on_host.build(target)
    with cuda_on_host.in_place_of_a_gpu(cuda_on_host.load(target)) as gpu:
        gpu.set_runs(False)
        for count in (200, 2000):
            tiny = parameters([(8,)] * count)
            clipper = ComponentClipper(tiny, 1.0, backend="cuda")
            yield f"cuda: clip_() but for its launches, {count} tensors of 8", clipper.clip_


def clipped(lora: list[nn.Parameter]) -> Callable[[], object]:
    from cwclip_kernels import ComponentClipper

    cap = torch.tensor(1.0)
    clipper = ComponentClipper(lora, cap)

    def call() -> object:
        cap.mul_(0.9999)  # below what the last call left
        return clipper.clip_()

    for parameter in lora:
        assert parameter.grad is not None
        parameter.grad.normal_()
    return call


def measure(call: Callable[[], object], seconds: float = 0.4) -> float:
    """Microseconds of a call: the fastest round's mean."""
    call()
    rounds = []
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends:
        start = time.perf_counter()
        for _ in range(20):
            call()
        rounds.append((time.perf_counter() - start) / 20)
    return min(rounds) * 1e6


def run(root: Path, threads: int, stand_in: Path | None) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "--once", *(() if stand_in is None else ("--stand-in", str(stand_in)))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=root)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout, built")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of a run")
    parser.add_argument("--cuda", action="store_true", help="the CUDA backend's host time too; takes a C++ compiler")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--stand-in", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        print(json.dumps({name: measure(call) for name, call in cases(options.stand_in)}))
        return
    roots = [ROOT] if options.against is None else [options.against.resolve(), ROOT]
    found: list[list[dict[str, float]]] = [[] for _ in roots]
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.runs):
            for i, root in enumerate(roots):
                stand_in = Path(folder) / f"{i}.so" if options.cuda else None
                found[i].append(run(root, options.threads, stand_in))
    print(", ".join(f"{key} {value}" for key, value in metadata(torch.device("cpu")).items()))
    for name in found[0][0]:
        runs = [[figures[name] for figures in of_root] for of_root in found]
        medians, fastest = list(map(statistics.median, runs)), list(map(min, runs))
        shown = [" -> ".join(f"{value:8.1f}" for value in values) for values in (medians, fastest)]
        ratio = f"   {fastest[0] / fastest[-1]:.2f} times as fast" if len(roots) > 1 else ""
        print(f"{name:60} {shown[0]} us, fastest {shown[1]}{ratio}")


if __name__ == "__main__":
    main()
