"""The backends that tests on a GPU go through, and the machines that stand in for one."""

import os
import random
from collections.abc import Iterator
from unittest import mock

import pytest
import torch

import cuda_on_host
from cwclip_kernels.backends import cuda, triton
from cwclip_kernels.core import run
from seed import SEED

# Processors, two blocks on each, and how many run at a time: a block by itself; more blocks than run; all at once.
MACHINES = ((1, 1), (3, 2), (4, 8))


@pytest.fixture(params=("cuda-1", "cuda-2", "triton"))
def backend(request, monkeypatch) -> Iterator[str]:
    """A backend by name, the CUDA one in each of its forms; where there is no GPU, this one's kernels on the CPU."""
    name, _, form = request.param.partition("-")
    if form:
        monkeypatch.setenv("CWCLIP_CUDA_FORM", form)
    if name == "cuda" and not torch.cuda.is_available():
        if os.environ.get("CWCLIP_REQUIRE_GPU"):
            pytest.fail("there is no GPU")
        with cuda_on_host.in_place_of_a_gpu():
            yield name
        return
    module = {"cuda": cuda, "triton": triton}[name]
    reason = module.refuses(torch.device("cuda", 0), torch.float32, 2.0)
    if reason is not None:
        # What the machine should have, and hasn't, is no reason to call it tested.
        (pytest.fail if os.environ.get("CWCLIP_REQUIRE_GPU") else pytest.skip)(f"{name} {reason}")
    yield name


@pytest.fixture
def gpu():
    """The CUDA backend on the CPU."""
    with cuda_on_host.in_place_of_a_gpu() as stand_in:
        yield stand_in


@pytest.fixture(params=MACHINES, ids=str)
def machine(request, gpu):
    """The same on several machines."""
    gpu.set_machine(*request.param, random.Random(SEED).randrange(2**31))
    return gpu


@pytest.fixture(params=("cpu", "cuda", "cuda-through-python"))
def native_way(request, gpu):
    """A native backend, and whether it calls torch's C++ functions or Python's."""
    name, _, through_python = request.param.partition("-")
    gpu.call_torch_through_python(bool(through_python))
    yield name
    gpu.call_torch_through_python(False)


@pytest.fixture
def general(monkeypatch):
    """Counts the calls that weren't served at once, but for those of the reference."""
    counted, clip_ = mock.Mock(), run.clip_

    def count(plan, *arguments):
        if all(bucket.backend != "reference" for bucket in plan.buckets):
            counted()
        return clip_(plan, *arguments)

    monkeypatch.setattr(run, "clip_", count)
    return counted
