"""``inv_scale`` and ``found_inf``: the loss scale of a call's gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_float_tensor, check_type, checked_number
from .formula import moved, wide_dtype
from .modes import can_be_read


@dataclass(frozen=True)
class LossScale:
    """Unscales the gradients of a scaled loss in the pass that clips, and reports inf and NaN.

    g <- inverse * g before anything else; found_inf <- 1 if any g is inf or NaN
    """

    inverse: Any = None  # as given; ``on`` a device a Tensor [] in ``wide_dtype``; None for 1
    found_inf: Tensor | None = None  # as given; ``on`` a device a Tensor [] of float32

    @classmethod
    def of(cls, inv_scale: float | Tensor | None, found_inf: Tensor | None) -> LossScale:
        """From the arguments of a call, checked."""
        if inv_scale is None and found_inf is None:
            return UNSCALED
        if isinstance(inv_scale, Tensor):
            _check_one_element(inv_scale, "inv_scale")
        elif inv_scale is not None:
            inv_scale = _checked_number(inv_scale)
        if found_inf is not None:
            check_type(found_inf, "found_inf", Tensor, "a Tensor of one element or None")
            _check_one_element(found_inf, "found_inf")
        return cls(inv_scale, found_inf)

    def on(self, device: torch.device) -> LossScale:
        """As kernels take it; a value on the CPU is checked. Syncs only to bring a tensor to the CPU."""
        if self is UNSCALED:
            return self
        inverse, found = self.inverse, self.found_inf
        if isinstance(inverse, Tensor):
            if can_be_read(inverse):
                _checked_number(inverse.item())
            inverse = moved(inverse.reshape(()), device)
        elif inverse is not None:
            inverse = torch.full((), inverse, dtype=wide_dtype(device), device=device)
        if found is not None:
            in_place = found.dtype == torch.float32 and found.device == device
            found = found.detach().reshape(()) if in_place else torch.zeros((), dtype=torch.float32, device=device)
        return LossScale(inverse, found)

    def deliver(self, used: LossScale) -> None:
        """Sets the caller's ``found_inf``, if ``used``, which ``on`` has made, has another tensor."""
        theirs, ours = self.found_inf, used.found_inf
        if theirs is not None and ours is not None and theirs.data_ptr() != ours.data_ptr():
            found = (ours != 0).to(theirs.device, non_blocking=theirs.device.type != "cpu")
            theirs.detach().masked_fill_(found.reshape(theirs.shape), 1.0)

    def unscaled(self, norms: Tensor, norm_type: float) -> Tensor:
        """Norms of the unscaled gradients from those of the scaled ones; a number of non-zeros has no scale."""
        return norms if self.inverse is None or norm_type == 0.0 else norms * self.inverse

    def factors(self, coefs: Tensor) -> Tensor:
        """The factors [K] that unscale and clip gradients, from coefficients."""
        return coefs if self.inverse is None else coefs.to(self.inverse.dtype) * self.inverse

    def report(self, sums: Tensor) -> None:
        """Sets ``found_inf`` if any power sum is inf or NaN; no sync."""
        if self.found_inf is not None:
            self.found_inf.masked_fill_(~sums.isfinite().all(), 1.0)


UNSCALED = LossScale()


def _checked_number(inv_scale: object) -> float:
    kinds = "a number, a Tensor of one element or None"
    return checked_number(inv_scale, "inv_scale", above_low=True, kinds=kinds)


def _check_one_element(tensor: Tensor, name: str) -> None:
    check_float_tensor(tensor, name)
    if tensor.numel() != 1:
        raise ValueError(f"{name}: expected one element, not shape {list(tensor.shape)}")
