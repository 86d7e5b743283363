"""The CUDA backend on CPU tensors: its kernels compiled by g++, their threads as fibers: native/."""

import functools
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from cwclip_kernels.backends import cuda, native
from cwclip_kernels.backends.served import unserved

ROOT = Path(__file__).parents[2]
CXX = os.environ.get("CXX", "g++").split()[0]
CSRC = [ROOT / "csrc" / name for name in ("common/pieces.cpp", "cuda/program.cpp", "cuda/step.cpp")]
KERNELS = ["-x", "c++", ROOT / "csrc/cuda/launch.cu"]
# So that a component of a few tiles is one that all workers add up.
FLAGS = [
    "-DCWCLIP_MANY_PARTIALS=6",
    "-std=c++20",
    "-g",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
]

FORMS = (1, 2)  # two launches, one launch


def compile_(*arguments: object) -> None:
    """Hands these to the C++ compiler, and the kernels after them."""
    command = [CXX, *FLAGS, f"-I{ROOT / 'tests/_support/native'}", *map(str, arguments), *map(str, KERNELS)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and "sanitize" in " ".join(command) and "cannot find" in done.stderr:
        pytest.skip("this compiler came without sanitizers")
    assert done.returncode == 0, done.stderr


def build(target: Path) -> None:
    """Compiles the stand-in for cwclip_kernels._C (10 s)."""
    native = [ROOT / "tests/_support/native" / name for name in ("cuda_on_host.cpp", "blocks_as_fibers.cpp")]
    csrc = [
        *CSRC,
        *(ROOT / "csrc/common" / f"{name}.cpp" for name in ("python", "signature", "tensor_calls", "tensor_list")),
        *(ROOT / "csrc" / name for name in ("common/torch_objects.cpp", "cuda/clip.cpp")),
    ]
    python = ["-DPy_LIMITED_API=0x030a0000", f"-I{sysconfig.get_path('include')}"]
    compile_("-O2", "-fPIC", "-shared", *python, *native, *csrc, "-o", target)


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
    """The stand-in, built once a session."""
    if shutil.which(CXX) is None:
        pytest.skip("no C++ compiler for the CUDA kernels")
    with tempfile.TemporaryDirectory(prefix="cwclip_cuda_on_host") as folder:
        target = Path(folder) / "cwclip_cuda_on_host.so"
        build(target)
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
