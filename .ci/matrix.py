"""Runs the suite against the wheel beside other versions, and keeps the tables of docs/versions.md: make matrix.

    python .ci/matrix.py torch 2.10 2.14                          the quick part, whole and without what is optional
    python .ci/matrix.py trainers transformers==5.3.0,accelerate==1.3.0     tests/integrations

Each row gets a virtual environment (a build of torch with CUDA takes several GB; --venvs keeps them). Tests lie in a
folder of their own, so that what they import is the wheel and not the checkout. A row replaces the one of the same
versions in the page. Python is the one that runs this: run it in a chroot or a container for another.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/versions.md"
TOOLS = ["numpy", "pytest>=8", "pytest-xdist>=3.6", "pytest-benchmark>=5", "hypothesis>=6.100", "setuptools>=77"]
LEFT_OUT = ("backends", "distributed", "integrations", "tools")  # as make test-fast does
HIDDEN = {"whole": (), "no extension": ("cwclip_kernels._C",), "no Triton": ("triton",), "no numpy": ("numpy",)}
NEWEST = "2.13.0"  # of torch, beside trainers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("table", choices=("torch", "trainers"))
    parser.add_argument("rows", nargs="+", help="versions of torch, or pins of one environment joined by commas")
    parser.add_argument("--wheel", type=Path, help="the newest in dist/, unless given")
    parser.add_argument("--venvs", type=Path, help="a folder where environments are kept; otherwise each is removed")
    parser.add_argument("--page", type=Path, default=PAGE, help=f"default: {PAGE.relative_to(ROOT)}")
    options = parser.parse_args()
    wheels = sorted((ROOT / "dist").glob("*.whl"), key=lambda path: path.stat().st_mtime)
    wheel = options.wheel or (wheels[-1] if wheels else None)
    if wheel is None:
        parser.error("there is no wheel in dist/: make release-wheel")
    rows = []
    for row in options.rows:
        with tempfile.TemporaryDirectory() as name:
            kept = options.venvs or Path(name)
            tried = beside_torch(row, wheel, kept) if options.table == "torch" else beside_trainers(row, wheel, kept)
        rows.append([*tried, datetime.date.today().isoformat()])
        print(" | ".join(rows[-1]), flush=True)
        keep(options.page, options.table, rows[-1])
    return int(any(re.search("failed|error|installed", cell) for row in rows for cell in row))


def beside_torch(version: str, wheel: Path, venvs: Path) -> list[str]:
    """Python, torch, and a cell for each of HIDDEN."""
    # Exactly 2.13.0 where that is asked for, since a CPU build of it may be at hand.
    wanted = f"torch=={version}.0" if version == "2.13" else f"torch=={version}.*"
    python = environment(venvs / f"torch{version}", [[wanted, *TOOLS]])
    if python is None:
        return [platform.python_version(), version, *["could not be installed"] * len(HIDDEN)]
    found = version_of(python, "torch")
    left_out = ["-m", "not slow and not ranks and not builds", *(f"--ignore=tests/{each}" for each in LEFT_OUT)]
    return [platform.python_version(), found, *(tests(python, wheel, each, left_out) for each in HIDDEN.values())]


def beside_trainers(pins: str, wheel: Path, venvs: Path) -> list[str]:
    """Versions of the libraries, and what tests/integrations say."""
    wanted = pins.split(",")
    names = [re.split("[=<>]", each)[0] for each in wanted]
    python = environment(venvs / re.sub(r"\W+", "-", pins), [[f"torch=={NEWEST}"], [*wanted, *TOOLS, "rich"]])
    if python is None:
        return [pins.replace(",", " "), "could not be installed"]
    versions = ", ".join(f"{name} {version_of(python, name)}" for name in names)
    return [versions, tests(python, wheel, (), ["tests/integrations", "--ignore-glob=*deepspeed*"])]


def environment(venv: Path, steps: list[list[str]]) -> Path | None:
    """Its interpreter; made on first use."""
    python = venv / "bin/python"
    if not (venv / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
        for wanted in steps:
            done = run([python, "-m", "pip", "install", "--quiet", *wanted])
            if done.returncode:
                print(done.stderr[-2000:], file=sys.stderr)
                return None
        (venv / "ready").touch()
    return python


def version_of(python: Path, name: str) -> str:
    code = f"from importlib.metadata import version; print(version({name!r}))"
    return subprocess.check_output([python, "-c", code], text=True).strip()


def tests(python: Path, wheel: Path, hidden: tuple[str, ...], selected: list[str]) -> str:
    """What the tests say where the hidden modules can't be imported."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder / "installed"]
        subprocess.run([*install, wheel], check=True)
        # As if they weren't installed, in every process that the tests start as well.
        (folder / "installed/sitecustomize.py").write_text(
            "from importlib.machinery import PathFinder\n"
            "from types import MethodType\n"
            f"def find_spec(find, name, *rest): return None if name in {hidden!r} else find(name, *rest)\n"
            "PathFinder.find_spec = MethodType(find_spec, PathFinder.find_spec)\n"
        )
        options = ["-q", "-n", "2", "--dist", "worksteal", "-p", "no:cacheprovider"]
        command = [python, "-m", "pytest", *options, *selected]
        done = run(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(folder / "installed")})
        found = re.findall(r"\d+ (?:failed|passed|errors?)\b", done.stdout.strip().rpartition("\n")[2])
        if not found or done.returncode not in (0, 1):
            print(done.stdout[-3000:], done.stderr[-1000:], file=sys.stderr)
            return "error"
        if done.returncode:
            print("\n".join(re.findall(r"^(?:FAILED|ERROR) .*", done.stdout, re.M)), file=sys.stderr)
        return ", ".join(found)


def run(command: list[object], **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)


def keep(page: Path, table: str, row: list[str]) -> None:
    """Puts the row into the page's table between its two comments, in place of the one of the same versions."""
    begin, end = f"<!-- {table} -->\n", f"<!-- end of {table} -->"
    before, rest = page.read_text().split(begin)
    inside, after = rest.split(end)
    lines = inside.strip().splitlines()
    key = 2 if table == "torch" else 1
    rows = {cells[:key]: cells for line in lines[2:] for cells in [tuple(map(str.strip, line.strip("|").split("|")))]}
    rows[tuple(row[:key])] = tuple(row)
    by_version = sorted(
        rows.values(), key=lambda cells: [list(map(int, re.findall(r"\d+", cell))) for cell in cells[:key]]
    )
    lines[2:] = [f"| {' | '.join(cells)} |" for cells in by_version]
    page.write_text(before + begin + "\n".join(lines) + "\n" + end + after)


if __name__ == "__main__":
    sys.exit(main())
