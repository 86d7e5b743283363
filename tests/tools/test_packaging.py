"""The wheel: one abi3 binary that exports its entry point alone and works in a clean environment."""

import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc")
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "cwclip_kernels")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what the package is built from, so that the checkout stays as it is."""
    tree = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, tree / name)
    return tree


def build(source: Path, mode: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-build-isolation", "--no-deps", "-v"]
    command += ["--wheel-dir", str(source / f"dist-{mode}")]
    variables = {**os.environ, "CWCLIP_BUILD": mode, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment}
    return subprocess.run(command, cwd=source, env=variables, capture_output=True, text=True)


def wheel_of(source: Path, mode: str) -> Path:
    (wheel,) = (source / f"dist-{mode}").glob("*.whl")
    return wheel


def set_up(source: Path, mode: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What setup.py decides and says, without a build."""
    variables = {**os.environ, "CWCLIP_BUILD": mode, **environment}
    command = [sys.executable, "setup.py", "--version"]
    return subprocess.run(command, cwd=source, env=variables, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(source):
    """The wheel as ``make wheel`` makes it, but optimized less; where there is nvcc, for one kind of GPU."""
    compiler = shutil.which(os.environ.get("CXX", "g++").split()[0])
    if compiler is None:
        pytest.skip("no C++ compiler")
    quick = source / "quick-compiler"
    quick.write_text(f'#!/bin/sh\nexec {compiler} "$@" -O1\n')  # the last -O counts
    quick.chmod(0o755)
    mode, report = ("cuda", "and CUDA kernels for sm_90, compute_90") if NVCC else ("cpu", "without CUDA kernels")
    done = build(source, mode, TORCH_CUDA_ARCH_LIST="9.0+PTX", CC=str(quick), CXX=str(quick))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(f"cwclip_kernels: building with the C\\+\\+ extension,? {report}", done.stdout + done.stderr)
    return wheel_of(source, mode)


def test_one_abi3_wheel_with_types_and_one_binary(wheel):
    assert "-cp310-abi3-linux_" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert [n for n in names if n.endswith(".so")] == ["cwclip_kernels/_C.abi3.so"]
    assert {"cwclip_kernels/py.typed", "cwclip_kernels/_C.pyi"} <= set(names)
    assert {n.split("/")[0].split("-")[0] for n in names} == {"cwclip_kernels"}


def test_exports_its_entry_point_alone_and_needs_no_cuda(wheel, tmp_path):
    zipfile.ZipFile(wheel).extract("cwclip_kernels/_C.abi3.so", tmp_path)
    binary = tmp_path / "cwclip_kernels/_C.abi3.so"
    if shutil.which("nm") is None:
        pytest.skip("no binutils")
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", binary], capture_output=True, text=True, check=True
    ).stdout
    assert [line.split()[-1] for line in listing.splitlines()] == ["PyInit__C"]
    needed = subprocess.run(["readelf", "-d", binary], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu" in needed
    for absent in ("libtorch_cuda", "libc10_cuda", "libcudart", "libcuda.so", "libtorch_python", "libpython"):
        assert absent not in needed


def test_installs_and_clips_in_a_clean_environment(wheel, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    packages = tmp_path / f"venv/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", packages]
    subprocess.run([*command, wheel], check=True)
    # torch is large, so it comes from this environment; its path goes last, and .pth files in it have no effect.
    borrowed = [p for p in (sysconfig.get_path("purelib"), *site.getsitepackages()) if (Path(p) / "torch").exists()]
    borrowed = borrowed or [str(Path(torch.__file__).parent.parent)]
    (packages / "torch.pth").write_text(borrowed[0] + "\n")
    code = """
import torch, cwclip_kernels, cwclip_kernels.telemetry
assert "venv" in cwclip_kernels.__file__, cwclip_kernels.__file__
p = torch.nn.Parameter(torch.zeros(2)); p.grad = torch.tensor([3.0, 4.0])
print(cwclip_kernels.fused_component_clip_([p], 1.0, backend="cpu").item(), p.grad)
"""
    done = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "5.0 tensor([0.6000, 0.8000])"


def test_an_sdist_has_all_sources_whatever_this_machine_can_build(source, tmp_path):
    code = f"import setuptools.build_meta as b; b.build_sdist({str(tmp_path)!r})"
    variables = {**os.environ, "CWCLIP_BUILD": "none"}
    done = subprocess.run([sys.executable, "-c", code], cwd=source, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(made) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert ours <= names
    assert {"setup.py", "pyproject.toml", "cwclip_kernels/_C.pyi", "cwclip_kernels/py.typed", "LICENSE"} <= names


def test_without_extension_the_wheel_is_pure_and_says_so(source):
    done = build(source, "auto", CXX="no-such-compiler")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "building without the C++ extension (no C++ compiler (no-such-compiler)" in done.stdout + done.stderr
    assert wheel_of(source, "auto").name.endswith("-py3-none-any.whl")


def test_what_was_asked_for_and_cannot_be_built_fails_the_installation(source):
    done = build(source, "cpu", CXX="no-such-compiler")
    assert done.returncode != 0
    assert "CWCLIP_BUILD=cpu: no C++ compiler" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("mode", "environment", "message"),
    [
        ("cuda", {"CUDA_HOME": "/no/such/cuda"}, "CWCLIP_BUILD=cuda: no nvcc in /no/such/cuda/bin: unset CUDA_HOME"),
        ("cuda", {"CUDA_HOME": "{folder}"}, "CWCLIP_BUILD=cuda: nvcc .* is release 11.8, and 12.1 is needed"),
        pytest.param(
            *(
                "cuda",
                {"TORCH_CUDA_ARCH_LIST": "9.0;Hopper"},
                "TORCH_CUDA_ARCH_LIST: 'Hopper' is not a number like 9.0",
            ),
            marks=pytest.mark.skipif(NVCC is None, reason="no nvcc"),
        ),
        pytest.param(
            *("cuda", {"TORCH_CUDA_ARCH_LIST": "9.0;17.5"}, r"this nvcc doesn't know 17.5 \(sm_"),
            marks=pytest.mark.skipif(NVCC is None, reason="no nvcc"),
        ),
        pytest.param(
            *(
                "cuda",
                {"TORCH_CUDA_ARCH_LIST": "7.5"},
                "(?s)no CUDA kernels for 7.5: they need 8.0.*for none of 7.5: set",
            ),
            marks=pytest.mark.skipif(NVCC is None, reason="no nvcc"),
        ),
        ("fast", {}, "CWCLIP_BUILD: expected auto, none, cpu or cuda, not 'fast'"),
    ],
)
def test_what_was_asked_for_and_cannot_be_built_fails_loudly(source, mode, environment, message, tmp_path):
    old = tmp_path / "bin/nvcc"
    old.parent.mkdir()
    old.write_text("#!/bin/sh\necho Cuda compilation tools, release 11.8, V11.8.89\n")
    old.chmod(0o755)
    environment = {k: v.format(folder=tmp_path) for k, v in environment.items()}
    # setup.py asks torch for its version alone before it gives up, and the real one takes seconds to import.
    (tmp_path / "torch.py").write_text(f"__version__ = {torch.__version__!r}")
    done = set_up(source, mode, PYTHONPATH=str(tmp_path), **environment)
    assert done.returncode != 0
    assert re.search(message, done.stderr)


@pytest.mark.parametrize(
    ("mode", "environment", "message"),
    [
        ("none", {}, "without the C++ extension (CWCLIP_BUILD=none)"),
        (
            "auto",
            {"CUDA_HOME": "/no/such/cuda"},
            "with the C++ extension, without CUDA kernels (no nvcc in /no/such/cuda/bin",
        ),
    ],
)
def test_what_is_left_out_is_said(source, mode, environment, message):
    done = set_up(source, mode, **environment)
    assert done.returncode == 0, done.stderr
    assert message in done.stderr
