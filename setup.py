"""Builds the native extension; everything else about the package is in pyproject.toml.

CWCLIP_BUILD=auto   (default) builds what this machine can and says what it left out
CWCLIP_BUILD=cpu    the C++ extension, or fails
CWCLIP_BUILD=none   pure Python: Triton and torch._foreach only
CWCLIP_BUILD=cuda   refused by this version, whose GPU kernels are Triton's and need no build
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel

MODE = os.environ.get("CWCLIP_BUILD", "auto").lower()
TORCH_FLOOR = (2, 10)  # std::vector<Tensor> arguments in torch's stable ABI


def main() -> None:
    """Decides what to build and hands over to setuptools."""
    if MODE not in ("auto", "none", "cpu", "cuda"):
        sys.exit(f"CWCLIP_BUILD: expected auto, none, cpu or cuda, not {MODE!r}")
    if MODE == "cuda":
        sys.exit(
            "CWCLIP_BUILD=cuda: this version has no CUDA sources. On GPUs its kernels are Triton's, compiled at "
            "first use: build with CWCLIP_BUILD=cpu and install triton."
        )
    obstacle = "CWCLIP_BUILD=none" if MODE == "none" else missing()
    if obstacle and MODE == "cpu":
        sys.exit(f"CWCLIP_BUILD=cpu: {obstacle}")
    report = f"without the C++ extension ({obstacle})" if obstacle else "with the C++ extension"
    print(f"cwclip_kernels: building {report}", file=sys.stderr)
    setup(ext_modules=[] if obstacle else [extension()], cmdclass={"bdist_wheel": AbiWheel})


def missing() -> str | None:
    """What the extension lacks on this machine, with the way out, or None."""
    try:
        import torch
    except ImportError:
        return "torch is not in the build environment: install it first, then pip install --no-build-isolation ."
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found < TORCH_FLOOR:
        return f"torch {torch.__version__} is older than {'.'.join(map(str, TORCH_FLOOR))}: upgrade it"
    compiler = os.environ.get("CXX", "g++").split()[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler}): install g++, or set CXX"
    return None


def extension() -> Extension:
    """csrc/ as one module over torch's stable ABI, for any Python >= 3.10 and torch >= 2.10."""
    from torch.utils.cpp_extension import include_paths, library_paths

    os.environ.setdefault("CC", "gcc")
    os.environ.setdefault("CXX", "g++")
    return Extension(
        "cwclip_kernels._C",
        sources=sorted(map(str, Path("csrc").rglob("*.cpp"))),
        depends=["csrc/exports.map", *sorted(map(str, Path("csrc").rglob("*.h")))],
        library_dirs=library_paths(),
        libraries=["torch_cpu"],
        define_macros=[("Py_LIMITED_API", "0x030a0000"), ("TORCH_TARGET_VERSION", "0x020a000000000000")],
        extra_compile_args=[
            "-std=c++17",
            "-O3",
            "-g0",  # Python's own flags ask for debug symbols: ten times the size
            "-fvisibility=hidden",
            "-ffp-contract=off",  # the same bits on machines with and without fused multiply-add
            "-Wall",
            "-Wextra",
            "-Wno-psabi",  # vector types cross no function boundary that isn't inlined
            *(f"-isystem{path}" for path in include_paths()),  # system headers: their warnings are torch's
        ],
        extra_link_args=["-Wl,--version-script=csrc/exports.map", "-Wl,--as-needed"],
        language="c++",
        py_limited_api=True,
    )


class AbiWheel(bdist_wheel):
    """Tags a wheel with the extension cp310-abi3, and one without it py3-none-any."""

    def finalize_options(self) -> None:
        """Chooses the tag."""
        if self.distribution.ext_modules:
            self.py_limited_api = "cp310"
        super().finalize_options()


main()
