"""An optimizer's step under torch.compile: one custom operator, as for clipping (``core.traced``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..components.membership import Components, unclipped
from ..core import run, traced
from ..core.adamw import AdamWRule
from ..core.checks import check_gradients
from ..core.formula import ClipRule, wide_dtype
from ..core.loss_scale import LossScale
from ..core.options import Options
from ..core.plan import Plans
from ..result import ClipResult
from ..thresholds import Threshold
from ..thresholds.by_pattern import settled
from ..thresholds.constant import MaxNorm
from .clipping import is_known_to_hold
from .update import AdamWUpdate


class States(NamedTuple):
    """Of all parameters with gradients, group by group; ``max_exp_avg_sqs`` of those with ``amsgrad``."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor]
    steps: list[Tensor]


def clip_adamw_(
    tensors: Sequence[Tensor],
    components: Components,
    present: list[int],
    max_norm: MaxNorm,
    options: Options,
    states: States,
    groups: Sequence[Mapping[str, Any]],
    rule_of: list[int],
    scale: LossScale,
    skip: Tensor | None,
) -> ClipResult:
    """The step. ``present`` are the positions of the parameters with gradients among all ``tensors``.

    A learning rate that is a number becomes part of the compiled function; a tensor is read whenever that runs.
    """
    if not present:
        words = traced.in_words(components.only(present))
        outcome = traced.clip_present_(tensors, [], words, components, max_norm, options, scale)
        return ClipResult(components.names, *outcome)
    check_gradients(components, dict(zip(present, states.grads, strict=True)), writes=False)
    rates: list[Tensor] = []
    numbers: list[float] = []
    for group in groups:
        lr = group["lr"]
        rates.append(lr if isinstance(lr, Tensor) else torch.full((), lr, dtype=torch.float64, device="cpu"))
        numbers += [*group["betas"], group["eps"], group["weight_decay"]]
        numbers += [float(group[flag]) for flag in ("amsgrad", "maximize", "correct_bias")]
    cap = settled(max_norm)
    threshold = cap if isinstance(cap, Threshold) else None
    rule = options.rule
    eps, exempt = traced.eps_of(cap, rule)
    norms, coefs, used = torch.ops.cwclip_kernels.component_clip_adamw_(
        states.grads,
        traced.in_words(components.only(present)),
        *traced.caps_for(tensors, components, cap, options, scale, states.grads[0].device),
        states.params,
        states.exp_avgs,
        states.exp_avg_sqs,
        states.max_exp_avg_sqs,
        states.steps,
        rates,
        numbers,
        rule_of,
        scale.inverse,
        skip,
        rule.norm_type,
        eps,
        exempt,
        options.nonfinite,
        options.backend,
    )
    if threshold is not None:
        _learn(threshold, norms, coefs, skip)
    return ClipResult(components.names, norms, coefs, used)


def _learn(threshold: Threshold, norms: Tensor, coefs: Tensor, skip: Tensor | None) -> None:
    """A step that is skipped, of which only the device knows, teaches nothing."""
    if skip is None:
        threshold.update_(norms, coefs)
        return
    before = [(tensor, tensor.clone()) for tensor in threshold.state_tensors()]
    threshold.update_(norms, coefs)
    for tensor, old in before:
        tensor.copy_(torch.where(skip.to(tensor.device) != 0, old, tensor))


# The operator itself, which Dynamo doesn't look into.


def _component_clip_adamw_(
    grads: list[Tensor],
    components: str,
    caps: Tensor | None,
    patterns: str,
    values: list[float],
    params: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    learning_rates: list[Tensor],
    numbers: list[float],
    rule_of: list[int],
    inv_scale: Tensor | None,
    found_inf: Tensor | None,
    norm_type: float,
    eps: float,
    exempt: list[int],
    nonfinite: str,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    maxima = iter(max_exp_avg_sqs)
    rules = tuple(_rule(lr, numbers[7 * i : 7 * i + 7]) for i, lr in enumerate(learning_rates))
    states = []
    for i, (m, v, t) in enumerate(zip(exp_avgs, exp_avg_sqs, steps, strict=True)):
        state = {"exp_avg": m, "exp_avg_sq": v, "step": t}
        if rules[rule_of[i]].amsgrad:
            state["max_exp_avg_sq"] = next(maxima)
        states.append(state)
    update = AdamWUpdate(params, states, rules, tuple(rule_of), found_inf, backend)
    calls = []
    for plans in (traced.plans_for(grads, components), _rest(components, grads[0].device, len(grads))):
        plan, found = plans.measured(list(grads), params, norm_type, backend)
        update.prepare(plan.buckets, found)
        calls.append((plan, found))
    (plan, found), rest = calls
    if nonfinite == "error" and is_known_to_hold(found_inf, True):  # for the scaler inf is no error
        nonfinite = "propagate"
    fixed = traced.policy_of(components, caps, patterns, values, eps, exempt)
    scale = LossScale.of(inv_scale, None)
    rule = ClipRule(norm_type, eps, nonfinite)
    norms, coefs, used = run.clip_(plan, found, fixed, rule, nonfinite == "error", scale.on(plan.device), update)
    if rest[0].buckets:
        ones = torch.ones(1, dtype=wide_dtype(rest[0].device), device=rest[0].device)
        run.apply_(*rest, scale.on(rest[0].device).factors(ones), rule, update)
    return norms, coefs, used.clone()  # an operator may not return what is kept


def _rule(lr: Tensor, numbers: Sequence[float]) -> AdamWRule:
    beta1, beta2, eps, weight_decay, amsgrad, maximize, correct_bias = numbers
    rate = lr.item() if lr.device.type == "cpu" else lr
    return AdamWRule(rate, beta1, beta2, eps, weight_decay, bool(amsgrad), bool(maximize), bool(correct_bias))


@lru_cache(maxsize=64)
def _rest(components: str, device: torch.device, count: int) -> Plans:
    """The plans for gradients that no component has."""
    known = traced.read(components)
    clipped = known.clipped
    return Plans(unclipped(known.tensor_names, [i for i in range(count) if i not in clipped]))


def _fake_component_clip_adamw_(
    grads: list[Tensor], components: str, caps: Tensor | None, patterns: str, values: list[float], *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    return traced.fake_outcome(grads, components, caps, patterns)


traced.define(
    "cwclip_kernels::component_clip_adamw_",
    _component_clip_adamw_,
    _fake_component_clip_adamw_,
    ("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps"),
)
