"""The backends that tests on a GPU go through."""

import os

import pytest
import torch

from cwclip_kernels.backends import cuda, triton


@pytest.fixture(params=("cuda-1", "cuda-2", "triton"))
def backend(request, monkeypatch) -> str:
    """A backend by name, the CUDA one in each of its forms."""
    name, _, form = request.param.partition("-")
    module = {"cuda": cuda, "triton": triton}[name]
    reason = module.refuses(torch.device("cuda", 0), torch.float32, 2.0)
    if reason is not None:
        # What the machine should have, and hasn't, is no reason to call it tested.
        assert not os.environ.get("CWCLIP_REQUIRE_GPU"), reason
        pytest.skip(f"{name} {reason}")
    if form:
        monkeypatch.setenv("CWCLIP_CUDA_FORM", form)
    return name
