"""ZClip's options against the authors' formulas (zclip 1.0.0), one float64 at a time."""

import math

import pytest
import torch

from cwclip_kernels import ComponentClipper, clip_in_backward
from cwclip_kernels.thresholds import Bounded, ZScore
from helpers import BACKENDS, DEVICE, parameter, random_grad, same_bits

WARMUP = 6
OPTIONS = [
    {},
    {"max_grad_norm": 0.9},
    {"clip_option": "mean"},
    {"clip_factor": 0.6, "max_grad_norm": 1.3},
    {"skip_update_on_spike": True},
    {"clip_option": "mean", "skip_update_on_spike": True, "max_grad_norm": 1.0},
    {"mode": "percentile"},
    {"mode": "percentile", "max_grad_norm": 1.1, "skip_update_on_spike": True},
    {"clip_option": "skip"},
    {"clip_option": "skip", "max_grad_norm": 0.9, "skip_update_on_spike": True},
    {"mode": "percentile", "clip_option": "skip"},
    {"clip_factor": 1.7},
]


class Authors:
    """One norm's statistics: what their ``step`` computes, and 0 in place of a spike's cap under "skip"."""

    def __init__(
        self, max_grad_norm=None, mode="zscore", clip_option="adaptive_scaling", clip_factor=1.0, skip_update=False
    ):
        self.ceiling, self.mode, self.option = max_grad_norm, mode, clip_option
        self.factor, self.skip_update = clip_factor, skip_update
        self.first, self.mean, self.variance = [], None, None

    def effective_norm(self, norm):
        if self.mean is None:
            self.first.append(norm)
            if len(self.first) == WARMUP:
                self.mean = sum(self.first) / WARMUP
                self.variance = sum((x - self.mean) ** 2 for x in self.first) / WARMUP
            return norm if self.ceiling is None else min(norm, self.ceiling)
        deviation, value = math.sqrt(self.variance), None
        if self.mode == "percentile":
            if norm > self.mean + 2.5 * deviation:
                value = self.mean + 2.5 * deviation
        else:
            z = (norm - self.mean) / (deviation + 1e-6 * self.mean)  # 1e-6 alone in their code
            if z > 2.5:
                value = self.mean
                if self.option != "mean":
                    value = (self.mean + 2.5 * deviation / (z / 2.5)) * self.factor
        is_skipped = value is not None and self.option == "skip"
        effective = 0.0 if is_skipped else norm if value is None else min(norm, value)
        if value is None or not self.skip_update:
            largest = self.mean + 2.5 * (deviation + 1e-6 * self.mean)  # that is no spike
            learnt = norm if value is None else largest if is_skipped else value
            learnt = min(learnt, norm)  # theirs learns more than the norm where a factor is above 1
            self.mean = 0.97 * self.mean + 0.03 * learnt
            self.variance = 0.97 * self.variance + 0.03 * (learnt - self.mean) ** 2
        return effective if self.ceiling is None else min(effective, self.ceiling)


def authors(options):
    own = dict(options)
    return Authors(skip_update=own.pop("skip_update_on_spike", False), **own)


def clip_steps(threshold, norms, backend=None):
    """The norm of each component's gradient after each step's clipping, [steps, K], and the last result."""
    params = [parameter(torch.ones(1, dtype=torch.float64, device=DEVICE)) for _ in norms[0]]
    clipper = ComponentClipper(params, threshold, backend=backend, eps=1.0)  # an eps would show
    found = []
    for row in norms:
        for p, norm in zip(params, row, strict=True):
            p.grad.fill_(norm)
        result = clipper.clip_()
        found.append([abs(p.grad.item()) for p in params])
    return found, result


