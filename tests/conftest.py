"""Fixtures: fresh random inputs whose seed is printed, and the backends that this machine can run."""

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator

# Before torch starts threads: where processes share few cores, threads that spin while they wait hold up those that
# they wait for, and a training step of a small model takes twenty times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Before anything imports triton: without a GPU its kernels run in the interpreter, on CPU tensors.
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, which trainers import, says so otherwise

import pytest

from seed import SEED


def pytest_configure(config: pytest.Config) -> None:
    """Makes the folder of what is compiled once for all of xdist's workers, which inherit its name."""
    if "CWCLIP_TEST_BUILT" not in os.environ:
        os.environ["CWCLIP_TEST_BUILT"] = folder = tempfile.mkdtemp(prefix="cwclip_test_built")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_report_header() -> str:
    return f"cwclip_kernels: random inputs from CWCLIP_TEST_SEED={SEED} (set it to repeat a run)"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        callspec = getattr(item, "callspec", None)
        if callspec is not None and callspec.params.get("backend") in ("cuda", "triton"):
            item.add_marker("builds")


def pytest_collection_finish() -> None:
    """gc.collect(), which a Trainer calls several times, looks at what tests make, not at all that was imported."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    """So that modules in C++ that count what is left at the end have nothing to complain about."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    # Another stream for every test, so that none depends on which ran before it.
    torch.manual_seed((SEED + sum(request.node.nodeid.encode())) % 2**31)


@pytest.fixture
def needs_triton() -> None:
    """For tests of the Triton backend alone: skips them, saying why, where it can't run."""
    from cwclip_kernels.backends import triton

    reason = triton.unavailable(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if reason is not None:
        pytest.skip(f"the triton backend {reason}")


@pytest.fixture
def own_garbage() -> None:
    """For tests that call gc.collect(): it looks at what the test made alone."""
    gc.freeze()


@pytest.fixture
def needs_extension() -> None:
    """For tests of the CPU's kernels: skips them, saying why, where the extension isn't there."""
    from cwclip_kernels.backends import native

    reason = native.unavailable()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def _the_cpu_kernels(request: pytest.FixtureRequest) -> None:
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and callspec.params.get("backend") == "cpu":
        request.getfixturevalue("needs_extension")


@pytest.fixture(autouse=True)
def _cuda_without_a_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where there is no GPU, tests of the CUDA backend run its kernels on the CPU."""
    callspec = getattr(request.node, "callspec", None)
    if torch.cuda.is_available() or callspec is None or callspec.params.get("backend") != "cuda":
        yield
        return
    import cuda_on_host

    with cuda_on_host.in_place_of_a_gpu():
        yield
