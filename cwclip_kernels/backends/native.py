"""The compiled extension ``_C``, built from csrc/: loaded when first needed, and what is shared by all who use it."""

from __future__ import annotations

import ctypes
import importlib
import math
import struct
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from types import EllipsisType
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_COMPLEX = (torch.complex64, torch.complex128)
_ORDERS = (1.0, 2.0, math.inf)
POLICY_CODES = {"propagate": 0, "zero": 1, "skip": 2}  # csrc/plan.h: NonFinite

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
    return None


def unserved(dtype: torch.dtype, norm_type: float) -> str | None:
    """Why the extension has no kernel for such a gradient, or None."""
    if norm_type not in _ORDERS:
        return f"serves norm_type 1, 2 and inf, not {norm_type:g}"
    if dtype in _COMPLEX:
        return None if norm_type == 2.0 else "serves complex gradients for norm_type 2 only"
    return None if dtype in _DTYPES else f"does not serve {dtype}"


def packed(numbers: Iterable[int]) -> bytes:
    """int64 numbers as native code takes them."""
    numbers = list(numbers)
    return struct.pack(f"{len(numbers)}q", *numbers)


def bytes_of(table: Tensor) -> bytes:
    """The elements of a contiguous CPU tensor, as native code takes them."""
    return ctypes.string_at(table.data_ptr(), table.nbytes) if table.numel() else b""


class Addresses:
    """Where gradients lie: read at every call, for as long as they are what they were at first.

    Some 20 ns a tensor, and nobody has to compare dtypes, devices, shapes and strides any more.

    Args:
        grads: strided tensors, exactly of type Tensor; None where there is no gradient, Ellipsis where it doesn't
            matter what there is.

    Attributes:
        layout: all that is compared, as csrc/tensors.h writes it.
    """

    def __init__(self, grads: Sequence[Tensor | EllipsisType | None]) -> None:
        self.layout: bytes = module().layout_of(list(grads))
        self._read = module().addresses_of
        self._last: dict[bool, bytes | None] = {True: None, False: None}

    def of(self, grads: Sequence[Tensor | None], *, writes: bool) -> bytes | None:
        """Their addresses, int64 each; the same object while they stay where they are.

        Args:
            grads: a list as long as the first.
            writes: whether they are to be written to; then they may not share memory.

        Returns:
            None if these have another layout, or share memory.
        """
        found: bytes | None = self._read(grads, self.layout, self._last[writes], writes)
        if found is not None:
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
    has_shape = not (parameter.is_nested or is_lazy(parameter))
    shape = parameter.shape if has_shape else None
    strides = parameter.stride() if has_shape and parameter.layout == torch.strided else None
    return type(parameter), shape, strides, parameter.dtype, parameter.device, parameter.layout, sharded


State = TypeVar("State", bound="_HasAddresses")


class _HasAddresses(Protocol):
    @property
    def addresses(self) -> Addresses: ...


def look_up(
    bucket: Any,
    grads: list[Tensor],
    addresses: bytes | None,
    make: Callable[[Any, Addresses], State],
    *,
    writes: bool,
) -> tuple[State, bytes]:
    """What a backend keeps with a bucket, made where there is none yet; and where its gradients lie.

    Args:
        bucket: a ``Bucket``.
        grads: its own gradients.
        addresses: theirs, if a plan has looked; None for the values of sparse gradients and the like, whose number
            changes.
        make: makes the state of a bucket with gradients of this layout.
        writes: whether the gradients are to be written to.

    Raises:
        RuntimeError: the gradients share memory, or these are not those that the bucket was made for.
    """
    state: State | None = bucket.state
    if state is not None:
        found = state.addresses.of(grads, writes=writes) if addresses is None else addresses
        if found is not None:
            return state, found
        if bucket.plain:
            raise RuntimeError(_OTHERS)
    state = bucket.state = make(bucket, Addresses(grads))
    found = state.addresses.of(grads, writes=writes) if addresses is None else addresses
    if found is None:
        raise RuntimeError(_OTHERS)
    return state, found


_OTHERS = "these are not the gradients that the plan was made for, or they share memory"
