"""C++ compiled for tests: each source once, for all programs that are linked of it."""

import os
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

CXX = os.environ.get("CXX", "g++").split()[0]


def objects_of(sources: Iterable[Path], flags: Sequence[object], folder: Path) -> list[Path]:
    """An object file in ``folder`` for each source; kernels (.cu) are compiled as C++."""

    def compile_(source: Path) -> Path:
        target = folder / f"{source.parent.name}-{source.name}.o"
        _run(*flags, "-c", "-x", "c++", source, "-o", target)
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_, sources))


def link(objects: Iterable[Path], flags: Sequence[object], target: Path) -> None:
    """A program or a library of these object files."""
    _run(*flags, *objects, "-o", target)


def _run(*arguments: object) -> None:
    command = [CXX, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and "sanitize" in " ".join(command) and "cannot find" in done.stderr:
        pytest.skip("this compiler came without sanitizers")
    assert done.returncode == 0, done.stderr
