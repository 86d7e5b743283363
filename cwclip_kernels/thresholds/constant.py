"""What ``max_norm`` takes where caps don't change by themselves: a number, a tensor, a mapping of patterns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from ..arguments import check_float_tensor, check_type, checked_number
from ..components.patterns import match_patterns
from ..core.formula import moved, wide_dtype
from ..core.modes import can_be_read
from .base import Setting, Threshold

MaxNorm: TypeAlias = float | Tensor | Mapping[str, float | Threshold] | Threshold


class Fixed(Threshold):
    """One cap for all components, or one for each: what a number, tensor or mapping as ``max_norm`` stands for.

    Args:
        cap: a number; a floating-point Tensor of shape [] or [K], read at every call, so that changing it in place
            changes the caps; or a mapping of ``fnmatch`` patterns on component names to numbers, of which the first
            that matches counts and a component that none matches is not clipped.

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
            check_float_tensor(cap, "max_norm")
            _check_values(cap)
            self._cap = cap
        elif isinstance(cap, Mapping):
            self._cap = checked_caps(cap)
        else:
            self._cap = checked_cap(cap, "cap")
        self._matched: list[float] = []  # the caps of a mapping

    def bind(self, setting: Setting) -> None:
        names = setting.names
        if isinstance(self._cap, Tensor) and self._cap.shape not in ((), (len(names),)):
            wanted = f"[] or [{len(names)}] (one cap for each component)"
            raise ValueError(f"max_norm: expected shape {wanted}, not {list(self._cap.shape)}")
        if isinstance(self._cap, dict):
            found = match_patterns(names, self._cap, setting.everywhere, setting.aliases, setting.spellings)
            self._matched = [found.get(name, math.inf) for name in names]
        super().bind(setting)
        self._on.clear()

    def caps(self, device: torch.device, norms: Tensor | None = None) -> Tensor:
        cap = self._cap
        if isinstance(cap, Tensor):
            _check_values(cap)
            now = moved(cap, device).contiguous()
            # Not the caller's own, who may change it: results have the caps of their step.
            is_own = cap.dtype == now.dtype and cap.device == device and cap.is_contiguous()
            return now.clone() if is_own else now
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
    kinds = "a number"
    if name == "max_norm":
        patterns = "a mapping of patterns to numbers or thresholds"
        kinds = f"a number, a Tensor of shape [] or [K], {patterns}, or one of thresholds"
    elif name.startswith("max_norm["):
        kinds = "a number or one of thresholds (Fixed for a tensor)"
    return checked_number(value, name, finite=False, kinds=kinds)


def checked_caps(by_pattern: Mapping[str, float]) -> dict[str, float]:
    """The caps of a mapping, or an error that names the pattern."""
    check_patterns(by_pattern)
    return {pattern: checked_cap(cap, f"max_norm[{pattern!r}]") for pattern, cap in by_pattern.items()}


def check_patterns(by_pattern: Mapping[str, object]) -> None:
    """Raises TypeError unless all keys of a mapping are strings."""
    for pattern in by_pattern:
        check_type(pattern, "max_norm", str, "strings as patterns")


def _check_values(cap: Tensor) -> None:
    # Where reading values would be a host sync, or can't be traced, a bad cap gives NaN coefficients.
    if can_be_read(cap) and not bool((cap >= 0).all()):
        raise ValueError(f"max_norm: expected caps >= 0, not {cap.detach().min().item()}")
