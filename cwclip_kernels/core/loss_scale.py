"""``inv_scale`` and ``found_inf``: the loss scale of a call's gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..arguments import type_name
from ..thresholds.constant import FLOATS, as_float
from .formula import wide_dtype


@dataclass(frozen=True)
class LossScale:
    """Gradients of a scaled loss: what unscales them in the pass that clips, and where inf and NaN are reported.

        g <- inverse * g before anything else; found_inf <- 1 if any g is inf or NaN

    Attributes:
        inverse: as the caller gave it; once ``on`` a device a Tensor [] in ``wide_dtype`` there. None for 1.
        found_inf: the caller's; once ``on`` a device a Tensor [] of float32 there. None if nobody asks.
    """

    inverse: Any = None
    found_inf: Tensor | None = None

    @classmethod
    def of(cls, inv_scale: float | Tensor | None, found_inf: Tensor | None) -> LossScale:
        """From the arguments of a call.

        Raises:
            TypeError: neither numbers nor tensors.
            ValueError: a number that isn't finite and > 0, a tensor of another shape or without data.
        """
        if inv_scale is None and found_inf is None:
            return UNSCALED
        if isinstance(inv_scale, Tensor):
            _check_one_element(inv_scale, "inv_scale")
        elif inv_scale is not None:
            inv_scale = _checked_number(inv_scale)
        if found_inf is not None:
            if not isinstance(found_inf, Tensor):
                raise TypeError(f"found_inf: expected a Tensor of one element or None, not {type_name(found_inf)}")
            _check_one_element(found_inf, "found_inf")
        return cls(inv_scale, found_inf)

    def on(self, device: torch.device) -> LossScale:
        """As kernels take it. No host sync, unless ``device`` is the host and a tensor isn't there.

        Raises:
            ValueError: a tensor on the CPU holds no finite number > 0.
        """
        if self is UNSCALED:
            return self
        inverse, found = self.inverse, self.found_inf
        if isinstance(inverse, Tensor):
            if inverse.device.type == "cpu":  # elsewhere reading the value would be a host sync
                _checked_number(inverse.item())
            inverse = inverse.detach().reshape(()).to(device, wide_dtype(device), non_blocking=device.type != "cpu")
        elif inverse is not None:
            inverse = torch.full((), inverse, dtype=wide_dtype(device), device=device)
        if found is not None:
            in_place = found.dtype == torch.float32 and found.device == device
            found = found.detach().reshape(()) if in_place else torch.zeros((), dtype=torch.float32, device=device)
        return LossScale(inverse, found)

    def deliver(self, used: LossScale) -> None:
        """Sets the caller's ``found_inf``, where ``used`` (which ``on`` has made) has another tensor."""
        theirs, ours = self.found_inf, used.found_inf
        if theirs is not None and ours is not None and theirs.data_ptr() != ours.data_ptr():
            found = (ours != 0).to(theirs.device, non_blocking=theirs.device.type != "cpu")
            theirs.detach().masked_fill_(found.reshape(theirs.shape), 1.0)

    def unscaled(self, norms: Tensor) -> Tensor:
        """Norms of the unscaled gradients, from those of the scaled ones."""
        return norms if self.inverse is None else norms * self.inverse

    def factors(self, coefs: Tensor) -> Tensor:
        """What gradients are multiplied by to unscale and clip them: coefficients [K], in ``wide_dtype``."""
        return coefs if self.inverse is None else coefs.to(self.inverse.dtype) * self.inverse

    def report(self, sums: Tensor) -> None:
        """Sets ``found_inf`` if any power sum of the gradients is inf or NaN; no sync."""
        if self.found_inf is not None:
            self.found_inf.masked_fill_(~sums.isfinite().all(), 1.0)


UNSCALED = LossScale()


def _checked_number(inv_scale: object) -> float:
    if isinstance(inv_scale, bool) or not isinstance(inv_scale, Real):
        raise TypeError(f"inv_scale: expected a number, a Tensor of one element or None, not {type_name(inv_scale)}")
    value = as_float(inv_scale, "inv_scale")
    if not 0.0 < value < math.inf:
        raise ValueError(f"inv_scale: expected a finite number > 0, not {value}")
    return value


def _check_one_element(tensor: Tensor, name: str) -> None:
    if tensor.dtype not in FLOATS or tensor.layout != torch.strided:
        kind = tensor.dtype if tensor.layout == torch.strided else tensor.layout
        raise TypeError(f"{name}: expected a floating-point tensor, not {kind}")
    if tensor.numel() != 1:
        raise ValueError(f"{name}: expected one element, not shape {list(tensor.shape)}")
    if tensor.is_meta:
        raise ValueError(f"{name}: is on the meta device, where it has no value")
