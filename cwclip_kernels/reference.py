"""The definition: what every backend must compute, written to be read. Slow, and copies gradients.

    norm_c = (sum over component c of |g|^p)^(1/p)      power_sums; core.formula.root
    coef_c = min(1, max_norm_c / (norm_c + eps))        core.formula.coefficients
    g     <- coef_c * g                                 scale_

with g divided by the loss's scale first, if there is one. Everything up to the coefficient is float64. Source: Yang &
Ma, "Improving Stability of Fine-Tuning Pretrained Language Models via Component-Wise Gradient Norm Clipping", EMNLP
2022 (arXiv 2210.10325); eps and the treatment of non-finite norms as ``torch.nn.utils.clip_grad_norm_``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .core.bucket import Bucket
from .core.formula import neutral, wide_dtype


def refuses(device: torch.device, dtype: torch.dtype, norm_type: float) -> str | None:
    """The definition serves everything."""
    return None


def power_sums(bucket: Bucket, grads: list[Tensor], norm_type: float, addresses: bytes | None) -> Tensor:
    """sum |g|^p of each component ([K] in ``wide_dtype``); max |g| for p = inf, min for -inf, count for 0."""
    wide = wide_dtype(bucket.device)
    owners, pieces = bucket.components.tolist(), bucket.pieces(grads)
    sums = torch.full((bucket.count,), neutral(norm_type), dtype=wide, device=bucket.device)
    for component in range(bucket.count):
        members = [g.abs().to(wide).flatten() for g, owner in zip(pieces, owners, strict=True) if owner == component]
        values = torch.cat(members) if members else torch.empty(0, device=bucket.device)
        if values.numel() == 0:
            continue
        if norm_type == math.inf:
            sums[component] = values.max()
        elif norm_type == -math.inf:
            sums[component] = values.min()
        elif norm_type == 0.0:
            sums[component] = (values != 0).sum()
        else:
            sums[component] = (values**norm_type).sum()
    return sums


def scale_(bucket: Bucket, grads: list[Tensor], coefs: Tensor, zero_fill: bool, addresses: bytes | None) -> None:
    """g <- coef * g in place, half precisions multiplied in float32; coef 1 keeps the bits.

    A complex gradient's two parts are multiplied each by itself: a complex product would make NaN of inf + 0j.
    """
    for grad, component in zip(bucket.pieces(grads), bucket.components.tolist(), strict=True):
        if grad.is_complex():
            grad = torch.view_as_real(grad)
        coef = coefs[component]
        wide = {torch.float16: torch.float32, torch.bfloat16: torch.float32}.get(grad.dtype, grad.dtype)
        scaled = (grad.to(wide) * coef.to(wide)).to(grad.dtype)
        if zero_fill:
            scaled = torch.where(coef == 0, torch.zeros_like(grad), scaled)
        grad.copy_(torch.where(coef == 1, grad, scaled))
