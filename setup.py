"""Builds the native extension; everything else about the package is in pyproject.toml.

CWCLIP_BUILD=auto   (default) builds what this machine can and says what it left out
CWCLIP_BUILD=cuda   the C++ extension with the CUDA kernels, or fails
CWCLIP_BUILD=cpu    the C++ extension without them, or fails
CWCLIP_BUILD=none   pure Python: Triton and torch._foreach only

CXX                   C++ compiler, also behind nvcc
CUDA_HOME, CUDA_PATH  where bin/nvcc is; otherwise the one on the PATH
TORCH_CUDA_ARCH_LIST  GPUs, as for torch: "8.0;9.0;10.0+PTX"
MAX_JOBS              how many of them nvcc compiles for at a time
CWCLIP_GLIBC=2.28     links for that glibc and newer ones, by the linker of ziglang from PyPI (make release-wheel)

No GPU and no CUDA build of torch are needed: the CUDA runtime is linked statically, and a GPU is looked for when a
gradient on one comes along.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

MODE = os.environ.get("CWCLIP_BUILD", "auto").lower()
TORCH_FLOOR = (2, 10)  # std::vector<Tensor> arguments in torch's stable ABI, DLPack's C exchange API
CUDA_FLOOR = (12, 1)  # kernels with more than 4 KB of parameters
ARCHITECTURES = "8.0;9.0;10.0+PTX"
OLDEST_GPU = 8  # cp.async and mbarrier


def main() -> None:
    """Decides what to build and hands over to setuptools."""
    if MODE not in ("auto", "none", "cpu", "cuda"):
        sys.exit(f"CWCLIP_BUILD: expected auto, none, cpu or cuda, not {MODE!r}")
    obstacle = "CWCLIP_BUILD=none" if MODE == "none" else missing()
    if obstacle and MODE in ("cpu", "cuda"):
        sys.exit(f"CWCLIP_BUILD={MODE}: {obstacle}")
    nvcc: Nvcc | None = None
    if obstacle:
        report = f"without the C++ extension ({obstacle})"
    elif MODE == "cpu":
        report = "with the C++ extension, without CUDA kernels (CWCLIP_BUILD=cpu)"
    else:
        try:
            nvcc = Nvcc()
            report = f"with the C++ extension and CUDA kernels for {', '.join(nvcc.targets)}"
        except BuildError as error:
            if MODE == "cuda":
                sys.exit(f"CWCLIP_BUILD=cuda: {error}")
            report = f"with the C++ extension, without CUDA kernels ({error})"
    print(f"cwclip_kernels: building {report}", file=sys.stderr)
    setup(
        ext_modules=[] if obstacle else [extension(nvcc)],
        cmdclass={"bdist_wheel": AbiWheel, "build_ext": BuildWithNvcc, "sdist": WholeSdist},
    )


class BuildError(Exception):
    """What can't be built here, with the way out."""


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


