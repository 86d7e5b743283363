"""Power sums to norms to coefficients, in torch operations on any device; the kernels are tested against these."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
from torch import Tensor

POLICIES = ("propagate", "zero", "skip", "error")


@dataclass(frozen=True)
class ClipRule:
    """How a norm becomes a coefficient: the scalars of a call, already checked."""

    norm_type: float = 2.0
    eps: float = 1e-6
    nonfinite: str = "propagate"  # one of POLICIES; "error" is decided before anything is scaled

    @property
    def zero_fill(self) -> bool:
        """Whether a coefficient of 0 writes zeros, which erases inf and NaN, instead of multiplying."""
        return self.nonfinite == "zero"

    @cached_property
    def without_eps(self) -> ClipRule:
        """The same with ``eps`` 0: then a cap that follows the norms gives the same coefficient at any loss scale."""
        return self if self.eps == 0.0 else replace(self, eps=0.0)


def wide_dtype(device: torch.device) -> torch.dtype:
    """The dtype of power sums and of the coefficient's arithmetic: float64 where the device has it."""
    return torch.float64 if has_float64(device) else torch.float32


def has_float64(device: torch.device) -> bool:
    """Whether the device computes in float64: Apple's GPUs don't, and of Intel's some."""
    return _xpu_has_float64(device.index) if device.type == "xpu" else device.type != "mps"


@cache
def _xpu_has_float64(index: int | None) -> bool:
    return bool(getattr(torch.xpu.get_device_properties(index), "has_fp64", True))


def moved(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """On a device, in ``wide_dtype`` or another, without a graph; the host waits only for what comes to it."""
    # A copy to the host must be complete before it is read.
    return tensor.detach().to(device, dtype or wide_dtype(device), non_blocking=device.type != "cpu")


def is_extremum(norm_type: float) -> bool:
    """Whether the norm is the largest or the smallest element."""
    return abs(norm_type) == math.inf  # not math.isinf, which can't be traced where Dynamo takes orders for variables


def merged(sums: Tensor, norm_type: float) -> Tensor:
    """Power sums of disjoint parts, along the last dimension, as one: added in a fixed order; NaN wins."""
    if is_extremum(norm_type):
        return sums.amax(-1) if norm_type > 0 else sums.amin(-1)
    return sums.sum(-1)


def total(norms: Tensor, norm_type: float) -> Tensor:
    """The power sum of all components together, [], from their norms."""
    wide = norms.to(wide_dtype(norms.device))
    powers = wide if norm_type == 0.0 or is_extremum(norm_type) else wide**norm_type
    if norm_type < 0:  # a component without elements has norm 0
        powers = torch.where(norms == 0, neutral(norm_type), powers)
    return merged(torch.cat((powers, powers.new_full((1,), neutral(norm_type)))), norm_type)


def total_norm(norms: Tensor, norm_type: float) -> Tensor:
    """The norm of all components together, [], from their norms and in the dtype of these."""
    return root(total(norms, norm_type), norm_type).to(norms.dtype)


def neutral(norm_type: float) -> float:
    """The power sum of no elements, which ``merged`` ignores."""
    return math.inf if norm_type == -math.inf else 0.0


def root(sums: Tensor, norm_type: float) -> Tensor:
    """(sum |g|^p)^(1/p); the extremum itself for p = +-inf, the number of non-zeros for p = 0."""
    if norm_type == 2.0:
        return sums.sqrt()
    if norm_type in (0.0, 1.0) or is_extremum(norm_type):
        return sums
    return sums ** (1.0 / norm_type)


def coefficients(norms: Tensor, caps: Tensor, rule: ClipRule, eps: Tensor | None = None) -> Tensor:
    """coef = min(1, cap / (norm + eps)), [K] in the norms' dtype, from ``caps`` [] or [K] in ``wide_dtype``.

    ``eps``, [K] in ``wide_dtype``, is added to each norm in place of the rule's, where components differ in it.
    A cap of inf gives 1 whatever the norm, a norm of 0 gives 1 whatever the cap. Under "propagate" a norm of inf
    gives 0 and NaN gives NaN. A cap that is negative or NaN gives NaN, since refusing it would need a host sync.
    """
    padded = norms.to(caps.dtype) + (rule.eps if eps is None else eps)
    coefs = torch.where(padded <= caps, 1.0, caps / padded)
    coefs = torch.where(caps >= 0, coefs, math.nan)
    if rule.nonfinite in ("zero", "skip"):
        coefs = torch.where(norms.isfinite(), coefs, 0.0 if rule.nonfinite == "zero" else 1.0)
    return torch.where((caps == math.inf) | (norms == 0), 1.0, coefs).to(norms.dtype)
