"""AdamW's step of one bucket of parameters, as an optimizer that clips hands it to backends.

    t <- t + 1;  g' = factor_c * g          (g' = -factor_c * g with ``maximize``)
    m <- beta1 * m + (1 - beta1) * g'
    v <- beta2 * v + (1 - beta2) * g'^2;    with ``amsgrad`` w <- max(w, v), used in place of v below
    p <- (1 - lr * weight_decay) * p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

Without ``correct_bias`` both 1 - beta^t are 1. Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization",
ICLR 2019, arXiv 1711.05101; Reddi et al., "On the Convergence of Adam and Beyond", ICLR 2018, for ``amsgrad``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from .bucket import Bucket
from .formula import ClipRule
from .loss_scale import LossScale


class AdamWRule(NamedTuple):
    """The hyperparameters of a param group."""

    lr: float | Tensor  # a Tensor of one element is read when the step runs, without a host sync
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    amsgrad: bool
    maximize: bool
    correct_bias: bool


@dataclass(eq=False)
class AdamWStep:
    """One step of a bucket's parameters: lists by gradient of the bucket, all plain strided tensors."""

    params: list[Tensor]  # written; of any dtype that torch serves
    exp_avgs: list[Tensor]  # m, written; shapes of ``params``, their dtype or float32
    exp_avg_sqs: list[Tensor]  # v, likewise
    max_exp_avg_sqs: list[Tensor | None]  # w, likewise; None without ``amsgrad``
    steps: list[Tensor]  # t, [] each, float32 or float64, on the parameter's device or the CPU; written
    rules: tuple[AdamWRule, ...]
    rule_of: tuple[int, ...]  # of each gradient
    skip: Tensor | None = None  # float32 [] on the bucket's device: nothing at all is written unless it is 0
    addresses: bytes | None = None  # of all that is written, where the backend has read them

    def rule(self, i: int) -> AdamWRule:
        """The hyperparameters for gradient i."""
        return self.rules[self.rule_of[i]]

    def written(self) -> list[Tensor | None]:
        """All tensors that the step writes, five for each gradient: p, then m, v, w and t."""
        return [*self.params, *self.exp_avgs, *self.exp_avg_sqs, *self.max_exp_avg_sqs, *self.steps]


class StepBackend(Protocol):
    """A backend that steps parameters by given factors."""

    def adamw_(
        self, bucket: Bucket, grads: list[Tensor], step: AdamWStep, factors: Tensor, zero_fill: bool, addresses: Any
    ) -> None:
        """The step with factors [K] in ``wide_dtype``; with ``zero_fill`` a factor of 0 erases inf and NaN."""


class FusedStepBackend(StepBackend, Protocol):
    """A backend that also measures, clips and steps in one go, where nothing has to be known of all norms before."""

    def refuses_step(self, bucket: Bucket, grads: list[Tensor], step: AdamWStep) -> str | None:
        """Why it can't step these, or None: dtypes and layouts alone decide."""

    def clip_adamw_(
        self,
        bucket: Bucket,
        grads: list[Tensor],
        step: AdamWStep,
        caps: Tensor,
        rule: ClipRule,
        loss_scale: LossScale,
        addresses: bytes | None,
    ) -> tuple[Tensor, Tensor]:
        """Norms and coefficients, both [K] in ``bucket.norm_dtype``; ``grads`` aren't written."""
