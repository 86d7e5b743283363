"""Runs the quick part of the suite against the wheel, beside several versions of torch: make matrix.

    python .ci/matrix.py --torch 2.10 2.14 --venvs /tmp/venvs --markdown docs/versions.md

Each version gets a virtual environment, which is kept: a build of torch with CUDA takes several GB. Each environment
gets the wheel, whole, and again without its extension, Triton and numpy. The tests lie in a folder of their own, so
that what they import is the wheel and not the checkout.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOOLS = ["numpy", "pytest>=8", "pytest-xdist>=3.6", "pytest-benchmark>=5", "hypothesis>=6.100", "setuptools>=77"]
LEFT_OUT = ("backends", "distributed", "integrations", "tools")  # as make test-fast does
HIDDEN = {"whole": (), "no extension": ("cwclip_kernels._C",), "no Triton": ("triton",), "no numpy": ("numpy",)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--torch", nargs="+", default=["2.10", "2.11", "2.12", "2.13", "2.14"], help="versions")
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters")
    parser.add_argument("--wheel", type=Path, help="the newest in dist/, unless given")
    parser.add_argument("--venvs", type=Path, default=Path(tempfile.gettempdir()) / "cwclip_venvs")
    parser.add_argument("--markdown", type=Path, help="where the table is written")
    options = parser.parse_args()
    wheels = sorted((ROOT / "dist").glob("*.whl"), key=lambda path: path.stat().st_mtime)
    wheel = options.wheel or (wheels[-1] if wheels else None)
    if wheel is None:
        parser.error("there is no wheel in dist/: make wheel")
    rows = []
    for python in options.python:
        for version in options.torch:
            row = tried(python, version, wheel, options.venvs)
            print(" | ".join(row), flush=True)
            rows.append(row)
    if options.markdown is not None:
        options.markdown.write_text(page_of(rows, wheel.name))
    return int(any("failed" in cell or "error" in cell for row in rows for cell in row))


def tried(python: str, version: str, wheel: Path, venvs: Path) -> list[str]:
    """One row: Python, torch, and a cell for each of HIDDEN."""
    numbers = subprocess.check_output([python, "-c", "import platform; print(platform.python_version())"], text=True)
    venv = venvs / f"python{numbers.strip()}-torch{version}"
    if not (venv / "ready").exists():
        subprocess.run([python, "-m", "venv", "--clear", venv], check=True)
        # Exactly 2.13.0 where that is asked for, since a CPU build of it may be at hand.
        wanted = f"torch=={version}.0" if version == "2.13" else f"torch=={version}.*"
        done = run([venv / "bin/python", "-m", "pip", "install", "--quiet", wanted, *TOOLS])
        if done.returncode:
            return [numbers.strip(), version, *["could not be installed"] * len(HIDDEN)]
        (venv / "ready").touch()
    interpreter = venv / "bin/python"
    found = subprocess.check_output([interpreter, "-c", "import torch; print(torch.__version__)"], text=True).strip()
    return [numbers.strip(), found, *(cell_of(interpreter, wheel, hidden) for hidden in HIDDEN.values())]


def cell_of(interpreter: Path, wheel: Path, hidden: tuple[str, ...]) -> str:
    """What the tests say where these modules can't be imported."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        install = [interpreter, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder / "installed"]
        subprocess.run([*install, wheel], check=True)
        # As if they weren't installed, in every process that the tests start as well.
        (folder / "installed/sitecustomize.py").write_text(
            "from functools import partial\n"
            "from importlib.machinery import PathFinder\n"
            f"def find_spec(find, name, *rest): return None if name in {hidden!r} else find(name, *rest)\n"
            "PathFinder.find_spec = partial(find_spec, PathFinder.find_spec)\n"
        )
        command = [interpreter, "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal", "-p", "no:cacheprovider"]
        marked = [*command, "-m", "not slow and not ranks and not builds"]
        environment = {**os.environ, "PYTHONPATH": str(folder / "installed")}
        left_out = [f"--ignore=tests/{each}" for each in LEFT_OUT]
        done = run([*marked, *left_out], cwd=folder, env=environment)
        last = re.search(r"(\d+ failed, )?(\d+ passed)[^=\n]*?(, \d+ errors?)?", done.stdout)
        if last is None or done.returncode not in (0, 1):
            print(done.stdout[-3000:], done.stderr[-1000:], file=sys.stderr)
            return "error"
        if done.returncode:
            print("\n".join(re.findall(r"^(?:FAILED|ERROR) .*", done.stdout, re.M)), file=sys.stderr)
        return (last[1] or "") + last[2]


def run(command: list[object], **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)


def page_of(rows: list[list[str]], wheel: str) -> str:
    head = ["Python", "torch", *HIDDEN]
    lines = [head, ["---"] * len(head), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        "# Versions that were tried\n\n"
        f"{datetime.date.today().isoformat()}, on a machine without a GPU: the quick part of the suite against one\n"
        f"wheel, `{wheel}`, as it is and where its extension, Triton or numpy can't be imported.\n"
        "`make matrix` repeats it.\n\n"
        f"{table}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
