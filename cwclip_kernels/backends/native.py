"""The compiled extension ``_C``: csrc/ through torch.ops. Serves CPU tensors."""

from __future__ import annotations

import importlib
import math
import threading
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..formula import ClipRule

if TYPE_CHECKING:
    from ..plan import Bucket

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_COMPLEX = (torch.complex64, torch.complex128)
_ORDERS = (1.0, 2.0, math.inf)
_POLICY_CODES = {"propagate": 0, "zero": 1, "skip": 2}  # csrc/plan.h: NonFinite


# Its registrations live as long as this does.
_library = torch.library.Library("cwclip_kernels", "FRAGMENT")  # type: ignore[no-untyped-call]


_loading = threading.Lock()


def unavailable() -> str | None:
    """Loads the extension; why it can't be, in plain words, or None."""
    with _loading:
        return _load()


@cache
def _load() -> str | None:
    try:
        importlib.import_module("cwclip_kernels._C")
    except ImportError as error:
        return (
            f"the compiled extension is missing ({error}); reinstall with a C++ compiler: "
            "CWCLIP_BUILD=cpu pip install --no-build-isolation --force-reinstall --no-deps cwclip_kernels"
        )
    _complete_registration()
    return None


def refuses(device: torch.device, dtype: torch.dtype, norm_type: float) -> str | None:
    """Why this backend can't serve such a gradient, or None."""
    if device.type != "cpu":
        return f"serves CPU tensors, not {device.type}"
    if norm_type not in _ORDERS:
        return f"serves norm_type 1, 2 and inf, not {norm_type:g}"
    if dtype in _COMPLEX:
        if norm_type != 2.0:
            return "serves complex gradients for norm_type 2 only"
    elif dtype not in _DTYPES:
        return f"does not serve {dtype}"
    return unavailable()


def power_sums(bucket: Bucket, grads: list[Tensor], norm_type: float) -> Tensor:
    """sum |g|^p of each component, or max |g|: float64 [K]."""
    sums: Tensor = torch.ops.cwclip_kernels.power_sums(grads, bucket.components, bucket.count, norm_type)
    return sums


def scale_(bucket: Bucket, grads: list[Tensor], coefs: Tensor, zero_fill: bool) -> None:
    """g <- coef * g in place; nothing written where coef is 1."""
    torch.ops.cwclip_kernels.scale_(grads, bucket.components, coefs.double(), zero_fill)


def clip_(bucket: Bucket, grads: list[Tensor], caps: Tensor, rule: ClipRule) -> tuple[Tensor, Tensor]:
    """Norms and coefficients, [K], float64 if any gradient is; each component scaled while still in cache."""
    norms, coefs = torch.ops.cwclip_kernels.clip_(
        grads,
        bucket.components,
        bucket.count,
        caps,
        rule.norm_type,
        rule.eps,
        _POLICY_CODES[rule.nonfinite],
    )
    return norms, coefs


def _refuse_meta(grads: list[Tensor]) -> None:
    # torch asks the same functions for meta tensors, outside any tracing: that would pass for a call carried out.
    if any(type(g) is Tensor and g.is_meta for g in grads):
        raise RuntimeError("grads: there is no data on the meta device")


def _fake_clip_(
    grads: list[Tensor],
    components: Tensor,
    count: int,
    caps: Tensor,
    norm_type: float,
    eps: float,
    nonfinite: int,
) -> tuple[Tensor, Tensor]:
    _refuse_meta([*grads, components, caps])
    dtype = torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
    return components.new_empty(count, dtype=dtype), components.new_empty(count, dtype=dtype)


def _fake_power_sums(grads: list[Tensor], components: Tensor, count: int, norm_type: float) -> Tensor:
    _refuse_meta([*grads, components])
    return components.new_empty(count, dtype=torch.float64)


def _fake_scale_(grads: list[Tensor], components: Tensor, coefs: Tensor, zero_fill: bool) -> None:
    _refuse_meta([*grads, components, coefs])


def _complete_registration() -> None:
    """What the extension's own registrations (csrc/register.cpp) leave to Python."""
    for name, fake in (("clip_", _fake_clip_), ("power_sums", _fake_power_sums), ("scale_", _fake_scale_)):
        # Shapes and dtypes for tracing (torch.compile, fake tensors), where there is no data to run on.
        torch.library.register_fake(f"cwclip_kernels::{name}", fake, lib=_library)
        # Tensors with a lazy minus sign come as they lie in memory: neither norm nor scaling depends on the sign.
        _library.impl(name, torch.library.fallthrough_kernel, "Negative")  # type: ignore[no-untyped-call]
