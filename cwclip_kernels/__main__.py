"""``python -m cwclip_kernels`` prints versions and usable backends.

``doctor`` says what is missing and what to do, ``bench`` measures this machine, ``plot RUN`` plots a recorded run,
``suggest RUN`` suggests caps from it.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import torch

from . import __version__
from .backends.registry import BACKENDS, ELSEWHERE, PREFERENCE

# Where each command is.
COMMANDS = {
    "doctor": "commands.doctor",
    "bench": "commands.bench",
    "plot": "telemetry.plots",
    "suggest": "telemetry.suggestion",
}


def main(arguments: Sequence[str]) -> int:
    """Runs a command, by default ``report``; returns the exit status."""
    if not arguments:
        report()
        return 0
    name, *rest = arguments
    usage = "python -m cwclip_kernels [doctor | bench | plot RUN | suggest RUN]; each but doctor has --help"
    if name in ("-h", "--help"):
        print(f"{__doc__}\nusage: {usage}")
        return 0
    if name not in COMMANDS:
        print(f"unknown command {name!r}; usage: {usage}", file=sys.stderr)
        return 2
    return int(import_module(f".{COMMANDS[name]}", __package__).main(rest))


def report() -> None:
    """Prints versions and backends, which belong into every bug report."""
    print(f"cwclip_kernels {__version__}")
    print(f"python {platform.python_version()}, torch {torch.__version__}, triton {_version('triton')}")
    devices = [torch.device("cpu")]
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None:
        devices.append(torch.device(accelerator.type, 0))
    for device in devices:
        print(f"\n{device}: {_describe(device)}")
        preferred = PREFERENCE.get(device.type, ELSEWHERE)
        served = [n for n in preferred if BACKENDS[n].refuses(device, torch.float32, 2.0) is None]
        for name, module in BACKENDS.items():
            reason = module.refuses(device, torch.float32, 2.0)
            if reason is None:
                chosen = "yes, the default here" if served and name == served[0] else "yes, by name"
                print(f"  {name:<10} {chosen}")
            else:
                print(f"  {name:<10} no: {reason}")
    if accelerator is None:
        print("\nno GPU: torch finds none (torch.accelerator.is_available() is False)")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return device.type


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
