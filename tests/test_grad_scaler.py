"""``ComponentClipGradScaler`` against torch's own scaler, unscaling and the loop."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

from cwclip_kernels import ComponentClipGradScaler, ComponentClipper, thresholds
from helpers import DEVICE, parameter, random_grad, same_bits

CAP = 0.05


def model_of():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).to(DEVICE)


OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "fused": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
}


def scaler_options():
    return {"device": DEVICE, "init_scale": 2.0**10, "growth_interval": 3}


def train(model, optimizer, scaler, steps, after_backward=lambda: None, explicit=False):
    """Scales and parameters after every step; some gradients overflow."""
    scales, states = [], []
    generator = torch.Generator().manual_seed(5)
    for step in range(steps):
        optimizer.zero_grad()
        x = torch.randn(4, 6, generator=generator).to(DEVICE)
        scaler.scale(model(x).square().sum()).backward()
        if step in (2, 7):
            model[0].weight.grad[1, 2] = math.inf if step == 2 else math.nan
        if explicit:
            scaler.unscale_(optimizer)
        after_backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        states.append([p.detach().clone() for p in model.parameters()])
    return scales, states


def torch_loop(model, scaler, optimizer):
    def clip():
        scaler.unscale_(optimizer)
        for p in model.parameters():
            torch.nn.utils.clip_grad_norm_([p], CAP)

    return clip


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_scaler_does_what_unscaling_and_the_loop_do(kind, explicit):
    model = model_of()
    twin = copy.deepcopy(model)
    theirs = GradScaler(**scaler_options())
    optimizer = OPTIMIZERS[kind](twin.parameters())
    scales, states = train(twin, optimizer, theirs, 12, torch_loop(twin, theirs, optimizer))
    seen = []
    ours = ComponentClipGradScaler(ComponentClipper(model, CAP), **scaler_options(), on_clip=seen.append)
    found = train(model, OPTIMIZERS[kind](model.parameters()), ours, 12, explicit=explicit)
    assert found[0] == scales
    assert scales[2] < scales[1]  # it shrank, and grew again
    assert max(scales[3:]) > scales[2]
    for own, wanted in zip(found[1], states, strict=True):
        for a, b in zip(own, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert len(seen) == 12
    assert seen[-1] is ours.last
    assert ours.state_dict() == theirs.state_dict()


def test_caps_are_for_unscaled_gradients():
    """Clipped while they are scaled, as in the paper's trainer, gradients are cut 65,536 times too short."""
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = ComponentClipGradScaler(ComponentClipper(model, CAP), device=DEVICE)
    # A loss so large that the gradient is, too: large inputs would saturate tanh now and then.
    scaler.scale(model(torch.randn(4, 6, device=DEVICE)).add(10.0).square().sum()).backward()
    wrong = parameter(model[0].weight.grad.clone())
    torch.nn.utils.clip_grad_norm_([wrong], CAP)
    scaler.step(optimizer)
    assert model[0].weight.grad.norm().item() == pytest.approx(CAP, rel=1e-4)
    assert (wrong.grad / 65536).norm().item() == pytest.approx(CAP / 65536, rel=1e-4)


def test_a_second_unscale_is_refused():
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = ComponentClipGradScaler(ComponentClipper(model, CAP), **scaler_options())
    scaler.scale(model(torch.randn(4, 6, device=DEVICE)).sum()).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=r"after step\(\)"):
        scaler.unscale_(optimizer)


def test_disabled_it_still_clips_once():
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    calls = []
    scaler = ComponentClipGradScaler(ComponentClipper(model, CAP), device=DEVICE, enabled=False, on_clip=calls.append)
    for _ in range(2):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(4, 6, device=DEVICE) * 50).square().sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert all(p.grad.norm() <= CAP * 1.0001 for p in model.parameters())
    assert len(calls) == 2


@pytest.mark.parametrize("set_to_none", [True, False])
def test_disabled_it_clips_the_gradients_of_a_later_pass(set_to_none):
    """After a step that the loop has left out between unscale_() and step()."""
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = ComponentClipGradScaler(ComponentClipper(model, 0.1), device="cpu", enabled=False)

    def backward():
        (model(torch.tensor([[3.0, 4.0]])).sum()).backward()

    backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.unscale_(optimizer)
    optimizer.zero_grad(set_to_none=set_to_none)
    backward()
    scaler.step(optimizer)
    scaler.update()
    assert model.weight.grad.norm().item() == pytest.approx(0.1, rel=1e-4)


