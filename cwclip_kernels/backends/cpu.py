"""The fused CPU kernels, csrc/cpu/, through torch.ops."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..formula import UNSCALED, ClipRule, LossScale
from . import extension

if TYPE_CHECKING:
    from ..plan import Bucket


def refuses(device: torch.device, dtype: torch.dtype, norm_type: float) -> str | None:
    """Why this backend can't serve such a gradient, or None."""
    if device.type != "cpu":
        return f"serves CPU tensors, not {device.type}"
    return extension.unserved(dtype, norm_type) or extension.unavailable()


def _check(bucket: Bucket, grads: list[Tensor], *, writes: bool) -> None:
    """Raises RuntimeError if these are not the gradients that the bucket was made for."""
    if bucket.plain:  # others are compared by the plan
        addresses = bucket.scratch.get("addresses")
        if addresses is None:
            addresses = bucket.scratch["addresses"] = extension.Addresses(grads)
        addresses.of(grads, writes=writes)


def power_sums(bucket: Bucket, grads: list[Tensor], norm_type: float) -> Tensor:
    """sum |g|^p of each component, or max |g|: float64 [K]."""
    _check(bucket, grads, writes=False)
    sums: Tensor = torch.ops.cwclip_kernels.power_sums(
        grads, bucket.components, bucket.cuts(), bucket.count, norm_type
    )
    return sums


def scale_(bucket: Bucket, grads: list[Tensor], coefs: Tensor, zero_fill: bool) -> None:
    """g <- coef * g in place; nothing written where coef is 1."""
    _check(bucket, grads, writes=True)
    torch.ops.cwclip_kernels.scale_(grads, bucket.components, bucket.cuts(), coefs.double(), zero_fill)


def clip_(
    bucket: Bucket, grads: list[Tensor], caps: Tensor, rule: ClipRule, loss_scale: LossScale = UNSCALED
) -> tuple[Tensor, Tensor]:
    """Norms and coefficients, [K], float64 if any gradient is; each component scaled while still in cache."""
    _check(bucket, grads, writes=True)
    norms, coefs = torch.ops.cwclip_kernels.clip_(
        grads,
        bucket.components,
        bucket.cuts(),
        bucket.count,
        caps,
        loss_scale.inverse,
        loss_scale.found_inf,
        rule.norm_type,
        rule.eps,
        extension.POLICY_CODES[rule.nonfinite],
    )
    return norms, coefs
