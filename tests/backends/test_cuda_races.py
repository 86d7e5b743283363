"""Blocks of CUDA's kernels that run at the same time, under sanitizers: what they hand each other, what they step."""

import shutil
import subprocess

import pytest

from compiled import CXX, link, objects_of
from cuda_on_host import CSRC, FLAGS, NATIVE
from helpers import DEVICE
from seed import LONGER, SEED

pytestmark = [
    pytest.mark.skipif(DEVICE != "cpu", reason="about a machine that a GPU isn't; see test_cuda_gpu.py"),
    pytest.mark.skipif(shutil.which(CXX) is None, reason="no C++ compiler"),
    pytest.mark.builds,
]


# Races between blocks, each thread a host thread; then bounds and undefined behaviour.
@pytest.fixture(scope="module", params=["thread", "address,undefined"])
def run(request, tmp_path_factory):
    """Runs a program, of kernels that are compiled once for both."""
    flags = ["-O1", f"-fsanitize={request.param}", "-fno-sanitize-recover=all", "-pthread"]
    compiled = [*FLAGS, *flags, "-DCWCLIP_BLOCKS_AS_THREADS"]
    folder = tmp_path_factory.mktemp("races")
    kernels = objects_of([NATIVE / "blocks_as_threads.cpp", *CSRC], compiled, folder)

    def run(program, cases):
        own, cases = objects_of([NATIVE / f"{program}.cpp"], compiled, folder), int(cases * LONGER)
        link([*own, *kernels], flags, folder / program)
        done = subprocess.run([folder / program, str(SEED), str(cases)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout == f"{cases} cases\n"

    return run


def test_the_hand_over_between_blocks(run):
    run("hand_over", 60)


def test_blocks_step_without_races(run):
    run("step_races", 40)
