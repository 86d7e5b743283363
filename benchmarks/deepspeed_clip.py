"""What clipping adds to a step of a DeepSpeed engine: DeepSpeed's own, by one norm, and ours, by component.

``python benchmarks/deepspeed_clip.py`` starts 2 processes of one gloo group. In each ZeRO stage, in bfloat16 and
float32, they train the parameter list of BERT-base. What is measured is ``engine.step()`` alone, from averaged
gradients to gathered parameters, with SGD, whose own work is small. A backward pass before it fills the gradients:
those of a sum of parameters times fixed random numbers. Collectives and bytes don't depend on the machine; times
suffer from having as many processes as cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from _lib.machine import metadata
from _lib.measure import Variant, interleave
from _lib.options import count
from _lib.ranks import RankClock, Traffic, pair
from _lib.shapes import ShapeSet, narrow_bert_base

CAP = 1e-3  # below every norm here
NONE, OWN, ALL, FEW = "no clipping", "gradient_clipping", "attach(), all clipped", "attach(), none clipped"
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"bf16": {"enabled": True}},
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=count, default=2, help="processes (default 2)")
    parser.add_argument("--rounds", type=count, default=10, help="timed rounds (default 10)")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3], help="ZeRO stages (default 1 2 3)")
    parser.add_argument("--layers", type=count, default=12, help="layers (default 12)")
    parser.add_argument("--by", type=count, default=2, help="divisor of all widths (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, each round's time included")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Starts the ranks, prints and writes what the first of them found."""
    options = parse(arguments)
    console = Console(width=120, highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_run_rank, (options, folder), nprocs=options.ranks)
        found = json.loads((Path(folder) / "found.json").read_text())
    facts = metadata(torch.device("cpu")) | {
        "threads": 1,
        "ranks": options.ranks,
        "backend": "gloo",
        **found["facts"],
    }
    for key, value in facts.items():
        console.print(f"{key:<16}{value}", markup=False, soft_wrap=True)
    console.print("\ncalls, bytes: collectives per step, and rank 0's payload. Times: fastest / median round.")
    for key, case in found["cases"].items():
        _print(console, key, case)
    if options.json:
        options.json.write_text(json.dumps({"metadata": facts, "cases": found["cases"]}, indent=1) + "\n")


def _run_rank(rank: int, options: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    # As a launcher sets them; the port is only a name, since the group is made here.
    size = str(options.ranks)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": "29500", "DS_ACCELERATOR": "cpu"}
    store, limit = f"file://{os.path.join(folder, 'store')}", timedelta(seconds=300)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=options.ranks, timeout=limit)
    with _quiet():
        import deepspeed

        deepspeed.utils.logger.setLevel(logging.ERROR)
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which it would compile, for inference
        deepspeed.init_distributed("gloo")
        shapes = narrow_bert_base(options.layers, options.by)
        cases = {
            f"ZeRO {stage}, {precision}": measured(shapes, stage, precision, options.rounds)
            for stage in options.stages
            for precision in PRECISIONS
        }
    if rank == 0:
        found = {"facts": {"deepspeed": deepspeed.__version__}, "cases": cases}
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # as in distributed_clip.py


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what DeepSpeed prints and warns of."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")
        yield


# ------------------------------------------------------------------------------------------------------------
# Engines
# ------------------------------------------------------------------------------------------------------------


