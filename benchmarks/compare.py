"""Compares component clipping with torch's methods on the shapes of real models.

``python benchmarks/compare.py`` prints, for each shape set with none, half and all of the components clipped:
milliseconds, share of the machine's ceiling (measured in the same rounds), and the speed-up over each of torch's
methods; on a GPU also the launches of a call. README.md beside this file says how to read it.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from _lib.launches import SetActivity
from _lib.machine import metadata
from _lib.measure import clock_for
from _lib.options import add_choices, chosen_sets, count, names
from _lib.providers import TORCH
from _lib.report import CaseResult, as_json, print_activity, print_backends, print_case, print_metadata
from _lib.runs import count_launches, measure_set

DEFAULT_SETS = ("bert-large", "bert-base", "minilm-l6", "lora-384", "tiny-20000")
CALLS = ("function", "clipper")
WIDTH = 120


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_choices(parser, DEFAULT_SETS, [p.key for p in TORCH])
    parser.add_argument("--calls", type=names(CALLS), default=CALLS, help="of function, clipper (default: both)")
    parser.add_argument("--rounds", type=count, default=20, help="timed rounds (default 20)")
    parser.add_argument("--warmup", type=count, default=2, help="rounds before these (default 2)")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="per case, shared evenly: slow methods get fewer rounds"
    )
    parser.add_argument("--threads", type=count, help="CPU threads (default: torch's choice)")
    parser.add_argument("--rotate", type=_rotate, default="auto", help="gradient sets in turn (default: auto)")
    parser.add_argument("--warm", action="store_true", help="gradients in cache at the call, as far as they fit")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, each round's time included")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw shares of the ceiling, as bars")
    parser.add_argument("--roofline", type=Path, metavar="FILE.png", help="draw speed over size, below the ceilings")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints, writes."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console(width=WIDTH, highlight=False)
    facts = metadata(options.device)
    print_metadata(console, facts)

    clock = clock_for(options.device)
    results: list[CaseResult] = []
    activity: list[SetActivity] = []
    skipped: list[str] = []

    def write() -> None:
        # After every set, so that an interrupted run leaves its results.
        if options.json:
            options.json.write_text(json.dumps(as_json(facts, results, activity, skipped), indent=1) + "\n")

    for shape_set, dtype in chosen_sets(options):
        for index, result in enumerate(measure_set(shape_set, dtype, clock, options, skipped)):
            if index == 0:
                print_backends(console, result)
            print_case(console, result)
            results.append(result)
        write()
    if options.roofline:
        from _lib.roofline import draw as draw_roofline  # imports matplotlib

        draw_roofline(results, facts, options.roofline)
    if options.plot:
        from _lib.plot import draw

        draw(results, facts, options.plot)

    if options.device.type == "cuda":
        # After all timing: a profiler may slow down what runs after it.
        for shape_set, dtype in chosen_sets(options):
            own = [r for r in results if (r.set, f"torch.{r.dtype}") == (shape_set.name, str(dtype))]
            if own:
                activity.append(count_launches(shape_set, dtype, options, own))
                write()
        print_activity(console, activity, {row.key: row.label for result in results for row in result.rows})
    for line in skipped:
        console.print(f"skipped: {line}", markup=False, soft_wrap=True)


def _rotate(text: str) -> str:
    return text if text == "auto" else str(count(text))


if __name__ == "__main__":
    main()
