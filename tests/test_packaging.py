"""The wheel: one abi3 binary that exports its entry point alone and works in a clean environment."""

import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
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


@pytest.fixture(scope="module")
def wheel(source):
    """The wheel as ``make wheel`` makes it."""
    if shutil.which(os.environ.get("CXX", "g++").split()[0]) is None:
        pytest.skip("no C++ compiler")
    done = build(source, "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cwclip_kernels: building with the C++ extension" in done.stdout + done.stderr
    return wheel_of(source, "cpu")


def test_one_abi3_wheel_with_types_and_one_binary(wheel):
    assert "-cp310-abi3-linux_" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert [n for n in names if n.endswith(".so")] == ["cwclip_kernels/_C.abi3.so"]
    assert "cwclip_kernels/py.typed" in names
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
    for absent in ("libtorch_cuda", "libcudart", "libtorch_python", "libpython"):
        assert absent not in needed


def test_installs_and_clips_in_a_clean_environment(wheel, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    subprocess.run([python, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", wheel], check=True)
    # torch is large, so it comes from this environment; its path goes last, and .pth files in it have no effect.
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    borrowed = [p for p in (sysconfig.get_path("purelib"), *site.getsitepackages()) if (Path(p) / "torch").exists()]
    borrowed = borrowed or [str(Path(torch.__file__).parent.parent)]
    (tmp_path / f"venv/lib/{version}/site-packages/torch.pth").write_text(borrowed[0] + "\n")
    code = """
import torch, cwclip_kernels
assert "venv" in cwclip_kernels.__file__, cwclip_kernels.__file__
p = torch.nn.Parameter(torch.zeros(2)); p.grad = torch.tensor([3.0, 4.0])
print(cwclip_kernels.fused_component_clip_([p], 1.0, backend="cpu").item(), p.grad)
"""
    done = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "5.0 tensor([0.6000, 0.8000])"


def test_without_extension_the_wheel_is_pure(source):
    done = build(source, "none")
    assert done.returncode == 0, done.stdout + done.stderr
    assert wheel_of(source, "none").name.endswith("-py3-none-any.whl")


@pytest.mark.parametrize(
    ("mode", "environment", "message"),
    [
        ("cuda", {}, "CWCLIP_BUILD=cuda: this version has no CUDA sources"),
        ("fast", {}, "CWCLIP_BUILD: expected auto, none, cpu or cuda, not 'fast'"),
        ("cpu", {"CXX": "no-such-compiler"}, "CWCLIP_BUILD=cpu: no C\\+\\+ compiler"),
    ],
)
def test_what_was_asked_for_and_cannot_be_built_fails_loudly(source, mode, environment, message):
    done = build(source, mode, **environment)
    assert done.returncode != 0
    assert re.search(message, done.stdout + done.stderr)


def test_auto_says_what_it_leaves_out(source):
    done = build(source, "auto", CXX="no-such-compiler")
    assert done.returncode == 0
    assert "building without the C++ extension (no C++ compiler (no-such-compiler)" in done.stdout + done.stderr
