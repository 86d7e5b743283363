"""Communication and host time of clipping sharded parameters by component.

``python benchmarks/distributed_clip.py`` starts 8 processes of one gloo group, each with its shards of Llama-3-8B's
and a 128-expert model's parameter list as DTensors, and prints for each method: collectives per call, bytes passed to
them, and time. Counts and bytes don't depend on the machine; times suffer from having more processes than cores.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from _lib.machine import metadata
from _lib.measure import Variant, interleave
from _lib.options import count
from _lib.ranks import RankClock, Traffic, pair
from _lib.sharded_models import Case, ShardedGradients, cases
from cwclip_kernels import ComponentClipper, ComponentSpec, fused_component_clip_

CAP = 1e-3  # below every norm here: every method clips, and writes, everything
CLIPPER = "ComponentClipper.clip_()"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=_even, default=8, help="processes, an even number (default 8)")
    parser.add_argument("--rounds", type=count, default=8, help="timed rounds (default 8)")
    parser.add_argument("--layers", type=count, help="instead of the models' own number")
    parser.add_argument("--by", type=count, default=32, help="divisor of all widths (default 32)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, each round's time included")
    return parser.parse_args(arguments)


def _even(text: str) -> int:
    if int(text) < 2 or int(text) % 2:
        raise argparse.ArgumentTypeError("2, 4, ...")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Starts the ranks, prints and writes what the first of them found."""
    options = parse(arguments)
    console = Console(width=120, highlight=False)
    facts = metadata(torch.device("cpu")) | {"threads": 1, "ranks": options.ranks, "backend": "gloo"}
    for key, value in facts.items():
        console.print(f"{key:<16}{value}", markup=False, soft_wrap=True)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_run_rank, (options, folder), nprocs=options.ranks)
        found = json.loads((Path(folder) / "found.json").read_text())
    console.print("\ncalls, bytes: collectives per call, and rank 0's payload. Times: fastest / median round.")
    for case in found.values():
        _print(console, case)
    if options.json:
        options.json.write_text(json.dumps({"metadata": facts, "cases": found}, indent=1) + "\n")


def _run_rank(rank: int, options: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    # Logs once per process that a flattened mesh would send less; one of the cases has one.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    store = f"file://{os.path.join(folder, 'store')}"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=options.ranks, timeout=timedelta(seconds=120)
    )
    found = {case.key: measured(case, options.rounds) for case in cases(options.ranks, options.layers, options.by)}
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.barrier()
    # torch 2.13's teardown of gloo groups aborts now and then ("terminate called without an active exception"), so it
    # is skipped.
    os._exit(0)


# ------------------------------------------------------------------------------------------------------------
# Methods
# ------------------------------------------------------------------------------------------------------------

Ways = dict[str, Callable[[], object]]


def ways(case: Case, gradients: ShardedGradients) -> tuple[Ways, int]:
    """The methods by name; and how many of the first leave the same gradients."""
    named, parameters = gradients.named, gradients.parameters
    clip = torch.nn.utils.clip_grad_norm_
    clipper = ComponentClipper(named, CAP)

    def loop() -> None:
        for parameter in parameters:
            clip([parameter], CAP)

    found: Ways = {
        CLIPPER: clipper.clip_,
        "fused_component_clip_(...)": lambda: fused_component_clip_(named, CAP),
        "loop of clip_grad_norm_": loop,
    }
    same = len(found)
    if not case.has_experts:
        found["one global clip_grad_norm_"] = lambda: clip(parameters, CAP)
        return found, same
    stacked = [p for name, p in named if ".experts." in name]
    others = [p for name, p in named if ".experts." not in name]
    found["one global clip_grad_norm_"] = lambda: clip(parameters, CAP)
    found["one global norm, mesh by mesh"] = lambda: _global_over_meshes([others, stacked])
    each = ComponentClipper(named, CAP, components=ComponentSpec().split("*.experts.*", sizes=1))
    found["clip_(), every expert by itself"] = each.clip_
    found["loop, and experts by hand"] = lambda: _experts_by_hand(others, stacked)
    return found, same


def _global_over_meshes(groups: Sequence[list[nn.Parameter]]) -> Tensor:
    """As torchtitan's ``_clip_grad_norm_with_ep``: a norm for each mesh, combined here."""
    norms = []
    for group in groups:
        norm = torch.nn.utils.get_total_norm([p.grad for p in group])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = torch.linalg.vector_norm(torch.stack(norms))
    for group in groups:
        torch.nn.utils.clip_grads_with_norm_(group, CAP, total)
    return total


