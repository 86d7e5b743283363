"""``python -m cwclip_kernels doctor``: what is installed, what was built, what is missing and what to do about it."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import NamedTuple

import torch

from ..backends import cuda, native, triton
from ..clipper import ComponentClipper


class Finding(NamedTuple):
    """One line: whether it is well, what was looked at, what was found, and what to do if it isn't well."""

    is_well: bool | None  # None: nothing to mend, and of no use here
    what: str
    found: str
    advice: str = ""


def main(arguments: Sequence[str]) -> int:
    """Prints the findings; returns 1 if something is wrong that can be mended here."""
    if arguments:
        print(f"doctor takes no arguments, not {' '.join(arguments)}", file=sys.stderr)
        return 2
    findings = [*_versions(), *_extension(), *_triton(), *_cuda(), *_extras(), _clips()]
    for finding in findings:
        mark = {True: "ok", False: "!!", None: "--"}[finding.is_well]
        print(f"{mark}  {finding.what:<18} {finding.found}")
        if finding.advice:
            print(f"    {'':<18} -> {finding.advice}")
    wrong = sum(finding.is_well is False for finding in findings)
    print(f"\n{wrong} to mend" if wrong else "\nnothing to mend")
    return int(wrong > 0)


def _versions() -> Iterator[Finding]:
    yield Finding(sys.version_info >= (3, 10), "python", sys.version.split()[0], "")
    numbers = tuple(int(part) for part in torch.__version__.split(".")[:2])
    advice = "" if numbers >= (2, 10) else "pip install --upgrade torch; 2.10 is the oldest that is supported"
    yield Finding(numbers >= (2, 10), "torch", f"{torch.__version__}, {_build()}", advice)


def _build() -> str:
    if torch.version.hip is not None:
        return f"built for ROCm {torch.version.hip}"
    return "built for the CPU" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"


def _extension() -> Iterator[Finding]:
    reason = native.unavailable()
    if reason is not None:
        compiler = os.environ.get("CXX", "g++").split()[0]
        has = f"{compiler} is here" if shutil.which(compiler) else f"there is no C++ compiler ({compiler}) either"
        yield Finding(False, "extension", f"not there; {has}", reason)
        return
    path = Path(str(native._C.__file__))
    what = "with CUDA kernels" if hasattr(native._C, "cuda_clip") else "without CUDA kernels"
    yield Finding(True, "extension", f"{path.name}, {what}, in {path.parent}")


def _triton() -> Iterator[Finding]:
    try:
        found = version("triton")
    except PackageNotFoundError:
        is_needed = torch.cuda.is_available() or torch.xpu.is_available()
        advice = 'pip install "cwclip_kernels[triton]"' if is_needed else ""
        yield Finding(False if is_needed else None, "triton", "not installed", advice)
        return
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        yield Finding(None, "triton", f"{found}; no GPU for it here")
        return
    reason = triton.unavailable(torch.device(accelerator.type, 0))
    yield Finding(reason is None, "triton", found, reason or "")
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    yield Finding(
        _is_writable(folder), "triton's cache", str(folder), "" if _is_writable(folder) else "set TRITON_CACHE_DIR"
    )


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _cuda() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        driver = shutil.which("nvidia-smi")
        if driver is not None and torch.version.cuda is None and torch.version.hip is None:
            yield Finding(
                False, "GPU", f"{driver} is here, but this torch is {_build()}", "install a CUDA build of torch"
            )
        else:
            yield Finding(None, "GPU", "none that torch finds")
        return
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        reason = cuda.unavailable(device) if torch.version.hip is None else None
        yield Finding(reason is None, f"GPU {index}", torch.cuda.get_device_name(device), reason or "")


def _extras() -> Iterator[Finding]:
    """Packages of the extras: which are there. A version that isn't supported is wrong."""
    try:
        from packaging.requirements import Requirement

        lines, names = requires("cwclip_kernels"), metadata("cwclip_kernels").get_all("Provides-Extra")
    except (ImportError, PackageNotFoundError) as error:  # not installed, as in a checkout; neither is needed to clip
        yield Finding(None, "extras", f"not looked at: {error}")
        return
    wanted: dict[str, Requirement] = {}
    for line in lines or []:
        requirement = Requirement(line)
        own = {extra for extra in names or [] if requirement.marker and requirement.marker.evaluate({"extra": extra})}
        if own & {"transformers", "lightning", "accelerate", "deepspeed", "tensorboard", "plot", "telemetry"}:
            wanted[requirement.name] = requirement
    for name, requirement in sorted(wanted.items()):
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Finding(None, name, "not installed")
            continue
        fits = requirement.specifier.contains(found, prereleases=True)
        advice = "" if fits else f"pip install '{requirement.name}{requirement.specifier}'"
        yield Finding(fits, name, found, advice)


def _clips() -> Finding:
    """Whether a call does what it says, on the device that would be used."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = torch.device(accelerator or "cpu")
    weight = torch.nn.Parameter(torch.zeros(2, device=device))
    weight.grad = torch.tensor([3.0, 4.0], device=device)
    try:
        clipper = ComponentClipper([weight], 1.0)
        clipper.clip_()
        right = torch.allclose(weight.grad.cpu(), torch.tensor([0.6, 0.8]), rtol=1e-5)
        served = clipper.explain().splitlines()[1].partition("-> ")[2]
    except Exception as error:  # whatever it is, it is what the doctor was asked for
        return Finding(False, "a call", f"{type(error).__name__}: {error}", "report this, with the lines above")
    return Finding(right, "a call", f"on {device}, by {served}", "" if right else "wrong result: report this")
