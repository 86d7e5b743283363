"""The native functions, called with wrong lists, devices, dtypes and sizes: an error, never a crash."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fuzz_native
from seed import LONGER, SEED

ROOT = Path(__file__).parents[2]


def test_as_they_are_built():
    fuzz_native.main(2 * LONGER, SEED)


def library_of(compiler, name):
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return Path(found.stdout.strip()).resolve()


@pytest.mark.slow
def test_under_sanitizers(tmp_path):
    """The extension built with AddressSanitizer and UBSan: the same calls, and the suite's own of the CPU backend."""
    compiler = os.environ.get("CXX", "g++").split()[0]
    if shutil.which(compiler) is None:
        pytest.skip("no C++ compiler")
    # libstdc++ too, or AddressSanitizer does not find what to hand exceptions on to.
    libraries = [library_of(compiler, name) for name in ("libasan.so", "libstdc++.so.6")]
    if not all(library.exists() for library in libraries):
        pytest.skip("this compiler came without sanitizers")
    quick = tmp_path / "quick-compiler"
    quick.write_text(f'#!/bin/sh\nexec {shutil.which(compiler)} "$@" -O1\n')  # after -O3, which takes twice as long
    quick.chmod(0o755)
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.so", "bench_out", "demo_out"))
    environment = {**os.environ, "CWCLIP_BUILD": "cpu", "CC": str(quick), "CXX": str(quick)}
    environment |= {"CFLAGS": flags, "CXXFLAGS": flags, "LDFLAGS": flags}
    built = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=source, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    runs = {
        **os.environ,
        "LD_PRELOAD": ":".join(map(str, libraries)),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",  # Python leaks on purpose
        "PYTHONPATH": os.pathsep.join((str(source), str(source / "tests/_support"))),
        "CWCLIP_FUZZ": str(0.2 * LONGER),
    }
    for command in (
        [str(source / "tests/_support/fuzz_native.py"), str(6 * LONGER), str(SEED)],
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_fuzz.py", "-k", "cpu"],
    ):
        done = subprocess.run([sys.executable, *command], cwd=source, env=runs, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
