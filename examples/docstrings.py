"""A text-classification data set that every machine has: the docstrings of the Python standard library.

Each example is one docstring; its label is the family of the module that contains it (networking, numbers, ...). The
sources are parsed, never imported, so that none of them runs, and read in a fixed order: the same Python version
gives the same data set, bit for bit.
"""

from __future__ import annotations

import ast
import hashlib
import random
import re
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Modules that this Python version lacks are skipped. Left out on purpose: test packages, idlelib and lib2to3 (removed
# in newer versions), and tkinter, which many systems install separately.
FAMILIES: dict[str, str] = {
    "networking": "ftplib http imaplib ipaddress nntplib poplib smtpd smtplib socket socketserver ssl telnetlib "
    "urllib webbrowser wsgiref xmlrpc cgi",
    "email & mailboxes": "email mailbox mailcap mimetypes quopri",
    "text & markup": "argparse codecs configparser csv difflib gettext html json locale optparse plistlib "
    "pprint re shlex string textwrap tomllib xml",
    "files & system": "_pyio bz2 compression ctypes fileinput filecmp genericpath glob gzip lzma ntpath os pathlib "
    "platform posixpath pty shutil stat tarfile tempfile zipfile",
    "concurrency": "_threading_local asyncio concurrent contextvars multiprocessing queue sched selectors signal "
    "subprocess threading",
    "numbers & dates": "_pydatetime _pydecimal _strptime calendar colorsys datetime fractions numbers random "
    "statistics uuid zoneinfo",
    "data structures": "_collections_abc _weakrefset abc bisect collections contextlib copy copyreg dataclasses enum "
    "functools graphlib heapq operator reprlib types typing weakref",
    "testing & debugging": "bdb cProfile cmd doctest logging pdb profile pstats timeit trace traceback tracemalloc "
    "unittest warnings",
    "language & imports": "ast code codeop dis imp importlib inspect modulefinder pickle pickletools pkgutil "
    "pyclbr pydoc runpy site symtable sysconfig tokenize venv zipimport",
}

MIN_WORDS = 8  # shorter ones ("Return the value.") say nothing about their module
MAX_PER_MODULE = 30  # or email, logging and asyncio alone would be half of the data
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Example:
    """One docstring, the index of its family in `list(FAMILIES)`, and where it was found."""

    text: str
    label: int
    module: str


def sources(module: str, stdlib: Path) -> list[Path]:
    """The files of one top-level module or package, in a fixed order, tests left out."""
    single = stdlib / f"{module}.py"
    if single.is_file():
        return [single]
    package = sorted((stdlib / module).rglob("*.py"))
    return [path for path in package if not {"test", "tests"} & set(path.relative_to(stdlib).parts)]


def _docstrings(path: Path) -> Iterator[str]:
    """Every docstring of a file, with white space collapsed and doctests removed."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        text = ast.get_docstring(node) if isinstance(node, _DOCUMENTED) else None
        if text:
            yield " ".join(text.split(">>>")[0].split())


def _fingerprint(text: str) -> str:
    """Two docstrings with the same words, ignoring case, digits and punctuation, count as one."""
    return " ".join(re.findall(r"[a-z]+", text.lower()))


def _shuffled_by_hash(examples: Iterable[Example]) -> list[Example]:
    """A fixed pseudo-random order that depends on the texts alone (`hash` differs between runs)."""
    return sorted(examples, key=lambda example: hashlib.sha256(example.text.encode()).digest())


def collect(stdlib: Path | None = None) -> list[Example]:
    """All examples, in a fixed order.

    A docstring found more than once is kept once; one found in two families is left out.

    Args:
        stdlib: the folder with the library's sources; by default that of the running interpreter.
    """
    stdlib = stdlib or Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, list[Example]] = defaultdict(list)
    for label, modules in enumerate(FAMILIES.values()):
        for module in modules.split():
            for path in sources(module, stdlib):
                for text in _docstrings(path):
                    if len(text.split()) >= MIN_WORDS:
                        found[_fingerprint(text)].append(Example(text, label, module))
    unique = [same[0] for same in found.values() if len({example.label for example in same}) == 1]
    taken: Counter[str] = Counter()
    kept = []
    for example in _shuffled_by_hash(unique):
        taken[example.module] += 1
        if taken[example.module] <= MAX_PER_MODULE:
            kept.append(example)
    return kept


def split(
    examples: list[Example], *, held_out: float = 0.15, limit: int | None = None, seed: int = 0
) -> tuple[list[Example], list[Example]]:
    """Split into (train, held-out), each family in the same proportion, both shuffled.

    The split is random within a family, so a module may have docstrings on both sides, but no docstring is on both:
    `collect` removed duplicates.

    Args:
        held_out: the share held out.
        limit: keep this many examples, for quick runs; None keeps all.
    """
    order = random.Random(seed)
    examples = order.sample(examples, len(examples) if limit is None else min(limit, len(examples)))
    by_label: dict[int, list[Example]] = defaultdict(list)
    for example in examples:
        by_label[example.label].append(example)
    train: list[Example] = []
    test: list[Example] = []
    for _, same in sorted(by_label.items()):
        cut = min(max(1, round(held_out * len(same))), len(same) - 1)  # one on each side, where there are two
        test += same[:cut]
        train += same[cut:]
    order.shuffle(train)
    order.shuffle(test)
    return train, test
