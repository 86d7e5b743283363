"""Buckets made by hand for the Triton backend, and what it should make of them, in plain float64 torch."""

import math

import torch

from cwclip_kernels.backends import triton as backend
from cwclip_kernels.core import formula
from cwclip_kernels.core.bucket import Bucket
from cwclip_kernels.core.loss_scale import UNSCALED
from helpers import DEVICE, assert_norms, same_bits

ORDERS = (1.0, 2.0, math.inf)


def bucket_of(grads, owners, count=None, norm_dtype=None, plain=True):
    if norm_dtype is None:
        norm_dtype = torch.float64 if torch.float64 in {g.dtype for g in grads} else torch.float32
    return Bucket(
        device=torch.empty(0, device=DEVICE).device,  # of a GPU with its number, as tensors have it
        backend="triton",
        reason="test",
        positions=tuple(range(len(grads))),
        components=torch.tensor(owners, dtype=torch.int64),
        slices=None,
        count=max(owners) + 1 if count is None else count,
        norm_dtype=norm_dtype,
        plain=plain,
    )


def one_each(grads):
    return bucket_of(grads, list(range(len(grads))))


def cap(value):
    return torch.tensor(value, dtype=torch.float64, device=DEVICE)


def expected_sums(grads, owners, count, p):
    """sum |g|^p by component, each a single float64 torch expression."""
    sums = torch.zeros(count, dtype=torch.float64)
    for component in range(count):
        parts = [g.cpu().double().abs().flatten() for g, o in zip(grads, owners, strict=True) if o == component]
        values = torch.cat([torch.zeros(1, dtype=torch.float64), *parts])
        sums[component] = values.max() if p == math.inf else (values**p).sum()
    return sums.to(DEVICE)


def expected_scaled(grad, coef):
    """coef * g, rounded once from float32, or float64 for float64."""
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    return (grad.to(wide) * coef.to(wide)).to(grad.dtype)


def check_clip(grads, owners, caps, rule, count=None):
    """One clip: norms within tolerance, coefficients by the formula, and gradients to the bit."""
    bucket = bucket_of(grads, owners, count)
    before = [g.clone() for g in grads]
    norms, coefs = backend.clip_(bucket, grads, caps, rule, UNSCALED, None)
    sums = expected_sums(before, owners, bucket.count, rule.norm_type)
    exact = torch.float64 if {g.dtype for g in grads} == {torch.float64} else torch.float32
    assert norms.dtype == coefs.dtype == bucket.norm_dtype
    assert_norms(norms, formula.root(sums, rule.norm_type), exact)
    assert same_bits(coefs, formula.coefficients(norms, caps, rule))
    for grad, old, owner in zip(grads, before, owners, strict=True):
        coef = coefs[owner]
        if coef == 1:
            assert same_bits(grad, old)
        elif rule.zero_fill and coef == 0:
            assert same_bits(grad, torch.zeros_like(grad))
        else:
            torch.testing.assert_close(grad, expected_scaled(old, coef), rtol=0, atol=0, equal_nan=True)
    return norms, coefs
