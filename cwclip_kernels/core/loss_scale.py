"""The arguments ``inv_scale`` and ``found_inf``: checked once, brought to whichever device asks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import check_float_tensor, check_type, checked_number
from .formula import LossScale, wide_dtype


class ScaledLoss:
    """How the loss was scaled, in the caller's words.

    Args:
        inv_scale: what undoes it: a number, or a floating-point Tensor of one element, used where it lies; None for
            gradients that aren't scaled.
        found_inf: floating-point Tensor of one element, set to 1 if any gradient is inf or NaN; or None.

    Raises:
        TypeError: none of these.
        ValueError: a number that isn't finite and > 0, a tensor of another shape or without data. What a tensor on
            the CPU holds is looked at in ``on``.
    """

    def __init__(self, inv_scale: float | Tensor | None, found_inf: Tensor | None) -> None:
        if isinstance(inv_scale, Tensor):
            _check_one_element(inv_scale, "inv_scale")
        elif inv_scale is not None:
            inv_scale = _checked_number(inv_scale)
        if found_inf is not None:
            check_type(found_inf, "found_inf", Tensor, "a Tensor of one element or None")
            _check_one_element(found_inf, "found_inf")
        self._inv_scale = inv_scale
        self._found_inf = found_inf

    @property
    def looks_for_inf(self) -> bool:
        """Whether the caller wants to know of inf and NaN."""
        return self._found_inf is not None

    def on(self, device: torch.device) -> LossScale:
        """As kernels take it; no host sync, unless ``device`` is the host and a tensor isn't there."""
        inverse, found = self._inv_scale, self._found_inf
        if isinstance(inverse, Tensor):
            if inverse.device.type == "cpu":  # elsewhere the look would be a host sync
                _checked_number(inverse.item())
            inverse = inverse.detach().reshape(()).to(device, wide_dtype(device), non_blocking=device.type != "cpu")
        elif inverse is not None:
            inverse = torch.full((), inverse, dtype=wide_dtype(device), device=device)
        if found is not None:
            in_place = found.dtype == torch.float32 and found.device == device
            found = found.detach().reshape(()) if in_place else torch.zeros((), dtype=torch.float32, device=device)
        return LossScale(inverse, found)

    def deliver(self, used: LossScale) -> None:
        """Sets the caller's ``found_inf`` where what the kernels wrote to is another tensor."""
        theirs, ours = self._found_inf, used.found_inf
        if theirs is not None and ours is not None and theirs.data_ptr() != ours.data_ptr():
            found = (ours != 0).to(theirs.device, non_blocking=theirs.device.type != "cpu")
            theirs.detach().masked_fill_(found.reshape(theirs.shape), 1.0)


def _checked_number(inv_scale: object) -> float:
    kinds = "a number, a Tensor of one element or None"
    return checked_number(inv_scale, "inv_scale", above_low=True, kinds=kinds)


def _check_one_element(tensor: Tensor, name: str) -> None:
    check_float_tensor(tensor, name)
    if tensor.numel() != 1:
        raise ValueError(f"{name}: expected one element, not shape {list(tensor.shape)}")


NOT_SCALED = ScaledLoss(None, None)
