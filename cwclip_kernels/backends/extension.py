"""The compiled extension ``_C``, built from csrc/: loaded when first needed, and what its backends share."""

from __future__ import annotations

import importlib
import math
import sys
import threading
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_COMPLEX = (torch.complex64, torch.complex128)
_ORDERS = (1.0, 2.0, math.inf)
POLICY_CODES = {"propagate": 0, "zero": 1, "skip": 2}  # csrc/plan.h: NonFinite


# Its registrations live as long as this does.
_library = torch.library.Library("cwclip_kernels", "FRAGMENT")  # type: ignore[no-untyped-call]


_loading = threading.Lock()


def unavailable() -> str | None:
    """Loads the extension; why it can't be, in plain words, or None."""
    with _loading:
        return _load()


def module() -> Any:
    """The extension itself, once ``unavailable()`` has said that there is one."""
    return sys.modules["cwclip_kernels._C"]


@cache
def _load() -> str | None:
    try:
        importlib.import_module("cwclip_kernels._C")
    except (ImportError, AttributeError) as error:  # the latter where torch has no DLPack exchange API
        return (
            f"the compiled extension is missing ({error}); reinstall with a C++ compiler: "
            "CWCLIP_BUILD=cpu pip install --no-build-isolation --force-reinstall --no-deps cwclip_kernels"
        )
    _complete_registration()
    return None


def users() -> tuple[str, ...]:
    """The backends that read gradients' addresses through the extension, and notice when they are others."""
    return ("cpu", "cuda", "triton") if unavailable() is None else ()


def unserved(dtype: torch.dtype, norm_type: float) -> str | None:
    """Why the extension has no kernel for such a gradient, or None."""
    if norm_type not in _ORDERS:
        return f"serves norm_type 1, 2 and inf, not {norm_type:g}"
    if dtype in _COMPLEX:
        return None if norm_type == 2.0 else "serves complex gradients for norm_type 2 only"
    return None if dtype in _DTYPES else f"does not serve {dtype}"


class Addresses:
    """Where a bucket's gradients lie: read at every call, for as long as they are what they were at first.

    Some 30 ns a tensor, and no plan has to compare dtypes, devices, shapes and strides any more.

    Args:
        grads: strided tensors, exactly of type Tensor.

    Attributes:
        layout: all that is compared, as csrc/tensors.h writes it.
    """

    def __init__(self, grads: list[Tensor]) -> None:
        self.layout: bytes = module().layout_of(grads)
        self._last: dict[bool, bytes | None] = {True: None, False: None}

    def of(self, grads: list[Tensor], *, writes: bool) -> bytes:
        """Their addresses, int64 each; the same object while they stay where they are.

        Args:
            grads: strided tensors.
            writes: whether they are to be written to; then they may not share memory.

        Raises:
            RuntimeError: these have another layout, or share memory.
        """
        found: bytes | None = module().addresses_of(grads, self.layout, self._last[writes], writes)
        if found is None:
            raise RuntimeError("these are not the gradients that the plan was made for")
        self._last[writes] = found
        return found


def form_of(parameters: list[Tensor]) -> object:
    """Types, dtypes, devices, shapes and strides of parameters, equal as long as these stay; holds none of them."""
    found = module().form_of(parameters) if unavailable() is None else None
    return [_form(p) for p in parameters] if found is None else found


def _form(parameter: Tensor) -> tuple[object, ...]:
    if not isinstance(parameter, Tensor):
        return (type(parameter),)  # which will be refused when its name is read
    # Of a DTensor its mesh and placements; of FSDP's flat parameter what lies in it.
    sharded = tuple(getattr(parameter, name, None) for name in ("_spec", "_fqns", "_shapes"))
    strides = parameter.stride() if parameter.layout == torch.strided and not parameter.is_nested else None
    shape = None if parameter.is_nested or is_lazy(parameter) else parameter.shape
    return type(parameter), shape, strides, parameter.dtype, parameter.device, parameter.layout, sharded


def _refuse_meta(tensors: list[Tensor | None]) -> None:
    # torch asks the same functions for meta tensors, outside any tracing: that would pass for a call carried out.
    if any(type(t) is Tensor and t.is_meta for t in tensors):
        raise RuntimeError("grads: there is no data on the meta device")


def _fake_clip_(
    grads: list[Tensor],
    components: Tensor,
    cuts: Tensor | None,
    count: int,
    caps: Tensor,
    inverse: Tensor | None,
    found_inf: Tensor | None,
    norm_type: float,
    eps: float,
    nonfinite: int,
) -> tuple[Tensor, Tensor]:
    _refuse_meta([*grads, components, cuts, caps, inverse, found_inf])
    dtype = torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
    return components.new_empty(count, dtype=dtype), components.new_empty(count, dtype=dtype)


def _fake_power_sums(
    grads: list[Tensor], components: Tensor, cuts: Tensor | None, count: int, norm_type: float
) -> Tensor:
    _refuse_meta([*grads, components, cuts])
    return components.new_empty(count, dtype=torch.float64)


def _fake_scale_(
    grads: list[Tensor], components: Tensor, cuts: Tensor | None, coefs: Tensor, zero_fill: bool
) -> None:
    _refuse_meta([*grads, components, cuts, coefs])


def _complete_registration() -> None:
    """What the extension's own registrations (csrc/register.cpp) leave to Python."""
    for name, fake in (("clip_", _fake_clip_), ("power_sums", _fake_power_sums), ("scale_", _fake_scale_)):
        # Shapes and dtypes for tracing (torch.compile, fake tensors), where there is no data to run on.
        torch.library.register_fake(f"cwclip_kernels::{name}", fake, lib=_library)
        # Tensors with a lazy minus sign come as they lie in memory: neither norm nor scaling depends on the sign.
        _library.impl(name, torch.library.fallthrough_kernel, "Negative")  # type: ignore[no-untyped-call]
