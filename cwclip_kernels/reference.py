"""The definition: what every backend must compute, written to be read. Slow, and copies gradients.

    norm_c = (sum over component c of |g|^p)^(1/p)      power_sums; core.formula.root
    coef_c = min(1, max_norm_c / (norm_c + eps))        core.formula.coefficients
    g     <- coef_c * g                                 scale_
    p     <- AdamW(p, coef_c * g)                       adamw_, instead of scale_, in an optimizer's step

with g divided by the loss's scale first, if there is one. Everything up to the coefficient is float64. Source: Yang &
Ma, "Improving Stability of Fine-Tuning Pretrained Language Models via Component-Wise Gradient Norm Clipping", EMNLP
2022 (arXiv 2210.10325); eps and the treatment of non-finite norms as ``torch.nn.utils.clip_grad_norm_``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .core.adamw import AdamWStep
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


def adamw_(
    bucket: Bucket, grads: list[Tensor], step: AdamWStep, factors: Tensor, zero_fill: bool, addresses: bytes | None
) -> None:
    """The formula of ``core.adamw``, in float32 or wider, each result rounded once where it is kept.

    The clipped gradient isn't rounded to the gradient's dtype in between. A complex number is stepped as two reals.
    """
    old = 1.0 if step.skip is None else (step.skip == 0).to(wide_dtype(bucket.device))
    times = [t.to(bucket.device, wide_dtype(bucket.device)) + old for t in step.steps]
    lists = [bucket.pieces(tensors) for tensors in (grads, step.params, step.exp_avgs, step.exp_avg_sqs)]
    owners = zip(bucket.gradient_of_pieces(), bucket.components.tolist(), strict=True)
    maxima = bucket.pieces([p if w is None else w for p, w in zip(step.params, step.max_exp_avg_sqs, strict=True)])
    for (i, component), tensors, maximum in zip(owners, zip(*lists, strict=True), maxima, strict=True):
        rule, time, factor = step.rule(i), times[i], factors[component]
        kept = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in (*tensors, maximum)]
        wide = torch.promote_types(torch.promote_types(kept[1].dtype, kept[0].dtype), torch.float32)
        g, p, m, v, w = (t.to(wide) for t in kept)
        g = g * factor.to(wide)
        if zero_fill:
            g = torch.where(factor == 0, torch.zeros_like(g), g)
        if rule.maximize:
            g = -g
        lr = rule.lr.to(bucket.device, time.dtype).reshape(()) if isinstance(rule.lr, Tensor) else rule.lr
        m = torch.lerp(m, g, 1 - rule.beta1)  # exact for beta1 = 0
        v = rule.beta2 * v + (1 - rule.beta2) * g * g
        w = torch.maximum(w, v) if rule.amsgrad else v
        first, second = (1 - rule.beta1**time, 1 - rule.beta2**time) if rule.correct_bias else (1.0, 1.0)
        size, root, decay = (
            torch.as_tensor(number, dtype=time.dtype)
            for number in (lr / first, second**0.5, 1 - lr * rule.weight_decay)
        )
        p = decay.to(wide) * p - size.to(wide) * (m / (w.sqrt() / root.to(wide) + rule.eps))
        new = (p, m, v, w) if rule.amsgrad else (p, m, v)
        for tensor, value in zip(kept[1:], new, strict=False):
            tensor.copy_(value if step.skip is None else torch.where(step.skip == 0, value.to(tensor.dtype), tensor))
    for t, time in zip(step.steps, times, strict=True):
        t.copy_(time)
