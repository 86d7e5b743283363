"""Situations in which something was silently wrong once, one by one."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from cwclip_kernels import ComponentClipper, component_norms, fused_component_clip_, thresholds
from helpers import DEVICE, same_bits
from ways import CAP, Model, backward, gradients_of, trained


@pytest.mark.parametrize("split", ["uniform", "numel"])
def test_a_budget_of_a_model_without_shapes_yet(split):
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(3)).to(DEVICE)
    clipper = ComponentClipper(model, thresholds.FromGlobal(1.0, split))
    assert component_norms(model).tolist() == [0.0] * 4
    model(torch.randn(8, 5, device=DEVICE)).square().sum().backward()
    for p in model.parameters():
        p.grad = torch.full_like(p, 100.0)
    clipper.clip_()
    norms = torch.stack([p.grad.norm() for p in model.parameters()])
    assert norms.norm().item() == pytest.approx(1.0, rel=1e-4)
    if split == "numel":  # and again when shapes change under the same parameters
        model[0].weight.data = torch.zeros(4, 1, device=DEVICE)
        model[0].weight.grad = None
        for p in model.parameters():
            p.grad = torch.full_like(p, 100.0)
        expected = thresholds.FromGlobal(1.0, split)
        assert same_bits(clipper.clip_().caps, ComponentClipper(model, expected).clip_().caps)


def test_frozen_and_unfrozen_between_compiled_steps():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).to(DEVICE)
    model[0].requires_grad_(False)
    clipper = ComponentClipper(model, thresholds.FromGlobal(1.0))
    step = torch.compile(lambda: clipper.clip_().caps, backend="eager", fullgraph=True)
    backward(model, gradients_of(model, 10.0))
    step()
    model[0].requires_grad_(True)
    model.zero_grad()
    backward(model, gradients_of(model, 10.0))
    with pytest.raises(Exception, match="frozen or unfrozen since"):  # one of Dynamo's, around ours
        step()
    clipper.clip_()
    assert step().tolist() == pytest.approx([0.5] * 4)


def test_shallow_copies_of_a_threshold_have_caps_of_their_own():
    model = Model()
    backward(model, gradients_of(model))
    first = thresholds.Schedule(lambda step: 1.0 / (1 + step))
    ComponentClipper(model, first).clip_()
    second = copy.copy(first)
    second.at(0)
    clipper = ComponentClipper(model, second)
    first.at(5)
    assert clipper.clip_().caps.item() == 1.0
    first = thresholds.FromGlobal(1.0)
    clippers = [ComponentClipper(model, first)]
    before = clippers[0].clip_().caps.clone()
    other = Model()
    other.first.requires_grad_(False)
    ComponentClipper(other, copy.copy(first)).clip_()
    assert same_bits(clippers[0].clip_().caps, before)


@pytest.mark.parametrize("backend", [None, "foreach", "reference"])
def test_gradients_that_come_to_share_memory(backend):
    a, b = (nn.Parameter(torch.zeros(4, device=DEVICE)) for _ in range(2))
    clipper = ComponentClipper([a, b], 0.1, backend=backend)
    for p in (a, b):
        p.grad = torch.ones(4, device=DEVICE)
    clipper.clip_()
    both = torch.ones(6, device=DEVICE)
    a.grad, b.grad = both[:4], both[2:]
    with pytest.raises(ValueError, match="the gradients of '0' and '1' share memory"):
        clipper.clip_()
    assert both.tolist() == [1.0] * 6
    assert component_norms([a, b], backend=backend).tolist() == [2.0, 2.0]


@pytest.mark.parametrize("backend", [None, "foreach", "reference"])
def test_a_gradient_made_in_inference_mode(backend):
    a, b = (nn.Parameter(torch.zeros(4, device=DEVICE)) for _ in range(2))
    a.grad = torch.ones(4, device=DEVICE)
    with torch.inference_mode():
        b.grad = torch.ones(4, device=DEVICE)
    with pytest.raises(ValueError, match="the gradient of '1' was made in inference mode"):
        fused_component_clip_([a, b], 0.1, backend=backend)
    assert a.grad.tolist() == [1.0] * 4


def test_caps_of_a_policy_of_your_own_are_looked_at():
    class Mine(thresholds.Threshold):
        def caps(self, device, norms):
            return self.made(device)

    model = Model()
    for made in (
        lambda device: torch.ones((), device=device),
        lambda device: torch.ones(1, dtype=torch.float64, device=device),
        lambda device: torch.ones(12, dtype=torch.float64, device=device)[::2],
        lambda device: 1.0,
    ):
        threshold = Mine()
        threshold.made = made
        model.zero_grad()
        backward(model, gradients_of(model))
        before = [p.grad.clone() for p in trained(model)]
        with pytest.raises(TypeError, match=r"max_norm: caps\(\) of .*Mine has to return a contiguous torch.float64"):
            ComponentClipper(model, threshold).clip_()
        assert all(same_bits(p.grad, g) for p, g in zip(trained(model), before, strict=True))


@pytest.mark.usefixtures("own_garbage")
def test_the_functions_cache_keeps_no_threshold_alive():
    model = Model()
    held = nn.Linear(1, 1)
    threshold = thresholds.Schedule(lambda step, held=held: float(held.out_features))
    backward(model, gradients_of(model))
    fused_component_clip_(model, threshold)
    fused_component_clip_(list(model.named_parameters()), threshold)
    watch = weakref.ref(held)
    del held, threshold
    gc.collect()
    assert watch() is None


@pytest.mark.usefixtures("own_garbage")
def test_a_model_copy_that_never_clips_keeps_nothing_of_the_first():
    model = Model()
    model.clipper = ComponentClipper(model, thresholds.EMA())
    kept = copy.deepcopy(model)
    watch = weakref.ref(model)
    del model
    gc.collect()
    assert watch() is None
    assert kept.clipper.names


def test_a_clipper_pickled_without_its_model():
    model = Model()
    alone = pickle.loads(pickle.dumps(ComponentClipper(model, CAP)))
    backward(model, gradients_of(model))
    with pytest.warns(UserWarning, match="none has a gradient, and this clipper was unpickled"):
        alone.clip_()
    alone.clip_()
