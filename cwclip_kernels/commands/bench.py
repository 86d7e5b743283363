"""``python -m cwclip_kernels bench``: this machine, ours beside torch's, in under a minute.

Variants take turns, on fresh random gradients, and the fastest round of each counts. Beside them stands what the
memory allows: the time to read all gradients once, as ``torch.dot`` reads (on a CPU) or a sum (elsewhere).
``benchmarks/`` in the repository measures more, with rounds, medians and files.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..clipper import ComponentClipper

SECONDS = 6.0  # for each table

# Shapes of MiniLM-L6's 105 parameters, and of LoRA factors of rank 8 beside 192 matrices of 4096 or so.
_WIDE, _INNER = 384, 1536
_LAYER: list[tuple[int, ...]] = [
    *([(_WIDE, _WIDE), (_WIDE,)] * 4),
    *((_WIDE,), (_WIDE,), (_INNER, _WIDE), (_INNER,), (_WIDE, _INNER), (_WIDE,), (_WIDE,), (_WIDE,)),
]
SETS: dict[str, list[tuple[int, ...]]] = {
    "an encoder of 22 M parameters": [
        *((30522, _WIDE), (512, _WIDE), (2, _WIDE), (_WIDE,), (_WIDE,)),
        *(_LAYER * 6),
        *((_WIDE, _WIDE), (_WIDE,), (2, _WIDE), (2,)),
    ],
    "384 LoRA factors": [(8, 1024), (1024, 8)] * 192,
}


def main(arguments: Sequence[str]) -> int:
    """Prints a table for each set; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m cwclip_kernels bench", description="Our time beside torch's")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; the accelerator if there is one")
    options = parser.parse_args(arguments)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    try:
        device = torch.empty(0, device=options.device or accelerator or "cpu").device
    except (RuntimeError, AssertionError) as error:
        print(f"bench: --device {options.device}: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    where = f"{torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
    print(f"torch {torch.__version__}, {where}; milliseconds of the fastest round, Python included")
    for title, shapes in SETS.items():
        _table(title, shapes, device)
    return 0


def _table(title: str, shapes: list[tuple[int, ...]], device: torch.device) -> None:
    params = [nn.Parameter(torch.empty(shape, device=device)) for shape in shapes]
    source = [torch.randn(shape, device=device) for shape in shapes]
    for p in params:
        p.grad = torch.empty_like(p)
    size = sum(p.nbytes for p in params)
    fastest: dict[str, list[float]] = {}
    for column, cap in enumerate((1e9, 1e-3)):  # none clipped, and all
        variants = _variants(params, cap)
        end, rounds = time.perf_counter() + SECONDS / 2, 0
        while rounds < 3 or time.perf_counter() < end:
            for name, call in variants.items():
                for p, values in zip(params, source, strict=True):
                    assert p.grad is not None
                    p.grad.copy_(values)
                taken = _milliseconds(call, device)
                best = fastest.setdefault(name, [float("inf")] * 2)
                best[column] = min(best[column], taken) if rounds else best[column]  # the first round warms up
            rounds += 1
    ours = fastest["ComponentClipper.clip_"]
    print(f"\n{title}: {len(params)} tensors, {size / 1e6:.0f} MB of float32")
    print(f"  {'':<42}{'none clipped':>14}{'all clipped':>14}{'times ours':>18}")
    for name, best in fastest.items():
        ratios = " / ".join(f"{taken / own:.1f}" for taken, own in zip(best, ours, strict=True))
        print(f"  {name:<42}{best[0]:>14.2f}{best[1]:>14.2f}{'' if name == _READ else ratios:>18}")
    print(f"  ours reads {size / ours[0] / 1e6:.1f} GB/s of {size / fastest[_READ][0] / 1e6:.1f} GB/s, none clipped")


_READ = "reading every gradient once"


def _variants(params: list[nn.Parameter], cap: float) -> dict[str, Callable[[], object]]:
    clipper = ComponentClipper(params, cap)

    def loop() -> None:
        for p in params:
            torch.nn.utils.clip_grad_norm_(p, cap)

    def foreach() -> None:
        grads = [p.grad for p in params if p.grad is not None]
        norms = torch._foreach_norm(grads)
        torch._foreach_mul_(grads, list((cap / (torch.stack(norms) + 1e-6)).clamp(max=1.0).unbind()))

    def read() -> Tensor:
        flat = [p.grad.view(-1) for p in params if p.grad is not None]
        return torch.stack([g @ g if g.device.type == "cpu" else g.sum() for g in flat])

    return {
        "ComponentClipper.clip_": clipper.clip_,
        "_foreach_norm and _foreach_mul_": foreach,
        "clip_grad_norm_ for each parameter": loop,
        "clip_grad_norm_ of all (another rule)": lambda: torch.nn.utils.clip_grad_norm_(params, cap),
        _READ: read,
    }


def _milliseconds(call: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return 1e3 * (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
