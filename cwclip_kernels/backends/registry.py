"""Who serves which gradient: one table, and the words that explain it."""

from __future__ import annotations

from types import ModuleType

import torch

from .. import reference
from ..arguments import type_name
from . import cpu, cuda, foreach, triton

BACKENDS: dict[str, ModuleType] = {
    "cuda": cuda,
    "cpu": cpu,
    "triton": triton,
    "foreach": foreach,
    "reference": reference,
}

# Device type -> backends in order of preference; the first that does not refuse a gradient serves it.
PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "foreach"),
    "cuda": ("cuda", "triton", "foreach"),  # AMD GPUs too: torch calls them cuda
    "xpu": ("triton", "foreach"),
}
ELSEWHERE = ("foreach",)


def check_backend(backend: object) -> None:
    """Raises TypeError or ValueError unless ``backend`` is None or names one."""
    if backend is None:
        return
    if not isinstance(backend, str):
        raise TypeError(f"backend: expected a string or None, not {type_name(backend)}")
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected None or one of {', '.join(BACKENDS)}, not {backend!r}")


def choose(device: torch.device, dtype: torch.dtype, norm_type: float, backend: str | None) -> tuple[str, str]:
    """The backend for gradients of one device and dtype, and why.

    Args:
        device: where the gradients are.
        dtype: their dtype.
        norm_type: order of the norm.
        backend: the user's choice, used or refused, never replaced; None for the best available.

    Raises:
        RuntimeError: the named backend refuses, with its reason.
    """
    if backend is not None:
        reason = BACKENDS[backend].refuses(device, dtype, norm_type)
        if reason is not None:
            raise RuntimeError(
                f"backend={backend!r} {reason}; backend=None takes the best one available "
                f"({choose(device, dtype, norm_type, None)[0]!r} here)"
            )
        return backend, "asked for by name"
    passed_over: list[str] = []
    for name in PREFERENCE.get(device.type, ELSEWHERE):
        reason = BACKENDS[name].refuses(device, dtype, norm_type)
        if reason is None:
            return name, "; ".join(passed_over) or f"first choice on {device.type}"
        passed_over.append(f"{name} {reason}")
    raise RuntimeError(f"no backend serves {dtype} on {device}: {'; '.join(passed_over)}")
