"""The CUDA backend on CPU tensors: its kernels compiled by g++, their threads as fibers: native/."""

import fcntl
import functools
import importlib.util
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from compiled import CXX, link, objects_of
from cwclip_kernels.backends import cuda, native
from cwclip_kernels.backends.served import unserved

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "tests/_support/native"
CSRC = [ROOT / "csrc" / name for name in ("common/pieces.cpp", "cuda/program.cpp", "cuda/step.cpp", "cuda/launch.cu")]
# So that a component of a few tiles is one that all workers add up.
FLAGS = [
    "-DCWCLIP_MANY_PARTIALS=6",
    "-std=c++20",
    "-g1",  # lines, which is all that reports of sanitizers name
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    f"-I{NATIVE}",
]

FORMS = (1, 2)  # two launches, one launch


def build(target: Path) -> None:
    """Compiles the stand-in for cwclip_kernels._C (10 s)."""
    sources = [
        *(NATIVE / name for name in ("cuda_on_host.cpp", "blocks_as_fibers.cpp")),
        *CSRC,
        *(ROOT / "csrc/common" / f"{name}.cpp" for name in ("python", "signature", "tensor_calls", "tensor_list")),
        *(ROOT / "csrc" / name for name in ("common/torch_objects.cpp", "cuda/clip.cpp")),
    ]
    python = ["-DPy_LIMITED_API=0x030a0000", f"-I{sysconfig.get_path('include')}"]
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        objects = objects_of(sources, [*FLAGS, "-O2", "-fPIC", *python], Path(folder))
        link(objects, ["-shared"], target)


def load(target: Path) -> Any:
    """The stand-in as it was built."""
    spec = importlib.util.spec_from_file_location("cwclip_cuda_on_host", target)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@functools.cache
def module() -> Any:
    """The stand-in, built once for all processes of a run."""
    if shutil.which(CXX) is None:
        pytest.skip("no C++ compiler for the CUDA kernels")
    folder = Path(os.environ["CWCLIP_TEST_BUILT"])  # conftest.py makes it
    target = folder / "cwclip_cuda_on_host.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            build(folder / "unfinished.so")
            (folder / "unfinished.so").rename(target)
    return load(target)


@contextmanager
def in_place_of_a_gpu(stand_in: Any = None) -> Iterator[Any]:
    """Lets ``backend="cuda"`` serve CPU tensors, on two processors with two blocks each."""
    assert native.unavailable() is None
    stand_in = stand_in or module()
    stand_in.set_machine(2, 4, 0)
    stand_in.set_l2_bytes(0)
    stand_in.set_stream(0, 0, False)
    for name in vars(native._C).keys() - vars(stand_in).keys():  # the other backends go on as they are
        setattr(stand_in, name, getattr(native._C, name))

    def refuses(device, dtype, norm_type):
        return unserved(dtype, norm_type) if device.type == "cpu" else f"serves no {device.type} here"

    with (
        mock.patch.object(native, "_C", stand_in),
        mock.patch.object(cuda, "refuses", refuses),
        mock.patch.dict(os.environ, {"CWCLIP_CUDA_BLOCKS_PER_SM": "2"}),
    ):
        yield stand_in
