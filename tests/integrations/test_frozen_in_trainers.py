"""What is never trained, through every trainer: a base packed in uint8, and one in floats, with LoRA beside.

Nobody measures it, counts it or refuses it: caps and gradients are those of the model's own few parameters.
"""

import copy

import pytest
import torch
from torch import nn

from cwclip_kernels import ComponentClipper, thresholds
from cwclip_kernels.integrations.timm import dispatch_clip_grad
from cwclip_kernels.integrations.torchtitan import clip_grad_norm_ as torchtitans
from helpers import same_bits
from stand_ins import agc


class Lora(nn.Module):
    """A layer that stays, twice over, and two small factors that learn."""

    def __init__(self):
        super().__init__()
        self.packed = nn.Parameter(torch.randint(256, (64, 2), dtype=torch.uint8), requires_grad=False)
        self.base = nn.Linear(8, 16).requires_grad_(False)
        self.down = nn.Linear(8, 2, bias=False)
        self.up = nn.Linear(2, 16, bias=False)

    def forward(self, x, labels=None):
        loss = (self.base(x) + self.up(self.down(x))).square().mean()
        return {"loss": loss}


def inputs(number=4):
    return torch.randn(number, 3, 8)


POLICIES = {
    "ParamRelative": lambda: thresholds.ParamRelative(0.01),
    "numel": lambda: thresholds.FromGlobal(0.1, "numel"),
    "uniform": lambda: thresholds.FromGlobal(0.1, "uniform"),
    "EMA": lambda: thresholds.EMA(warmup_steps=2),
    "ZScore": lambda: thresholds.ZScore(warmup_steps=2, threshold=0.5),
    "Percentile": lambda: thresholds.Percentile(50.0),
    "Schedule": lambda: thresholds.Schedule(lambda step: 0.1 / (1 + step)),
    "number": lambda: 0.05,
}


def by_torchtitan(model, caps, data):
    steps(model, data, lambda: torchtitans(model.parameters(), caps))


def by_accelerate(model, caps, data):
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState

    from cwclip_kernels.integrations.accelerate import clip_grad_norm_

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(model)
    steps(model, data, lambda: clip_grad_norm_(accelerator, model, caps))
    AcceleratorState._reset_state(reset_partial_state=True)


def by_timm(model, caps, data):
    steps(model, data, lambda: dispatch_clip_grad(model.parameters(), caps))


def by_lightning(model, caps, data):
    pytest.importorskip("lightning")
    from cwclip_kernels.integrations.lightning import ComponentClip
    from lightning_models import Lit, trainer

    class Module(Lit):
        def training_step(self, batch, batch_idx):
            return self.model(batch)["loss"]

    lit = Module(model, lambda parameters: torch.optim.SGD([p for p in parameters if p.requires_grad], lr=0.1))
    trainer(ComponentClip(caps)).fit(lit, data)


def by_transformers(model, caps, data, mixin=True):
    pytest.importorskip("transformers")
    import tempfile

    from accelerate.state import AcceleratorState
    from transformers import Trainer

    from cwclip_kernels.integrations.transformers import ComponentClipCallback
    from hf import ClippingTrainer, arguments

    AcceleratorState._reset_state(reset_partial_state=True)
    optimizer = sgd(model)
    told = {
        "train_dataset": [{"x": x} for batch in data for x in batch],
        "optimizers": (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
    }
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(folder, max_grad_norm=0.0, per_device_train_batch_size=len(data[0]))
        if mixin:
            ClippingTrainer(model, args, component_clipping={"max_norm": caps}, **told).train()
        else:
            Trainer(model, args, callbacks=[ComponentClipCallback(caps)], **told).train()
    AcceleratorState._reset_state(reset_partial_state=True)


def by_transformers_callback(model, caps, data):
    by_transformers(model, caps, data, mixin=False)


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def steps(model, data, clip):
    optimizer = sgd(model)
    for x in data:
        model(x)["loss"].backward()
        clip()
        optimizer.step()
        optimizer.zero_grad()


WAYS = [by_torchtitan, by_accelerate, by_timm, by_lightning, by_transformers, by_transformers_callback]


@pytest.mark.filterwarnings("ignore:.*isinstance\\(treespec, LeafSpec\\)", "ignore:.*does not have many workers")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("way", WAYS)
def test_what_is_frozen_is_as_if_it_were_not_there(way, policy):
    model, data = Lora(), inputs()
    plain = copy.deepcopy(model)
    clipper = ComponentClipper([p for p in plain.parameters() if p.requires_grad], POLICIES[policy]())
    steps(plain, data, clipper.clip_)
    way(model, POLICIES[policy](), data)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0.0)
    assert not same_bits(model.up.weight, Lora().up.weight)


def test_agc_of_a_model_that_is_mostly_frozen():
    model = Lora()
    plain = copy.deepcopy(model)
    x = inputs(1)[0]
    for m in (model, plain):
        m(x)["loss"].backward()
    dispatch_clip_grad(model.parameters(), 0.01, mode="agc")
    agc([p for p in plain.parameters() if p.requires_grad], 0.01)
    for ours, theirs in ((model.up, plain.up), (model.down, plain.down)):
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-5, atol=0.0)
    assert model.base.weight.grad is None
