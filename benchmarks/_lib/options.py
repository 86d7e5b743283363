"""Command-line choices that compare.py and traffic.py have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterator, Sequence

import torch

from .gradients import CASES
from .providers import TORCH, Provider, ours
from .shapes import SETS, ShapeSet

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Compared on a GPU by default; on a CPU one backend is meant for use.
GPU_BACKENDS = ("cuda:form1", "cuda:form2", "triton", "foreach")


def add_choices(parser: argparse.ArgumentParser, sets: Sequence[str], torch_ways: Sequence[str]) -> None:
    """Adds the options for sets and methods.

    Args:
        parser: gains the options.
        sets: the default of ``--sets``.
        torch_ways: the default of ``--torch``.
    """
    known = ", ".join(SETS)
    parser.add_argument(
        "--sets", type=_sets, default=tuple(sets), help=f"of {known}; each may have a :dtype; all: but the huge one"
    )
    parser.add_argument("--dtype", type=names(DTYPES), help="of float32, bfloat16, float16; default: the set's own")
    parser.add_argument("--clipped", type=names(CASES), default=CASES, help="of none, half, all (default: all three)")
    parser.add_argument(
        "--backends",
        type=_backends,
        help='ours to measure, e.g. "best,triton", "cuda:form1:blocks2" or "cuda:form2:hints" (default: best; '
        f"on a GPU {','.join(GPU_BACKENDS)})",
    )
    ways = [p.key for p in TORCH]
    parser.add_argument(
        "--torch", type=names(ways, or_none=True), default=tuple(torch_ways), help=f"of {', '.join(ways)}; or none"
    )
    parser.add_argument(
        "--skip",
        type=_skipped,
        default=frozenset(),
        help='methods of torch that would take too long on a set, e.g. "loop@tiny-20000"',
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=default, help="cpu or cuda")
    parser.add_argument("--seed", type=int, default=0, help="of the random gradients")


def chosen_sets(options: argparse.Namespace) -> Iterator[tuple[ShapeSet, torch.dtype]]:
    """Each set with each dtype it is to be measured in."""
    for spec in options.sets:
        name, _, dtype = spec.partition(":")
        for each in (dtype,) if dtype else (options.dtype or (None,)):
            yield SETS[name], DTYPES[each] if each else SETS[name].dtype


def chosen_backends(options: argparse.Namespace) -> tuple[str, ...]:
    """The specs of our backends."""
    if options.backends is not None:
        return tuple(options.backends)
    return GPU_BACKENDS if options.device.type == "cuda" else ("best",)


def chosen_torch(options: argparse.Namespace, shape_set: ShapeSet) -> list[Provider]:
    """Torch's ways that take part on this set."""
    return [p for p in TORCH if p.key in options.torch and (p.key, shape_set.name) not in options.skip]


def names(known: Collection[str], or_none: bool = False) -> Callable[[str], tuple[str, ...]]:
    """An argparse type: comma-separated names out of ``known``, or ``all``; or ``none`` of them if that may be."""

    def parse(text: str) -> tuple[str, ...]:
        # "all" and "none" are two of the clipped cases, and mean themselves there.
        if text == "all" and "all" not in known:
            return tuple(known)
        if text == "none" and or_none:
            return ()
        chosen = tuple(text.split(","))
        for name in chosen:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return chosen

    return parse


def count(text: str) -> int:
    """An argparse type: 1, 2, ..."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return int(text)


def _sets(text: str) -> tuple[str, ...]:
    if text == "all":
        return tuple(name for name, shape_set in SETS.items() if not shape_set.opt_in)
    for spec in text.split(","):
        name, colon, dtype = spec.partition(":")
        names(SETS)(name)
        if colon:
            names(DTYPES)(dtype)
    return tuple(text.split(","))


def _skipped(text: str) -> frozenset[tuple[str, str]]:
    pairs = [spec.partition("@") for spec in text.split(",")]
    for way, _, name in pairs:
        names([p.key for p in TORCH])(way)
        names(SETS)(name)
    return frozenset((way, name) for way, _, name in pairs)


def _backends(text: str) -> tuple[str, ...]:
    for spec in text.split(","):
        try:
            ours(spec)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return tuple(text.split(","))
