"""What ``max_norm`` takes where caps don't change by themselves: a number, a tensor, a mapping of patterns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..arguments import type_name
from ..components.patterns import match_patterns
from ..core.formula import wide_dtype
from .base import Setting, Threshold

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

MaxNorm: TypeAlias = float | Tensor | Mapping[str, float] | Threshold


class Fixed(Threshold):
    """One cap for all components, or one for each: what a number, tensor or mapping as ``max_norm`` stands for.

    Args:
        cap: a number; a floating-point Tensor of shape [] or [K], read at every call, so that changing it in place
            changes the caps; or a mapping of ``fnmatch`` patterns on component names to numbers, of which the first
            that matches counts and a component that none matches is not clipped.

    Raises:
        TypeError: none of these (bool and str included).
        ValueError: negative or NaN. When it is bound: a shape other than [] or [K], a pattern that matches no
            component, or that may be meant in two ways.

    Example:
        >>> from cwclip_kernels import ComponentClipper, thresholds
        >>> model = torch.nn.Linear(2, 1)
        >>> clipper = ComponentClipper(model, thresholds.Fixed({"weight": 0.1}))
        >>> clipper.clip_().caps
        tensor([0.1000,    inf], dtype=torch.float64)
    """

    adds_eps = True
    needs_norms = False  # asked at every call: an attribute is found faster

    def __init__(self, cap: float | Tensor | Mapping[str, float]) -> None:
        super().__init__()
        self._cap: float | Tensor | dict[str, float]
        if isinstance(cap, Tensor):
            self._cap = _checked_tensor(cap)
        elif isinstance(cap, Mapping):
            self._cap = {checked_pattern(p): checked_cap(value, f"max_norm[{p!r}]") for p, value in cap.items()}
        else:
            self._cap = checked_cap(cap, "cap")
        self._matched: list[float] = []  # the caps of a mapping
        self._on: dict[torch.device, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_matched": [], "_on": {}}

    def bind(self, setting: Setting) -> None:
        names = setting.names
        if isinstance(self._cap, Tensor) and self._cap.shape not in ((), (len(names),)):
            raise ValueError(
                f"max_norm: expected shape [] or [{len(names)}] (one cap for each component), not "
                f"{list(self._cap.shape)}"
            )
        if isinstance(self._cap, dict):
            everywhere, others = setting.everywhere, (setting.aliases, setting.spellings)
            self._matched = match_patterns(names, self._cap, math.inf, everywhere, *others)
        super().bind(setting)
        self._on.clear()

    def caps(self, device: torch.device, norms: Tensor | None = None) -> Tensor:
        cap = self._cap
        if isinstance(cap, Tensor):
            _check_values(cap)
            # A copy to the host must be complete before it is read.
            return cap.detach().to(device, wide_dtype(device), non_blocking=device.type != "cpu").contiguous()
        caps = self._on.get(device)
        if caps is None:
            if isinstance(cap, dict):
                caps = torch.tensor(self._matched, dtype=wide_dtype(device), device="cpu").to(device)
            else:
                caps = torch.full((), cap, dtype=wide_dtype(device), device=device)
            self._on[device] = caps
        return caps


def checked_cap(value: object, name: str) -> float:
    """A cap as float, or an error that names it."""
    if isinstance(value, bool) or not isinstance(value, Real):
        wanted = "a number, a Tensor of shape [] or [K], a mapping of patterns to numbers, or one of thresholds"
        raise TypeError(f"{name}: expected {wanted if name == 'max_norm' else 'a number'}, not {type_name(value)}")
    cap = as_float(value, name, "; use math.inf to leave norms uncapped")
    if not cap >= 0.0:
        raise ValueError(f"{name}: expected a number >= 0, not {cap}")
    return cap


def as_float(value: Real, name: str, way_out: str = "") -> float:
    """Any real number as float, or a ValueError that names it."""
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: {value} is too large for a float{way_out}") from None


def checked_pattern(pattern: object) -> str:
    """A pattern of a mapping, or an error."""
    if not isinstance(pattern, str):
        raise TypeError(f"max_norm: patterns are strings, not {type_name(pattern)}")
    return pattern


def _checked_tensor(cap: Tensor) -> Tensor:
    if cap.dtype not in FLOATS or cap.layout != torch.strided:
        kind = cap.dtype if cap.layout == torch.strided else cap.layout
        raise TypeError(f"max_norm: expected a floating-point tensor, not {kind}")
    if cap.is_meta:
        raise ValueError("max_norm: is on the meta device, where it has no value")
    _check_values(cap)
    return cap


def _check_values(cap: Tensor) -> None:
    # On another device than the CPU reading values would be a host sync; there a bad cap gives NaN coefficients.
    if cap.device.type == "cpu" and not bool((cap >= 0).all()):
        raise ValueError(f"max_norm: expected caps >= 0, not {cap.detach().min().item()}")
