"""The compiled extension ``_C``: loaded when first needed, and what every user of it shares."""

from __future__ import annotations

import ctypes
import importlib
import struct
import threading
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from types import EllipsisType
from typing import TYPE_CHECKING, Any

from torch import Tensor, strided
from torch.nn.parameter import is_lazy

from ..core.formula import POLICIES, ClipRule
from ..core.loss_scale import LossScale

if TYPE_CHECKING:
    from .. import _C as _C  # at run time set by ``unavailable()``, when that returns None

_loading = threading.Lock()


def unavailable() -> str | None:
    """Loads the extension; the reason if that fails, or None."""
    with _loading:
        return _load()


@cache
def _load() -> str | None:
    try:
        globals()["_C"] = importlib.import_module("cwclip_kernels._C")
    except (ImportError, AttributeError) as error:  # the latter where torch has no DLPack exchange API
        return (
            f"the compiled extension is missing ({error}); reinstall with a C++ compiler: "
            "CWCLIP_BUILD=cpu pip install --no-build-isolation --force-reinstall --no-deps cwclip_kernels"
        )
    return None


def packed(numbers: Iterable[int]) -> bytes:
    """int64 numbers as native code takes them."""
    numbers = list(numbers)
    return struct.pack(f"{len(numbers)}q", *numbers)


def bytes_of(table: Tensor) -> bytes:
    """The elements of a contiguous CPU tensor, as native code takes them."""
    return ctypes.string_at(table.data_ptr(), table.nbytes) if table.numel() else b""


@lru_cache(64)
def _rule(norm_type: float, eps: float, nonfinite: str) -> _C.Rule:
    return _C.rule(norm_type, eps, POLICIES.index(nonfinite))


def clip_arguments(
    rule: ClipRule, caps: Tensor, loss_scale: LossScale, norms: Tensor, coefs: Tensor
) -> tuple[_C.Rule, int, int, int, int, int, int]:
    """What ``cpu_clip`` and ``cuda_clip`` take from ``rule`` on."""
    inverse, found_inf = loss_scale.inverse, loss_scale.found_inf
    return (
        _rule(rule.norm_type, rule.eps, rule.nonfinite),
        caps.data_ptr(),
        caps.stride(0) if caps.ndim else 0,
        0 if inverse is None else inverse.data_ptr(),
        0 if found_inf is None else found_inf.data_ptr(),
        norms.data_ptr(),
        coefs.data_ptr(),
    )


def gradients_of(parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """What ``[p.grad for p in parameters]`` is, in a fifth of the time if the extension is there."""
    if unavailable() is None:
        return _C.gradients_of(tuple(parameters))
    return [p.grad for p in parameters]


def arguments_at_once(
    planned: Addresses,
    parameters: tuple[Tensor, ...],
    caps: Tensor,
    rule: ClipRule,
    loss_scale: LossScale,
    results: tuple[Tensor, Tensor],
) -> tuple[Any, ...]:
    """What ``cpu_clip_at_once`` and ``cuda_clip_at_once`` take from ``parameters`` on."""
    own = _rule(rule.norm_type, rule.eps, rule.nonfinite)
    signature, last = planned.signature, planned.last[True]
    return parameters, signature, last, own, caps, loss_scale.inverse, loss_scale.found_inf, *results


class Addresses:
    """Reads the addresses of gradients at every call, as long as dtypes, devices, shapes and strides stay the same.

    Args:
        grads: strided tensors, exactly of type Tensor or Parameter; None where there is none, Ellipsis where an entry
            of the list isn't compared.
    """

    def __init__(self, grads: Sequence[Tensor | EllipsisType | None]) -> None:
        signature = _C.signature_of(list(grads))
        if signature is None:
            raise TypeError("expected strided tensors, not another subclass of Tensor")
        self.signature = signature
        self.last: dict[bool, bytes | None] = {True: None, False: None}  # what ``of`` returned, by ``writes``

    def of(self, grads: Sequence[Tensor | None], *, writes: bool) -> bytes | None:
        """Their addresses, int64 each; the same object while they stay the same.

        None if these gradients differ from the first, or share memory although they are to be written to.
        """
        found = _C.addresses_of(grads, self.signature, self.last[writes], writes)
        if found is not None:
            self.last[writes] = found
        return found


def form_of(parameters: list[Tensor]) -> object:
    """Types, dtypes, devices, shapes and strides of parameters, to be compared; keeps no parameter alive."""
    found = _C.signature_of(parameters) if unavailable() is None else None
    return [_form(p) for p in parameters] if found is None else found


def _form(parameter: Tensor) -> tuple[object, ...]:
    if not isinstance(parameter, Tensor):
        return (type(parameter),)  # refused later, when its name is known
    # Of a DTensor its mesh and placements; of FSDP's flat parameter what lies in it.
    sharded = tuple(getattr(parameter, name, None) for name in ("_spec", "_fqns", "_shapes"))
    has_shape = not (parameter.is_nested or is_lazy(parameter))
    shape = parameter.shape if has_shape else None
    strides = parameter.stride() if has_shape and parameter.layout == strided else None
    return type(parameter), shape, strides, parameter.dtype, parameter.device, parameter.layout, sharded
