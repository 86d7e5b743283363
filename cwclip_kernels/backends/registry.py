"""Which backend serves which gradient: one table, and the reasons."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .. import reference
from ..arguments import check_type
from ..core.adamw import FusedStepBackend, StepBackend
from ..core.bucket import Bucket
from ..core.formula import ClipRule
from ..core.loss_scale import LossScale
from . import cpu, cuda, foreach, triton, triton_step


class Backend(Protocol):
    """What a backend does with the gradients of one bucket, plain strided tensors on its device.

    ``addresses`` are theirs, int64 each, where the plan has read them; only native backends need them.
    """

    def refuses(self, device: torch.device, dtype: torch.dtype, norm_type: float) -> str | None:
        """Why it can't serve such a gradient, or None."""

    def power_sums(self, bucket: Bucket, grads: list[Tensor], norm_type: float, addresses: bytes | None) -> Tensor:
        """Sum |g|^p of each component (max for p = inf): [K] in ``wide_dtype``."""

    def scale_(
        self, bucket: Bucket, grads: list[Tensor], coefs: Tensor, zero_fill: bool, addresses: bytes | None
    ) -> None:
        """g <- coef * g in place, nothing changed where coef is 1; with ``zero_fill``, 0 erases inf and NaN."""


class FusedBackend(Backend, Protocol):
    """A backend that also does both at once; for the others ``core.run`` takes two steps."""

    def clip_(
        self,
        bucket: Bucket,
        grads: list[Tensor],
        caps: Tensor,
        rule: ClipRule,
        loss_scale: LossScale,
        addresses: bytes | None,
    ) -> tuple[Tensor, Tensor]:
        """Scales ``grads`` in place; norms before and coefficients, both [K] in ``bucket.norm_dtype``."""


class AtOnceBackend(FusedBackend, Protocol):
    """One whose native code reads the gradients itself, in the call that clips them."""

    def clip_at_once_(
        self, bucket: Bucket, parameters: tuple[Tensor, ...], caps: Tensor, rule: ClipRule, loss_scale: LossScale
    ) -> tuple[Tensor, Tensor] | None:
        """Norms and coefficients as from ``clip_``, with version counters bumped.

        None, and nothing done, if the gradients aren't those of the bucket's plan, or the call isn't as the last.
        """


AT_ONCE: dict[str, AtOnceBackend] = {"cuda": cuda, "cpu": cpu}
FUSED: dict[str, FusedBackend] = {**AT_ONCE, "triton": triton}
BACKENDS: dict[str, Backend] = {**FUSED, "foreach": foreach, "reference": reference}

# An optimizer's step: those that measure, clip and step in one go; all others step with torch's operators.
FUSED_STEPS: dict[str, FusedStepBackend] = {"cuda": cuda, "cpu": cpu, "triton": triton_step}


def step_backend(backend: str, refusal: str | None) -> StepBackend:
    """Who steps a bucket of ``backend``; with a reason against its own kernels, torch's operators do."""
    if refusal is None:
        return FUSED_STEPS[backend]
    return reference if backend == "reference" else foreach


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
    """The backend for gradients of one device and dtype, and why: the user's choice, or the best available for None.

    Raises:
        RuntimeError: the named backend refuses; it is never replaced.
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
