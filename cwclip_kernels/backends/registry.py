"""Who serves which gradient: one table, and the words that explain it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import reference
from ..arguments import check_type
from . import cpu, cuda, foreach, triton

if TYPE_CHECKING:
    from ..core.plan import ClipPlan

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
    check_type(backend, "backend", str, "a string or None")
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


def explain(plan: ClipPlan, grads: Sequence[Tensor | None]) -> str:
    """A plan in words: one line for each bucket, with the reason for its backend."""
    lines = [f"{len(plan.components.names)} components over {len(plan.components.tensor_names)} tensors"]
    for bucket in plan.buckets:
        own = bucket.pick(grads)
        dtypes = Counter(str(g.dtype).removeprefix("torch.") for g in own)
        what = ", ".join(f"{n} {dtype}" for dtype, n in sorted(dtypes.items()))
        size = sum(g.numel() * g.element_size() for g in own if not g.is_sparse)
        lines.append(f"  {bucket.device}: {what}, {size / 1e6:.1f} MB -> {bucket.backend!r} ({bucket.reason})")
    if len(plan.buckets) > 1 or plan.sparse:
        why = "sparse gradients" if plan.sparse else "several devices or backends"
        lines.append(f"  in two passes, norms first, because of {why}")
    elif plan.buckets:
        lines.append("  in one fused call")
    return "\n".join(lines)
