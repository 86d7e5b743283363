"""Hardware, versions and command line of a measurement."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

import cwclip_kernels


def metadata(device: torch.device) -> dict[str, str | int]:
    """Date, hardware, versions and command line, to head every table and file."""
    found: dict[str, str | int] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "cwclip_kernels": cwclip_kernels.__version__,
        "commit": _said_by("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "load": " ".join(f"{load:.2f}" for load in os.getloadavg()),
    }
    # They select kernels, so figures depend on them.
    found |= {name: value for name, value in sorted(os.environ.items()) if name.startswith("CWCLIP_")}
    if device.type == "cuda":
        chip = torch.cuda.get_device_properties(device)
        found["gpu"] = chip.name
        found["gpu_memory_bytes"] = chip.total_memory
        found["multiprocessors"] = chip.multi_processor_count
        found["l2_bytes"] = chip.L2_cache_size
        found["architecture"] = f"{chip.major}.{chip.minor}"
        found["cuda"] = torch.version.cuda or torch.version.hip or "unknown"
        found["driver"] = _said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["nvcc"] = _said_by("nvcc", "--version")
    return found


def available_bytes(device: torch.device) -> int:
    """Memory that can be taken now without swapping."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()  # torch's cached memory is available, too
        return torch.cuda.mem_get_info(device)[0]
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) << 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_model() -> str:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _said_by(program: str, *arguments: str) -> str:
    """The last line of a program's output."""
    path = shutil.which(program)
    if path is None:
        return "unknown"
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    return lines[-1] if done.returncode == 0 and lines else "unknown"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
