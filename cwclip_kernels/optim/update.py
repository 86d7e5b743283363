"""One AdamW step of a set of parameters: which backend steps which of them, and with what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.registry import FUSED, FUSED_STEPS, step_backend
from ..core.adamw import AdamWRule, AdamWStep, FusedStepBackend
from ..core.bucket import Bucket, Found
from ..core.formula import ClipRule
from ..core.loss_scale import LossScale
from ..distributed.local import local_value


class AdamWUpdate:
    """What a call does with its coefficients: ``core.run.Update`` for AdamW.

    Args:
        tensors: the parameters of the call, by position.
        states: of each its optimizer state; None without gradient.
        rules: the hyperparameters of each param group.
        rule_of: of each parameter, which of these.
        skip: see ``AdamWStep``.
        backend: the one asked for by name.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        states: Sequence[dict[str, Any] | None],
        rules: tuple[AdamWRule, ...],
        rule_of: Sequence[int],
        skip: Tensor | None,
        backend: str | None,
    ) -> None:
        self._tensors, self._states = tensors, states
        self._rules, self._rule_of = rules, rule_of
        self._skip = skip
        self._backend = backend
        self._prepared: dict[int, tuple[AdamWStep, str | None]] = {}

    def prepare(self, buckets: Sequence[Bucket], found: Sequence[Found]) -> None:
        """Called before anything is written; RuntimeError if the named backend can't step these parameters."""
        for bucket, (own, _) in zip(buckets, found, strict=True):
            step = self._step_of(bucket)
            fused = FUSED_STEPS.get(bucket.backend)
            reason = "has no fused step" if fused is None else _refusal(fused, bucket, own, step)
            if reason is not None and self._backend in FUSED:
                raise RuntimeError(
                    f"backend={self._backend!r} {reason}; backend=None steps these parameters with torch's operators"
                )
            self._prepared[id(bucket)] = step, reason

    def clip_and_apply_(
        self,
        bucket: Bucket,
        grads: list[Tensor],
        caps: Tensor,
        rule: ClipRule,
        loss_scale: LossScale,
        addresses: bytes | None,
    ) -> tuple[Tensor, Tensor] | None:
        """See ``core.run.Update``."""
        step, reason = self._prepared[id(bucket)]
        if reason is not None:
            return None
        _bump_versions(step)
        return FUSED_STEPS[bucket.backend].clip_adamw_(bucket, grads, step, caps, rule, loss_scale, addresses)

    def apply_(
        self, bucket: Bucket, grads: list[Tensor], factors: Tensor, zero_fill: bool, addresses: bytes | None
    ) -> None:
        """See ``core.run.Update``."""
        step, reason = self._prepared[id(bucket)]
        _bump_versions(step)
        step_backend(bucket.backend, reason).adamw_(bucket, grads, step, factors, zero_fill, addresses)

    def _step_of(self, bucket: Bucket) -> AdamWStep:
        positions, states = bucket.positions, []
        for i in positions:
            state = self._states[i]
            assert state is not None  # since there is a gradient
            states.append(state)
        params = [self._tensors[i] for i in positions]
        kept = params, [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        params, exp_avgs, exp_avg_sqs = ([local_value(t) for t in each] for each in kept)
        rule_of = tuple([self._rule_of[i] for i in positions])
        maxima: list[Tensor | None] = [None] * len(positions)
        if any(rule.amsgrad for rule in self._rules):
            pairs = zip(rule_of, states, strict=True)
            maxima = [local_value(s["max_exp_avg_sq"]) if self._rules[i].amsgrad else None for i, s in pairs]
        steps, skip = [s["step"] for s in states], self._skip
        if skip is not None:
            skip = skip.to(bucket.device, torch.float32, non_blocking=bucket.device.type != "cpu")
        return AdamWStep(params, exp_avgs, exp_avg_sqs, maxima, steps, self._rules, rule_of, skip)


def _bump_versions(step: AdamWStep) -> None:
    torch.autograd.graph.increment_version([t for t in step.written() if t is not None])


def _refusal(fused: FusedStepBackend, bucket: Bucket, grads: list[Tensor], step: AdamWStep) -> str | None:
    if not bucket.plain:
        return "doesn't step complex parameters"
    return fused.refuses_step(bucket, grads, step)
