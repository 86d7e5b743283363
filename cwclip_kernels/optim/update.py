"""One AdamW step of a set of parameters: which backend steps which of them, and with what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

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
        is_spread: whether some are DTensors.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        states: Sequence[dict[str, Any] | None],
        rules: tuple[AdamWRule, ...],
        rule_of: tuple[int, ...],
        skip: Tensor | None,
        backend: str | None,
        is_spread: bool = False,
    ) -> None:
        self._tensors, self._states = tensors, states
        self._rules, self._rule_of = rules, rule_of
        self._skip = skip
        self._backend = backend
        self._is_spread = is_spread
        self._prepared: dict[int, tuple[AdamWStep, str | None]] = {}

    def prepare(self, buckets: Sequence[Bucket], found: Sequence[Found]) -> None:
        """Called before anything is written; RuntimeError if the named backend can't step these parameters."""
        for bucket, (own, _) in zip(buckets, found, strict=True):
            step = self._step_of(bucket)
            fused = FUSED_STEPS.get(bucket.backend)
            reason = "has no fused step" if fused is None else _refusal(fused, bucket, own, step)
            if reason is not None and any(p.is_conj() or p.is_neg() for p in step.params):
                raise RuntimeError(
                    "a parameter is lazily conjugated or negated, so that it can't be stepped in place; make it of "
                    "tensor.resolve_conj().resolve_neg()"
                )
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
        positions, rules = bucket.positions, self._rules
        params, states, rule_of = self._tensors, self._states, self._rule_of
        if len(positions) < len(params):
            params, states = [params[i] for i in positions], [states[i] for i in positions]
            rule_of = tuple([rule_of[i] for i in positions])
        # All have one, since there are gradients.
        kept = [[s[name] for s in states] for name in ("exp_avg", "exp_avg_sq", "step")]  # type: ignore[index]
        maxima: list[Tensor | None] = [None] * len(positions)
        if any(rule.amsgrad for rule in rules):
            pairs = zip(rule_of, states, strict=True)
            maxima = [s["max_exp_avg_sq"] if rules[i].amsgrad else None for i, s in pairs]  # type: ignore[index]
        lists: list[list[Tensor | None]] = [[*params], *kept[:2], maxima]
        if self._is_spread:
            lists = [[None if t is None else local_value(t) for t in each] for each in lists]
        skip = self._skip
        if skip is not None:
            skip = skip.to(bucket.device, torch.float32, non_blocking=bucket.device.type != "cpu")
        return AdamWStep(*lists, kept[2], rules, rule_of, skip)  # type: ignore[arg-type, call-arg]


def _bump_versions(step: AdamWStep) -> None:
    # Of parameters alone: what autograd has saved is never a running mean.
    torch.autograd.graph.increment_version(step.params)


def _refusal(fused: FusedStepBackend, bucket: Bucket, grads: list[Tensor], step: AdamWStep) -> str | None:
    if not bucket.plain:
        return "doesn't step complex parameters"
    return fused.refuses_step(bucket, grads, step)


def rule_of(group: dict[str, Any]) -> AdamWRule:
    """The hyperparameters of a param group, a tensor on the CPU as number."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.device.type == "cpu":
        lr = lr.item()
    beta1, beta2 = map(float, group["betas"])
    flags = group["amsgrad"], group["maximize"], group["correct_bias"]
    return AdamWRule(lr, beta1, beta2, float(group["eps"]), float(group["weight_decay"]), *flags)


def loss_scale_of(optimizer: Optimizer) -> tuple[LossScale, Tensor | None]:
    """What ``torch.amp.GradScaler.step`` hands over: the loss's scale, and whether to skip the step."""
    grad_scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    inverse = None if grad_scale is None else grad_scale.double().reciprocal()
    return LossScale.of(inverse, None), None if found_inf is None else found_inf.reshape(())


def forget_loss_scale(optimizer: Optimizer) -> None:
    """Takes back what a ``GradScaler`` has handed over; it does so itself, but not after a step that fails."""
    for name in ("grad_scale", "found_inf"):
        vars(optimizer).pop(name, None)


def check_capture(optimizer: Optimizer) -> None:
    """Torch's own check that a step that is captured into a graph can be."""
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
        check = getattr(optimizer, name, None)
        if check is not None:
            check()
            return
