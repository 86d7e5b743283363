"""Does this name belong to this docstring? A small task on which fine-tuning is unstable.

Each item is a public name of the standard library ("POP3 uidl") and the summary of its docstring. Half of the pairs,
about, are put together wrongly, with the summary of another name of the same module. Items, and with them summaries,
are on one side of the split only. Sources are parsed, never imported.
"""

from __future__ import annotations

import ast
import hashlib
import random
import re
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import docstrings

from .problem import Problem

TRAIN, DEV = 480, 256
MAJORITY = 0.551  # the share of wrong pairs, on both sides
MIN_WORDS = 4
MAX_PER_MODULE = 60
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Item:
    """A name and what its docstring says first."""

    module: str
    name: str
    summary: str


def collect(stdlib: Path | None = None) -> list[Item]:
    """All items, in an order that depends on their texts alone; names and summaries that come twice are left out."""
    stdlib = stdlib or Path(sysconfig.get_paths()["stdlib"])
    found: list[Item] = []
    for modules in docstrings.FAMILIES.values():
        for module in modules.split():
            for path in docstrings.sources(module, stdlib):
                found += _items(module, path)
    by_name = Counter(item.name.lower() for item in found)
    by_words = Counter(_words(item.summary) for item in found)
    unique = [item for item in found if by_name[item.name.lower()] == by_words[_words(item.summary)] == 1]
    taken: Counter[str] = Counter()
    kept = []
    for item in sorted(unique, key=_digest):
        taken[item.module] += 1
        if taken[item.module] <= MAX_PER_MODULE:
            kept.append(item)
    return kept


def _items(module: str, path: Path) -> Iterator[Item]:
    tree = ast.parse(path.read_bytes())
    for node in tree.body:
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            yield from _item(module, path.stem if path.stem != "__init__" else module, node)
        if isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, _FUNCTIONS):
                    yield from _item(module, node.name, member)


def _item(module: str, owner: str, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> Iterator[Item]:
    if owner.startswith("_") or node.name.startswith("_"):
        return
    paragraph = (ast.get_docstring(node) or "").strip().split("\n\n")[0]
    summary = re.split(r"(?<=[.!?])\s", " ".join(paragraph.split()))[0]
    if len(summary.split()) >= MIN_WORDS and "->" not in summary:  # "f(x) -> y" gives the name away
        yield Item(module, f"{owner} {node.name}", summary)


def _words(text: str) -> str:
    return " ".join(re.findall(r"[a-z]+", text.lower()))


def _digest(item: Item) -> bytes:
    return hashlib.sha256(f"{item.module} {item.name} {item.summary}".encode()).digest()


Pair = tuple[tuple[str, str], int]


def build(items: list[Item], *, train: int = TRAIN, dev: int = DEV) -> tuple[list[Pair], list[Pair]]:
    """((name, summary), 1 if they belong together) of both sides, in a fixed order.

    Raises:
        Problem: too few items; as when only a part of the standard library is installed as source.
    """
    by_module: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        by_module[item.module].append(item)
    sides: tuple[list[tuple[Item, Item]], list[tuple[Item, Item]]] = ([], [])
    for _, own in sorted(by_module.items()):
        cut = round(len(own) * train / (train + dev))
        for side, part in zip(sides, (own[:cut], own[cut:]), strict=True):
            if len(part) >= 2:  # each with the next one, whose summary it gets where the pair is to be wrong
                side += list(zip(part, part[1:] + part[:1], strict=True))
    return _pairs(sides[0], train, seed=0), _pairs(sides[1], dev, seed=1)


def _pairs(side: list[tuple[Item, Item]], count: int, seed: int) -> list[Pair]:
    if len(side) < count:
        raise Problem(
            f"--task names: this Python's library has {len(side)} names that will do, where {count} are needed; use "
            "a Python installed with its sources"
        )
    side = sorted(side, key=lambda pair: _digest(pair[0]))[:count]
    wrong = set(random.Random(seed).sample(range(count), round(MAJORITY * count)))
    return [
        ((item.name, (other if i in wrong else item).summary), int(i not in wrong))
        for i, (item, other) in enumerate(side)
    ]