@torch.no_grad()
def _experts_by_hand(others: Sequence[nn.Parameter], stacked: Sequence[nn.Parameter]) -> None:
    """What the DTensor API offers for slices: norms over the dims behind the first."""
    for parameter in others:
        torch.nn.utils.clip_grad_norm_([parameter], CAP)
    for parameter in stacked:
        norms = torch.linalg.vector_norm(parameter.grad, dim=(1, 2), keepdim=True)
        parameter.grad.mul_((CAP / (norms + 1e-6)).clamp(max=1.0))


# ------------------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """One way in one case, on rank 0 unless it says otherwise.

    Attributes:
        collectives: in one call, by operator.
        nbytes: handed to them.
        cpu_ms: processor time of the process a round, all of its threads.
        wall_ms: from all ranks' common start until this rank's call returned.
        slowest_ms: the same until the last rank's call returned, by its own clock.
        refused: why it can't be called; the rest is empty then.
    """

    collectives: dict[str, int] = field(default_factory=dict)
    nbytes: dict[str, int] = field(default_factory=dict)
    cpu_ms: list[float] = field(default_factory=list)
    wall_ms: list[float] = field(default_factory=list)
    slowest_ms: list[float] = field(default_factory=list)
    refused: str = ""

    def look_at(self, call: Callable[[], object], gradients: ShardedGradients) -> bool:
        """Counts a call's traffic, after one that may set things up; False if it can't be called.

        It leaves the first random gradients clipped.
        """
        gradients.refill()
        try:
            call()
        except RuntimeError as error:
            self.refused = str(error).splitlines()[0]
            return False
        gradients.reseed()
        with Traffic() as traffic:
            call()
        self.collectives, self.nbytes = dict(traffic.calls), dict(traffic.nbytes)
        return True


def measured(case: Case, rounds: int) -> dict[str, Any]:
    """One case; all ranks make this call together."""
    gradients = ShardedGradients(case)
    calls, same = ways(case, gradients)
    found = {key: Found() for key in calls}
    left: dict[str, Tensor] = {}
    for key, call in list(calls.items()):
        if found[key].look_at(call, gradients):
            left[key] = torch.cat([g.flatten() for g in gradients.local])
        else:
            del calls[key]
    # Only methods with the same result are compared.
    for key in list(left)[1:same]:
        torch.testing.assert_close(left[key], left[CLIPPER], rtol=1e-4, atol=1e-9, msg=partial("{}: {}".format, key))
    variants = [Variant(key, lambda turn: gradients.refill(), call, list) for key, call in calls.items()]
    timings = interleave(variants, RankClock(), rounds, warmup=0)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, {key: timing.samples for key, timing in timings.items()})
    for key, timing in timings.items():
        found[key].cpu_ms, found[key].wall_ms = timing.host, timing.samples
        found[key].slowest_ms = [max(round_) for round_ in zip(*(own[key] for own in everyone), strict=True)]
    return {
        "description": case.description,
        "tensors": len(gradients.named),
        "elements": case.shape_set.elements,
        "local_bytes": sum(g.nbytes for g in gradients.local),
        "components": _components(case),
        "ways": {key: asdict(one) for key, one in found.items()},
    }


def _components(case: Case) -> dict[str, int]:
    """K, whole parameters and with every expert by itself."""
    whole = len(case.shape_set.shapes)
    if not case.has_experts:
        return {"parameter": whole}
    experts = [shape[0] for name, shape in case.shape_set.shapes if ".experts." in name]
    return {"parameter": whole, "expert": whole - len(experts) + sum(experts)}


def _print(console: Console, case: dict[str, Any]) -> None:
    components = ", ".join(f"K = {number:,} by {unit}" for unit, number in case["components"].items())
    title = f"{case['description']}; {components}; {case['local_bytes'] / 1e6:.1f} MB of gradients on a rank"
    table = Table(title=title, box=box.SIMPLE, title_justify="left", padding=(0, 1), collapse_padding=True)
    table.add_column("", no_wrap=True)
    for column in ("calls", "bytes", "CPU ms", "wall ms", "slowest rank", "of first: CPU, wall"):
        table.add_column(column, justify="right", no_wrap=True)
    first = case["ways"][CLIPPER]
    for key, way in case["ways"].items():
        if way["refused"]:
            table.add_row(key, "refused")
            continue
        table.add_row(
            key,
            f"{sum(way['collectives'].values()):,}",
            f"{sum(way['nbytes'].values()):,}",
            *(pair(way[which]) for which in ("cpu_ms", "wall_ms", "slowest_ms")),
            "  ".join(f"{min(way[which]) / min(first[which]):.1f}" for which in ("cpu_ms", "wall_ms")),
        )
    console.print(table)
    for key, way in case["ways"].items():
        if way["refused"]:
            console.print(f"  {key}: {way['refused']}", markup=False)


if __name__ == "__main__":
    main()
