"""Every way into a training loop, held to the same gradients: what the tests of situations have in common.

Each gradient is what the test says: the loss is sum(parameter * gradient). A way's step() returns what is left of the
gradients.
"""

import math

import pytest
import torch
from torch import nn

from cwclip_kernels import (
    ComponentClipGradScaler,
    ComponentClipper,
    clip_in_backward,
    fused_component_clip_,
    thresholds,
)
from helpers import DEVICE

CAP = 0.05
CAPS = {
    "number": lambda: CAP,
    "mapping": lambda: {"*weight": CAP, "*": 2 * CAP},
    "tensor": lambda: torch.tensor(CAP, device=DEVICE),
    "Fixed": lambda: thresholds.Fixed(CAP),
    "Schedule": lambda: thresholds.Schedule(lambda step: CAP / (1 + step)),
    "FromGlobal": lambda: thresholds.FromGlobal(CAP, "numel"),
    "ParamRelative": thresholds.ParamRelative,
    "EMA": lambda: thresholds.EMA(warmup_steps=3),
    "ZScore": lambda: thresholds.ZScore(warmup_steps=3),
    "Percentile": lambda: thresholds.Percentile(40.0, window=8),
    "ByPattern": lambda: thresholds.ByPattern({"*weight": thresholds.Bounded(thresholds.EMA(), 0.01), "*": CAP}),
}
FOLLOW_NORMS = {
    "EMA": lambda: thresholds.EMA(warmup_steps=3, warmup_norm=math.inf),
    "EMA at once": lambda: thresholds.EMA(warmup_steps=0),
    "ZScore": lambda: thresholds.ZScore(warmup_steps=3),
    "Percentile": lambda: thresholds.Percentile(40.0, window=8),
}
LEARN = ("Schedule", "EMA", "ZScore", "Percentile", "ByPattern")


class Model(nn.Module):
    """Two trained layers around a frozen one."""

    def __init__(self):
        super().__init__()
        self.first, self.base, self.last = nn.Linear(5, 4), nn.Linear(4, 40), nn.Linear(4, 3)
        self.base.requires_grad_(False)
        self.to(DEVICE)


def backward(model, gradients, scale=None):
    loss = sum((p * g.to(p)).sum() for p, g in zip(trained(model), gradients, strict=True))
    (loss if scale is None else scale(loss)).backward()


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def gradients_of(model, size=1.0):
    return [torch.randn(p.shape, device=DEVICE) * size for p in trained(model)]


class Way:
    """A way into the loop; ``max_norm`` is kept, for its state."""

    refused = ()  # kinds of caps

    def __init__(self, model, max_norm):
        self.model, self.max_norm = model, max_norm
        self.optimizer = torch.optim.SGD(trained(model), lr=0.0)
        self.begin()

    def step(self, gradients):
        self.model.zero_grad()
        self.take(gradients)
        return [p.grad.clone() for p in trained(self.model)]


class Function(Way):
    def begin(self):
        pass

    def take(self, gradients):
        backward(self.model, gradients)
        fused_component_clip_(self.model, self.max_norm)


class Clipper(Way):
    def begin(self):
        self.clipper = ComponentClipper(self.model, self.max_norm)

    def take(self, gradients):
        backward(self.model, gradients)
        self.clipper.clip_()


class Attached(Way):
    def begin(self):
        self.clipper = ComponentClipper(self.model, self.max_norm)
        self.handle = self.clipper.attach(self.optimizer)

    def take(self, gradients):
        backward(self.model, gradients)
        self.optimizer.step()


class Scaler(Way):
    def begin(self):
        self.clipper = ComponentClipper(self.model, self.max_norm)
        self.scaler = ComponentClipGradScaler(self.clipper, device=DEVICE, init_scale=2.0**10)

    def take(self, gradients):
        backward(self.model, gradients, self.scaler.scale)
        self.scaler.step(self.optimizer)
        self.scaler.update()


class InBackward(Way):
    refused = ("EMA", "ZScore", "Percentile", "ByPattern")  # but EMA after its warm-up

    def begin(self):
        self.handle = clip_in_backward(self.model, self.max_norm)

    def take(self, gradients):
        backward(self.model, gradients)


WAYS = [Function, Clipper, Attached, Scaler, InBackward]
every_way = pytest.mark.parametrize("way", WAYS)
every_cap = pytest.mark.parametrize("kind", CAPS)


def skip_refused(way, kind):
    if kind in way.refused:
        with pytest.raises(ValueError, match="max_norm: .* depends on all norms of a step"):
            way(Model(), (CAPS | FOLLOW_NORMS)[kind]())
        pytest.skip("refused, as it has to be")


def assert_close(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)