def test_two_optimizers_and_what_is_not_clipped():
    model, twin = model_of(), None
    twin = copy.deepcopy(model)
    clipped = [(n, p) for n, p in model.named_parameters() if n != "2.bias"]
    scaler = ComponentClipGradScaler(ComponentClipper(clipped, CAP), **scaler_options())
    theirs = GradScaler(**scaler_options())
    for m, s in ((model, scaler), (twin, theirs)):
        torch.manual_seed(1)
        one, two = torch.optim.SGD(m[0].parameters(), lr=0.1), torch.optim.SGD(m[2].parameters(), lr=0.1)
        for step in range(4):
            m.zero_grad()
            s.scale(m(torch.randn(4, 6).to(DEVICE)).square().sum()).backward()
            if step == 1:
                m[2].bias.grad.fill_(math.inf)  # found though it isn't clipped
            if s is theirs:
                s.unscale_(one)
                s.unscale_(two)
                for name, p in m.named_parameters():
                    if name != "2.bias":
                        torch.nn.utils.clip_grad_norm_([p], CAP)
            s.step(one)
            s.step(two)
            s.update()
    assert scaler.get_scale() == theirs.get_scale()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", ["0.weight", "2.bias"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_no_optimizer_steps_where_something_is_not_finite(kind, bad):
    """Whether it is among what is clipped or among the rest, 2.bias."""
    model = model_of()
    clipped = [(n, p) for n, p in model.named_parameters() if n != "2.bias"]
    optimizer = OPTIMIZERS[kind](model.parameters())
    scaler = ComponentClipGradScaler(ComponentClipper(clipped, CAP), **scaler_options())
    scaler.scale(model(torch.randn(4, 6, device=DEVICE)).square().sum()).backward()
    dict(model.named_parameters())[bad].grad.view(-1)[0] = math.inf
    before = [p.detach().clone() for p in model.parameters()]
    scaler.step(optimizer)
    scaler.update()
    assert all(same_bits(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert scaler.get_scale() == 2.0**9


@pytest.mark.parametrize("enabled", [False, True])
def test_an_optimizer_of_which_nothing_is_clipped_is_only_unscaled(enabled):
    model, seen = model_of(), []
    clipper = ComponentClipper(model[0], CAP)
    scaler = ComponentClipGradScaler(clipper, **scaler_options(), enabled=enabled, on_clip=seen.append)
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.0) for part in (model[0], model[2])]
    x = torch.randn(4, 6, device=DEVICE)
    expected = torch.autograd.grad(model(x).square().sum(), model[2].weight)[0]
    scaler.scale(model(x).square().sum()).backward()
    for optimizer in optimizers:
        scaler.step(optimizer)
    assert len(seen) == 1
    assert scaler.last is seen[0]
    torch.testing.assert_close(model[2].weight.grad, expected)


def test_float16_gradients_are_refused_as_torch_does():
    p = parameter(random_grad((3,), torch.float16))
    before = p.grad.clone()
    optimizer = torch.optim.SGD([p], lr=0.1)
    scaler = ComponentClipGradScaler(ComponentClipper([p], CAP), device=DEVICE)
    scaler.scale(torch.ones((), device=DEVICE))
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.unscale_(optimizer)
    assert same_bits(p.grad, before)


def test_scaler_arguments(monkeypatch):
    model = model_of()
    with pytest.raises(TypeError, match="clipper: expected a ComponentClipper, not Sequential"):
        ComponentClipGradScaler(model, DEVICE)
    with pytest.raises(ValueError, match="clipper: raises for non-finite norms"):
        ComponentClipGradScaler(ComponentClipper(model, CAP, error_if_nonfinite=True), DEVICE)
    monkeypatch.setattr(GradScaler, "_unscale_grads_", lambda self, optimizer: {})
    with pytest.raises(RuntimeError, match=r"isn't made for the GradScaler of torch .* scaler.unscale_\(optimizer\)"):
        ComponentClipGradScaler(ComponentClipper(model, CAP), DEVICE)


def test_the_clipper_can_be_read():
    model = torch.nn.Linear(2, 1)
    clipper = ComponentClipper(model, thresholds.EMA())
    scaler = ComponentClipGradScaler(clipper, device="cpu")
    assert scaler.clipper is clipper
    with pytest.raises(AttributeError):
        scaler.clipper = clipper
    twin = copy.deepcopy(scaler)
    assert twin.clipper is not clipper
    assert twin.clipper.max_norm is not clipper.max_norm
    twin.clipper.load_state_dict(clipper.state_dict())
