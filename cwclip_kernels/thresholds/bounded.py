"""A floor and a ceiling for the caps of any threshold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_float_tensor
from ..core.formula import moved, wide_dtype
from ..core.modes import is_traced
from .base import Setting, Threshold, caps_of
from .by_pattern import settled
from .constant import Fixed, MaxNorm, checked_cap


class Bounded(Threshold):
    """The caps of another threshold, none below ``low`` nor above ``high``.

        cap_c = min(max(low, cap_c), high)

    Caps of inf (a warm-up without clipping, a component that no pattern matches) become ``high``. Caps that are NaN
    or negative are errors of the threshold, and not hidden: they become NaN.

    Norms are divided with ``eps`` or without as under the threshold itself, also where a bound is the cap. It learns
    as by itself, from the norms and the coefficients that were applied. ``state_dict()`` is the threshold's own, so
    that bounds may be added to a run, changed and left out. The threshold isn't used elsewhere at the same time.

    Args:
        threshold: one of ``thresholds``, or a mapping of patterns to numbers or thresholds.
        low: a number >= 0, or a floating-point Tensor of shape [], which is read at every call.
        high: the same, not below ``low``.

    Raises:
        TypeError, ValueError: a bound that isn't what it should be, or ``low`` above ``high``. Tensors on other
            devices than the CPU aren't looked at: there all coefficients are NaN then.

    Example:
        >>> from cwclip_kernels import ComponentClipper, thresholds
        >>> w = torch.nn.Parameter(torch.zeros(1))
        >>> clipper = ComponentClipper([w], thresholds.Bounded(thresholds.EMA(warmup_steps=0), 0.5, 4.0))
        >>> for grad in (8.0, 0.1, 8.0):
        ...     w.grad = torch.tensor([grad])
        ...     print(round(clipper.clip_().caps.item(), 3))
        4.0
        4.0
        4.0
    """

    def __init__(self, threshold: MaxNorm, low: float | Tensor = 0.0, high: float | Tensor = math.inf) -> None:
        super().__init__()
        inner = settled(threshold)
        if not isinstance(inner, Threshold):
            inner = Fixed(inner) if isinstance(inner, Tensor | Mapping) else Fixed(checked_cap(inner, "threshold"))
        self._threshold = inner
        self._low, self._high = _checked(low, "low"), _checked(high, "high")
        self._check_order()
        self._follow()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_threshold": copy(self._threshold)}  # which a copy teaches by itself

    def _follow(self) -> None:
        inner = self._threshold
        self.adds_eps, self.reads_parameters = inner.adds_eps, inner.reads_parameters
        self.needs_all_components, self.reads_numels = inner.needs_all_components, inner.reads_numels
        self.untraceable = inner.untraceable

    def _check_order(self) -> None:
        """Raises ValueError for what can be read without a host sync, and outside of compiled functions."""
        low, high = _read(self._low), _read(self._high)
        for name, value in (("low", low), ("high", high)):
            if value is not None and not value >= 0:
                raise ValueError(f"{name}: expected a number >= 0, not {value:g}")
        if low is not None and high is not None and low > high:
            raise ValueError(f"low: expected at most high={high:g}, not {low:g}")

    def __str__(self) -> str:
        return f"Bounded({self._threshold})"

    def bind(self, setting: Setting) -> None:
        self._threshold.bind(setting)
        self._follow()
        if (own := self._threshold.adds_eps_to(bounded=True)) is not None:
            self.adds_eps = any(own)
        super().bind(setting)

    def check_fits(self, setting: Setting) -> None:
        self._threshold.check_fits(setting)

    def is_bound_to(self, setting: Setting) -> bool:
        return self._setting is setting and self._threshold.is_bound_to(setting)

    def state_tensors(self) -> list[Tensor]:
        return self._threshold.state_tensors()

    def serves(self, ids: tuple[int, ...]) -> bool:
        return super().serves(ids) and self._threshold.serves(ids)

    def check_sizes(self, spanning: tuple[str, ...]) -> None:
        self._threshold.check_sizes(spanning)

    def adds_eps_to(self, *, bounded: bool = False) -> tuple[bool, ...] | None:
        own = self._threshold.adds_eps_to(bounded=True)
        return own if own is not None and len(set(own)) > 1 else None

    @property
    def learns(self) -> bool:
        return self._threshold.learns

    @property
    def needs_norms(self) -> bool:
        return self._threshold.needs_norms

    def caps(self, device: torch.device, norms: Tensor | None) -> Tensor:
        caps = caps_of(self._threshold, device, norms, len(self.setting.names))
        if isinstance(self._low, Tensor) or isinstance(self._high, Tensor):
            self._check_order()
            low, high = _on(self._low, device), _on(self._high, device)
            are_right = (low >= 0) & (low <= high)
            bounded = torch.where(are_right, torch.minimum(torch.maximum(caps, low), high), math.nan)
        else:
            bounded = caps.clamp(self._low, self._high)
        return torch.where(caps >= 0, bounded, math.nan)

    def update_(self, norms: Tensor, coefs: Tensor) -> None:
        if self._threshold.learns:
            self._threshold.update_(norms, coefs)

    def state_dict(self) -> dict[str, Any]:
        """The threshold's own."""
        return self._threshold.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads the state of such a threshold, with bounds or without."""
        self._threshold.load_state_dict(state)

    def check_state(self, state: object) -> None:
        self._threshold.check_state(state)


def _checked(bound: object, name: str) -> float | Tensor:
    if not isinstance(bound, Tensor):
        return checked_cap(bound, name)
    check_float_tensor(bound, name)
    if bound.ndim:
        raise ValueError(f"{name}: expected a tensor of shape [], not {list(bound.shape)}")
    return bound


def _read(bound: float | Tensor) -> float | None:
    if not isinstance(bound, Tensor):
        return bound
    return float(bound) if bound.device.type == "cpu" and not is_traced() else None


def _on(bound: float | Tensor, device: torch.device) -> Tensor:
    if not isinstance(bound, Tensor):
        return torch.full((), bound, dtype=wide_dtype(device), device=device)
    return moved(bound, device)
