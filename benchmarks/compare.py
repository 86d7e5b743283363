"""Compares component clipping with torch's ways on the shapes of real models.

``python benchmarks/compare.py`` prints, for each shape set with none, half and all of the components clipped:
milliseconds, share of what the machine can do at best (measured in between), and how many times as fast as
each of torch's ways. README.md beside this file says how to read it.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console

from gradients import CASES, Gradients
from machine import available_bytes, metadata
from measure import BEYOND_CACHES, CEILING_LIMIT, Ceilings, Clock, Timing, Variant, clock_for, interleave
from providers import TORCH, Provider, explain, ours
from report import CaseResult, as_json, print_backends, print_case, print_metadata, rows_and_floor
from shapes import SETS, ShapeSet

DEFAULT_SETS = ("bert-large", "bert-base", "minilm-l6", "lora-384", "tiny-20000")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WIDTH = 120


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=_names(SETS), default=DEFAULT_SETS, help=f"of {', '.join(SETS)}; or all")
    parser.add_argument("--dtype", type=_names(DTYPES), help="of float32, bfloat16, float16; default: the set's own")
    parser.add_argument(
        "--clipped", type=_names(CASES), default=CASES, help="of none, half, all (default: all three)"
    )
    parser.add_argument("--backends", default="best", help='ours to measure, e.g. "best,triton" (default: best)')
    parser.add_argument("--rounds", type=_count, default=20, help="timed rounds (default 20)")
    parser.add_argument("--warmup", type=_count, default=2, help="rounds before these (default 2)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=_count, help="CPU threads (default: torch's choice)")
    parser.add_argument("--rotate", type=_rotate, default="auto", help="gradient sets in turn (default: auto)")
    parser.add_argument("--warm", action="store_true", help="gradients in the caches at the call, as far as they fit")
    parser.add_argument("--seed", type=int, default=0, help="of the random gradients")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, each round's time included")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw a figure")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints, writes."""
    options = parse(arguments)
    device = torch.device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console(width=WIDTH, highlight=False)
    facts = metadata(device)
    print_metadata(console, facts)

    clock = clock_for(device)
    results: list[CaseResult] = []
    skipped: list[str] = []
    for name in options.sets:
        for dtype in [DTYPES[d] for d in options.dtype] if options.dtype else [SETS[name].dtype]:
            for index, result in enumerate(_measure_set(SETS[name], dtype, device, clock, options, skipped)):
                if index == 0:
                    print_backends(console, result)
                print_case(console, result)
                results.append(result)
    for line in skipped:
        console.print(f"skipped: {line}", markup=False, soft_wrap=True)

    if options.json:
        options.json.write_text(json.dumps(as_json(facts, results, skipped), indent=1) + "\n")
    if options.plot:
        from plot import draw  # here, so that only who wants a figure needs matplotlib

        draw(results, facts, options.plot)


def _measure_set(
    shape_set: ShapeSet,
    dtype: torch.dtype,
    device: torch.device,
    clock: Clock,
    options: argparse.Namespace,
    skipped: list[str],
) -> Iterator[CaseResult]:
    """One result for each case; what can't be measured goes to ``skipped``, with the reason."""
    nbytes = shape_set.nbytes(dtype)
    rotate = sets_in_turn(nbytes, options)
    restorable = set(options.clipped) != {"none"}
    needed = nbytes * (rotate + restorable) + 2 * min(nbytes, CEILING_LIMIT)
    available = available_bytes(device)
    dtype_name = str(dtype).removeprefix("torch.")
    if needed > 0.9 * available:  # the rest is for temporaries, torch's float32 copies of halves among them
        skipped.append(
            f"{shape_set.name} {dtype_name}: takes {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB available"
            + (" (--clipped none takes a copy less)" if restorable else "")
        )
        return
    gradients = Gradients(shape_set, dtype, device, rotate, options.seed, restorable)
    providers = list(TORCH)
    served: dict[str, str] = {}
    for backend in options.backends.split(","):
        asked = None if backend == "best" else backend
        try:
            served[backend] = explain(gradients.named, asked)
        except (RuntimeError, ValueError) as refusal:
            skipped.append(f"{shape_set.name} {dtype_name}, backend {backend}: {refusal}")
        else:
            providers += ours(asked)
    ceilings = Ceilings(nbytes, device)
    timings: dict[str, dict[str, Timing]] = {}
    best: dict[str, Timing] = defaultdict(Timing)  # what the memory can do is the same in every case
    for case in options.clipped:
        variants = [_variant(p, gradients, case) for p in providers if p.componentwise or case != "half"]
        variants += ceilings.variants()
        timings[case] = interleave(variants, clock, options.rounds, options.warmup, options.warm)
        for key, timing in ceilings.take(timings[case]).items():
            best[key].samples += timing.samples
    for case in options.clipped:
        share = gradients.clipped_share(case)
        labels = {p.key: p.label for p in providers if p.key in timings[case]}
        rows, ceilings_gbps, floor_ms = rows_and_floor(labels, timings[case], best, nbytes, share)
        yield CaseResult(
            set=shape_set.name,
            description=shape_set.description,
            dtype=dtype_name,
            tensors=len(shape_set.shapes),
            nbytes=nbytes,
            rotate=rotate,
            clipped=case,
            clipped_share=share,
            ceilings_gbps=ceilings_gbps,
            floor_ms=floor_ms,
            rows=rows,
            backends=served,
        )


def _variant(provider: Provider, gradients: Gradients, case: str) -> Variant:
    def before(turn: int) -> None:
        gradients.use(turn)
        if case != "none":
            gradients.restore()

    return Variant(
        provider.key,
        before,
        provider.prepare(gradients.named, gradients.cap(case)),
        lambda: gradients.current,
    )


def sets_in_turn(nbytes: int, options: argparse.Namespace) -> int:
    """Gradient sets to take turns: with ``auto`` as many as exceed the caches, at most 8; one when warm."""
    if options.rotate != "auto":
        return int(options.rotate)
    return 1 if options.warm else min(8, BEYOND_CACHES // nbytes + 1)


def _names(known: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    """An argparse type: comma-separated names out of ``known``, or ``all``."""

    def names(text: str) -> tuple[str, ...]:
        # "all" is one of the clipped cases, and means itself there.
        chosen = tuple(known) if text == "all" and "all" not in known else tuple(text.split(","))
        for name in chosen:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return chosen

    return names


def _count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return int(text)


def _rotate(text: str) -> str:
    return text if text == "auto" else str(_count(text))


if __name__ == "__main__":
    main()
