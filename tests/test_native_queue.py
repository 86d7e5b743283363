"""The CPU queue by itself, without torch: random work by several threads, under sanitizers."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import SEED

ROOT = Path(__file__).parent.parent
SOURCES = ("tests/native/queue_stress.cpp", "csrc/cpu/queue.cpp", "csrc/cpu/kernels.cpp")
CXX = os.environ.get("CXX", "g++").split()[0]


@pytest.mark.skipif(shutil.which(CXX) is None, reason="no C++ compiler")
# Races; then memory errors and undefined behaviour; then what users run, as fast as it goes and in every clone.
@pytest.mark.parametrize("flags", ["-O1 -fsanitize=thread", "-O1 -fsanitize=address,undefined", "-O3"])
def test_random_work_by_several_threads(flags, tmp_path):
    program = tmp_path / "queue_stress"
    sanitized = "sanitize" in flags
    command = [
        CXX,
        "-std=c++17",
        "-g",
        *flags.split(),
        "-ffp-contract=off",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-psabi",
    ]
    command += ["-DCWCLIP_NO_CLONES"] if sanitized else []
    built = subprocess.run(
        [*command, *(str(ROOT / s) for s in SOURCES), "-pthread", "-o", program], capture_output=True, text=True
    )
    if built.returncode and "sanitize" in flags and "cannot find" in built.stderr:
        pytest.skip("this compiler came without sanitizers")
    assert built.returncode == 0, built.stderr
    rounds = 150 if sanitized else 500
    done = subprocess.run([program, str(SEED), str(rounds)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"{rounds} cases\n"