class Nvcc:
    """The CUDA compiler of this machine.

    Attributes:
        path: of nvcc.
        targets: what it compiles for, as in ``-gencode arch=...,code=...``'s code.

    Raises:
        BuildError: there is none, it is too old, or doesn't know the GPUs asked for.
    """

    def __init__(self) -> None:
        self.path = self._find()
        release = re.search(r"release (\d+)\.(\d+)", self._ask("--version"))
        if release is None or (int(release[1]), int(release[2])) < CUDA_FLOOR:
            found = release[0] if release else "of unknown version"
            raise BuildError(
                f"nvcc {self.path} is {found}, and {'.'.join(map(str, CUDA_FLOOR))} is needed: update CUDA"
            )
        known = self._ask("--list-gpu-code").split()
        asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
        self.targets = self._targets(asked or ARCHITECTURES, known, strict=bool(asked))
        if not self.targets:
            raise BuildError(
                f"nvcc {self.path} compiles for none of {asked or ARCHITECTURES}: set TORCH_CUDA_ARCH_LIST to "
                f"compute capabilities from {OLDEST_GPU}.0 on"
            )

    @staticmethod
    def _find() -> str:
        for variable in ("CUDA_HOME", "CUDA_PATH"):
            if home := os.environ.get(variable):
                path = shutil.which("nvcc", path=str(Path(home) / "bin"))
                if path is None:
                    raise BuildError(f"no nvcc in {home}/bin: unset {variable}, or correct it")
                return path
        path = shutil.which("nvcc")
        if path is None:
            raise BuildError("no nvcc: install the CUDA toolkit, and set CUDA_HOME or put nvcc on the PATH")
        return path

    @staticmethod
    def _targets(architectures: str, known: list[str], *, strict: bool) -> list[str]:
        targets: list[str] = []
        for text in architectures.replace(";", " ").split():
            match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", text)
            if match is None:
                raise BuildError(f"TORCH_CUDA_ARCH_LIST: {text!r} is not a number like 9.0 or 10.0+PTX")
            major, minor, family, ptx = match.groups()
            if int(major) < OLDEST_GPU:  # as in the lists of many containers
                need = f"they need {OLDEST_GPU}.0, and Triton's serve older GPUs"
                print(f"cwclip_kernels: no CUDA kernels for {text}: {need}", file=sys.stderr)
                continue
            if f"sm_{major}{minor}" not in known:
                if strict:
                    raise BuildError(f"TORCH_CUDA_ARCH_LIST: this nvcc doesn't know {text} ({', '.join(known)})")
                continue
            targets.append(f"sm_{major}{minor}{family}")
            if ptx:
                targets.append(f"compute_{major}{minor}{family}")
        if targets and not strict and not targets[-1].startswith("compute"):
            targets.append(targets[-1].replace("sm", "compute"))  # an nvcc that doesn't know our newest yet
        return targets

    def compile(self, source: str, target: str) -> None:
        """One .cu file to one object file."""
        options = ["-c", source, "-o", target, "-O3", "-std=c++17", "--expt-relaxed-constexpr", "-DCWCLIP_WITH_CUDA"]
        options += ["--threads", os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)]
        options += ["-Xfatbin", "-compress-all"]  # a tenth of the size
        options += ["-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
        options += ["-ccbin", os.environ.get("CXX", "g++").split()[0]]
        for code in self.targets:
            options += ["-gencode", f"arch={code.replace('sm', 'compute')},code={code}"]
        subprocess.run([self.path, *options], check=True)

    def library_dirs(self) -> list[str]:
        """Where this nvcc's static runtime lies, by its own account."""
        found = re.search(r"^#\$ LIBRARIES=(.*)$", self._ask("--dryrun", "-shared", "none.cu"), re.MULTILINE)
        return re.findall(r'-L([^"\s]+)', found[1]) if found else []

    def _ask(self, *arguments: str) -> str:
        done = subprocess.run([self.path, *arguments], capture_output=True, text=True)
        return done.stdout + done.stderr


def extension(nvcc: Nvcc | None) -> Extension:
    """csrc/ as one module over torch's stable ABI, for any Python >= 3.10 and torch >= 2.10."""
    from torch.utils.cpp_extension import include_paths, library_paths

    os.environ.setdefault("CC", "gcc")
    os.environ.setdefault("CXX", "g++")
    sources = [path for path in Path("csrc").rglob("*.c*") if path.suffix in (".cpp", ".cu")]
    if nvcc is None:
        sources = [path for path in sources if path.parent.name != "cuda"]
    result = Extension(
        "cwclip_kernels._C",
        sources=sorted(map(str, sources)),
        depends=["csrc/exports.map", *sorted(map(str, Path("csrc").rglob("*.*h")))],
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
    if nvcc is not None:
        result.define_macros.append(("CWCLIP_WITH_CUDA", None))
        result.library_dirs += nvcc.library_dirs()
        result.libraries += ["cudart_static", "dl", "pthread", "rt"]
        result.extra_link_args.append("-Wl,--exclude-libs,ALL")
        result.nvcc = nvcc
    return result


class BuildWithNvcc(build_ext):
    """Hands .cu files to nvcc, which setuptools doesn't know, and everything else to the C++ compiler.

    Not torch's CUDAExtension: that links libtorch_cuda, and the module couldn't load beside a CPU build of torch.
    """

    def build_extension(self, ext: Extension) -> None:
        """Compiles and links one extension."""
        kernels = [source for source in ext.sources if source.endswith(".cu")]
        ext.sources = [source for source in ext.sources if not source.endswith(".cu")]
        ext.depends += kernels  # so that a change of one alone is linked
        for source in kernels:
            target = Path(self.build_temp) / Path(source).with_suffix(".cu.o")
            target.parent.mkdir(parents=True, exist_ok=True)
            ext.nvcc.compile(source, str(target))
            ext.extra_objects.append(str(target))
        if "CWCLIP_GLIBC" in os.environ:
            self._link_for_glibc(ext, os.environ["CWCLIP_GLIBC"])
        super().build_extension(ext)

    def _link_for_glibc(self, ext: Extension, version: str) -> None:
        """Links with the symbols of an older glibc, and libstdc++ in the module: it runs where torch's wheels do.

        Objects are g++'s and nvcc's as ever. Only what they call in glibc is looked up in an older list of it, which
        ziglang has, so that no old system is needed to build.
        """
        if not re.fullmatch(r"2\.\d+", version):
            sys.exit(f"CWCLIP_GLIBC: expected a version like 2.28, not {version!r}")
        target = f"{platform.machine()}-linux-gnu.{version}"
        linker = [sys.executable, "-m", "ziglang", "cc", "-target", target, "-shared", "-s"]
        if subprocess.run([*linker[:3], "version"], capture_output=True).returncode:
            sys.exit("CWCLIP_GLIBC: links with ziglang, which isn't here: pip install ziglang")

        def link(objects: list[str], output: str, libraries: list[str], library_dirs: list[str], **more: Any) -> None:
            folders = [f"-L{folder}" for folder in library_dirs]
            names = [f"-l{name}" for name in libraries]
            command = [*linker, *objects, *folders, *names, *more["extra_postargs"], "-o", output]
            print(*command)
            Path(output).parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(command, check=True)

        self.compiler.link_shared_object = link  # setuptools would put the C++ compiler in front
        # What newer glibcs have and g++'s objects and libstdc++ refer to: whether threads were ever started (2.32),
        # and random bytes (2.36), which nothing here asks for.
        newer = Path(self.build_temp) / "newer_glibc.c"
        newer.parent.mkdir(parents=True, exist_ok=True)
        newer.write_text(NEWER_GLIBC)
        ext.extra_objects += self.compiler.compile([str(newer)], extra_postargs=["-fPIC", "-g0"])
        if "cudart_static" in ext.libraries:  # as a file, since zig would look for a shared one
            ext.libraries.remove("cudart_static")
            ext.extra_link_args.append(_static("libcudart_static.a", ext.library_dirs))
        compiler = os.environ["CXX"].split()[0]
        # The unwinder is the system's: a static one of a newer compiler looks frames up by what glibc has since 2.35.
        for name in ("libstdc++.a", "libgcc.a", "libgcc_s.so.1"):
            found = subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()
            ext.extra_link_args.append(found)
        # zig's linker exports what the version script says, and has no --exclude-libs.
        ext.extra_link_args = [each for each in ext.extra_link_args if not each.startswith("-Wl,--exclude-libs")]


def _static(name: str, folders: list[str]) -> str:
    return next(str(Path(folder) / name) for folder in folders if (Path(folder) / name).exists())


NEWER_GLIBC = """\
#include <unistd.h>
#define HIDDEN __attribute__((visibility("hidden")))
HIDDEN char __libc_single_threaded = 0;
HIDDEN unsigned arc4random(void) { unsigned value; return getentropy(&value, sizeof value) ? 0 : value; }
"""


class WholeSdist(sdist):
    """Packs all of csrc/, whatever this machine can build of it."""

    def make_distribution(self) -> None:
        """Adds the files, and packs them."""
        own = (str(path) for path in Path("csrc").rglob("*") if path.is_file())
        self.filelist.extend(sorted(set(own) - set(self.filelist.files)))
        super().make_distribution()


class AbiWheel(bdist_wheel):
    """Tags a wheel with the extension cp310-abi3, and one without it py3-none-any."""

    def finalize_options(self) -> None:
        """Chooses the tag."""
        if self.distribution.ext_modules:
            self.py_limited_api = "cp310"
        super().finalize_options()


main()