def norms_with_spikes(steps=60, count=3):
    norms = torch.rand(steps, count, dtype=torch.float64) * 0.2 + 1.0
    norms[torch.rand(steps, count) < 0.1] *= 3.0
    norms[:: steps // 3, 0] = 40.0
    return norms.tolist()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_is_what_the_authors_compute(options):
    norms = norms_with_spikes()
    found, _ = clip_steps(ZScore(warmup_steps=WARMUP, **options), norms)
    for i in range(3):
        theirs = authors(options)
        for t, row in enumerate(norms):
            assert found[t][i] == pytest.approx(theirs.effective_norm(row[i]), rel=1e-9), (t, i)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_skipped_spike_is_zeroed_and_seen(backend):
    """That component alone, that step alone."""
    norms = [[1.0 + 0.01 * (t % 3), 1.0] for t in range(8)]
    spike = [*norms, [50.0, 1.0]]
    found, result = clip_steps(ZScore(warmup_steps=WARMUP, clip_option="skip"), spike, backend)
    assert found[-1] == [0.0, 1.0]
    assert result.caps.tolist() == [0.0, math.inf]
    assert result.coefs.tolist() == [0.0, 1.0]
    assert result.norms.tolist() == [50.0, 1.0]
    found, result = clip_steps(ZScore(warmup_steps=WARMUP, clip_option="skip"), [*spike, [1.0, 1.0]], backend)
    assert found[-1] == [1.0, 1.0]


def test_norms_that_stay_high_are_not_skipped_for_ever():
    norms = [[1.0 + 0.01 * (t % 3)] for t in range(8)] + [[3.0]] * 400
    found, _ = clip_steps(ZScore(warmup_steps=WARMUP, clip_option="skip"), norms)
    assert found[8] == [0.0]
    assert found[-1] == [3.0]
    found, _ = clip_steps(ZScore(warmup_steps=WARMUP, clip_option="skip", skip_update_on_spike=True), norms)
    assert found[-1] == [0.0]


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_nothing_is_learnt_from_what_is_not_finite(value):
    norms = [[1.0 + 0.01 * (t % 3)] for t in range(8)]
    for options in OPTIONS:
        ours, theirs = (ZScore(warmup_steps=WARMUP, **options) for _ in range(2))
        found, _ = clip_steps(ours, [*norms, [value]])
        clip_steps(theirs, norms)
        for name, tensor in ours.state_dict()["tensors"].items():
            assert same_bits(tensor, theirs.state_dict()["tensors"][name])
        assert found[-1][0] == 0.0 or math.isnan(found[-1][0])


def test_a_ceiling_and_a_bound_are_the_same():
    norms = norms_with_spikes()
    one, _ = clip_steps(ZScore(warmup_steps=WARMUP, max_grad_norm=1.1), norms)
    other, _ = clip_steps(Bounded(ZScore(warmup_steps=WARMUP), high=1.1), norms)
    assert one == other


def test_percentile_takes_one_pass_and_works_in_the_backward_pass():
    ours, theirs = ([parameter(random_grad((3,))) for _ in range(2)] for _ in range(2))
    handle = clip_in_backward(ours, ZScore(warmup_steps=1, mode="percentile"))
    clipper = ComponentClipper(theirs, ZScore(warmup_steps=1, mode="percentile"))
    assert not clipper._caps().needs_norms
    for _ in range(4):
        grads = [random_grad((3,)) for _ in ours]
        for params in (ours, theirs):
            for p in params:
                p.grad = None
            sum((p * g).sum() for p, g in zip(params, grads, strict=True)).backward()
        clipper.clip_()
        assert all(same_bits(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))
    assert handle.last.caps.isfinite().all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_grad_norm": -1.0}, ValueError, "max_grad_norm: expected a number >= 0"),
        ({"mode": "quantile"}, ValueError, "mode: expected one of 'zscore', 'percentile', not 'quantile'"),
        (
            {"clip_option": None},
            TypeError,
            "clip_option: expected one of 'adaptive_scaling', .*, not None",
        ),
        ({"clip_factor": 0.0}, ValueError, "clip_factor: expected a finite number > 0"),
        ({"skip_update_on_spike": 1}, TypeError, "skip_update_on_spike: expected a bool, not int"),
        ({"mode": "percentile", "clip_option": "mean"}, ValueError, "clip_option: 'mean' is for mode='zscore'"),
        ({"clip_factor": 0.5, "clip_option": "mean"}, ValueError, "clip_factor: is for mode='zscore' with"),
        ({"clip_factor": 0.5, "mode": "percentile"}, ValueError, "clip_factor: is for mode='zscore' with"),
    ],
)
def test_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message):
        ZScore(**options)