class Weighted(nn.Module):
    """Parameters of these shapes. Its output is their sum, weighted by fixed random numbers: the gradients."""

    def __init__(self, shapes: ShapeSet, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(dist.get_rank())
        self.weights: list[Tensor] = []
        for i, (_, shape) in enumerate(shapes.shapes):
            self.register_parameter(f"p{i}", nn.Parameter(torch.zeros(shape)))
            self.weights.append(torch.randn(shape, generator=generator).to(dtype))

    def forward(self) -> Tensor:
        """A scalar."""
        return sum((p * w).sum().float() for p, w in zip(self.parameters(), self.weights, strict=True))  # type: ignore


@dataclass
class Engine:
    """An engine, and the cap of what is attached to it, if anything is."""

    engine: Any
    cap: Tensor | None = None

    @classmethod
    def of(cls, shapes: ShapeSet, stage: int, precision: str, *, attached: bool) -> Engine:
        """All ranks make it together."""
        import deepspeed

        from cwclip_kernels.integrations.deepspeed import attach

        model = Weighted(shapes, getattr(torch, precision))
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=1e-9),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_clipping": 0,
                "zero_allow_untested_optimizer": True,
                "zero_optimization": {"stage": stage},
                **PRECISIONS[precision],
            },
        )
        cap = torch.tensor(CAP) if attached else None
        if cap is not None:
            attach(engine, cap)
        return cls(engine, cap)

    def before(self, own_cap: float, cap: float) -> Callable[[int], None]:
        """Sets DeepSpeed's number and ours, and fills the gradients."""

        def prepare(turn: int) -> None:
            self.engine.optimizer.clip_grad = own_cap
            if self.cap is not None:
                self.cap.fill_(cap)
            self.engine.backward(self.engine())

        return prepare


# ------------------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """One way in one case, on rank 0.

    Attributes:
        collectives: in one step, by operator.
        nbytes: handed to them.
        cpu_ms: processor time of the process a round, all of its threads.
        wall_ms: from all ranks' common start until this rank's step returned.
    """

    collectives: dict[str, int] = field(default_factory=dict)
    nbytes: dict[str, int] = field(default_factory=dict)
    cpu_ms: list[float] = field(default_factory=list)
    wall_ms: list[float] = field(default_factory=list)


def measured(shapes: ShapeSet, stage: int, precision: str, rounds: int) -> dict[str, Any]:
    """One case; all ranks make this call together."""
    plain = Engine.of(shapes, stage, precision, attached=False)
    ours = Engine.of(shapes, stage, precision, attached=True)
    ways = {
        NONE: (plain, plain.before(0.0, 0.0)),
        OWN: (plain, plain.before(CAP, 0.0)),
        ALL: (ours, ours.before(0.0, CAP)),
        FEW: (ours, ours.before(0.0, 1e9)),
    }
    found = {key: Found() for key in ways}
    for key, (one, before) in ways.items():
        for turn in range(2):  # the first may set things up
            before(turn)
            with Traffic() as traffic:
                one.engine.step()
        found[key].collectives, found[key].nbytes = dict(traffic.calls), dict(traffic.nbytes)
    variants = [Variant(key, before, one.engine.step, list) for key, (one, before) in ways.items()]
    for key, timing in interleave(variants, RankClock(), rounds, warmup=1).items():
        found[key].cpu_ms, found[key].wall_ms = timing.host, timing.samples
    return {
        "description": shapes.description,
        "tensors": len(shapes.shapes),
        "elements": shapes.elements,
        "ways": {key: asdict(one) for key, one in found.items()},
    }


def _print(console: Console, key: str, case: dict[str, Any]) -> None:
    title = f"{key}: {case['description']}, {case['tensors']} parameters, {case['elements'] / 1e6:.1f} M elements"
    table = Table(title=title, box=box.SIMPLE, title_justify="left", padding=(0, 1), collapse_padding=True)
    table.add_column("", no_wrap=True)
    for column in ("calls", "bytes", "all-reduces", "bytes", "CPU ms", "wall ms", "of DeepSpeed's: CPU, wall"):
        table.add_column(column, justify="right", no_wrap=True)
    own = case["ways"][OWN]
    for name, way in case["ways"].items():
        table.add_row(
            name,
            f"{sum(way['collectives'].values()):,}",
            f"{sum(way['nbytes'].values()):,}",
            f"{way['collectives'].get('allreduce_', 0):,}",
            f"{way['nbytes'].get('allreduce_', 0):,}",
            *(pair(way[which]) for which in ("cpu_ms", "wall_ms")),
            "  ".join(f"{min(way[which]) / min(own[which]):.2f}" for which in ("cpu_ms", "wall_ms")),
        )
    console.print(table)


if __name__ == "__main__":
    main()
