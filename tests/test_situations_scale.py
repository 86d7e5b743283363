"""Every way into the loop x every cap that follows norms: nothing depends on the scale of the loss."""

import copy
import math

import pytest
import torch
from torch import nn

from cwclip_kernels import ComponentClipper, thresholds
from helpers import DEVICE, same_bits
from ways import FOLLOW_NORMS, Model, assert_close, every_way, gradients_of, skip_refused


@every_way
@pytest.mark.parametrize("kind", FOLLOW_NORMS)
@pytest.mark.parametrize("exponent", [-20, 12])
def test_nothing_that_follows_norms_depends_on_the_losss_scale(way, kind, exponent):
    skip_refused(way, kind)
    model = Model()
    loops = [way(copy.deepcopy(model), FOLLOW_NORMS[kind]()) for _ in range(2)]
    clipped = 0
    for step in range(30):
        gradients = gradients_of(model, size=0.01 * (20 if step % 7 == 6 else 1))
        small = [g * 2.0**exponent for g in gradients]
        left, left_of_small = loops[0].step(gradients), loops[1].step(small)
        assert_close([g * 2.0**-exponent for g in left_of_small], left)
        clipped += sum(not same_bits(a, b) for a, b in zip(left, gradients, strict=True))
    assert clipped > 0


@every_way
@pytest.mark.parametrize("kind", FOLLOW_NORMS)
@pytest.mark.parametrize("norm", [1e-3, 1e-6, 1e-12])
def test_small_gradients_of_constant_norm_stay(way, kind, norm):
    skip_refused(way, kind)
    model = Model()
    loop = way(model, FOLLOW_NORMS[kind]())
    gradients = [g * (norm / g.norm()) for g in gradients_of(model)]
    for _ in range(40):
        left = loop.step(gradients)
    assert_close(left, gradients)


def test_a_model_trains_as_well_under_a_small_loss():
    """Adam doesn't care about the loss's scale, and neither may the caps."""
    losses = []
    for scale in (1.0, 1e-5):
        torch.manual_seed(0)
        x = torch.randn(64, 4, device=DEVICE)
        y = (x @ torch.randn(4, 1, device=DEVICE)).tanh()
        model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1)).to(DEVICE)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02, eps=1e-30)
        clipper = ComponentClipper(model, thresholds.EMA(warmup_steps=5, warmup_norm=math.inf))
        for _ in range(300):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            (loss * scale).backward()
            clipper.clip_()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] < 0.01
    assert losses[1] < 3 * losses[0]


def test_a_cap_learns_the_clipped_norm_itself():
    """min(norm, cap), as the authors' code: not cap / (norm + 1e-6) * norm."""
    p = nn.Parameter(torch.zeros(1, device=DEVICE))
    threshold = thresholds.EMA(ratio=1.04, decay=0.99, warmup_steps=0)
    clipper = ComponentClipper([p], threshold)
    gamma = None
    for norm in (3e-6, 9e-6, 1e-6, 2e-6, 9e-6):
        p.grad = torch.full((1,), norm, device=DEVICE)
        clipper.clip_()
        kept = norm if gamma is None else min(norm, 1.04 * gamma)
        gamma = kept if gamma is None else 0.99 * gamma + 0.01 * kept
        assert threshold.state_dict()["tensors"]["gamma"].item() == pytest.approx(gamma, rel=1e-6)
        assert p.grad.item() == pytest.approx(kept, rel=1e-6)


def test_eps_is_for_numbers():
    for cap, expected in ((1e-6, 0.5), (thresholds.Fixed(1e-6), 0.5), (thresholds.ParamRelative(1e-3, 1e-3), 1.0)):
        p = nn.Parameter(torch.zeros(1, device=DEVICE))
        p.grad = torch.full((1,), 1e-6, device=DEVICE)
        assert ComponentClipper([p], cap).clip_().coefs.item() == pytest.approx(expected)
