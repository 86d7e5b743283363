"""Gradients of a scaled loss: inv_scale and found_inf on every backend; the GradScaler against torch's own."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

from cwclip_kernels import ComponentClipGradScaler, ComponentClipper, ComponentSpec, fused_component_clip_
from helpers import (
    BACKENDS,
    DEVICE,
    DTYPES,
    assert_grads,
    assert_norms,
    copy_of,
    parameter,
    parameters,
    random_grad,
    same_bits,
)

SHAPES = [(33,), (129, 3), (), (0,), (70_001,)]
INTERPRETED = [(33,), (12, 3), (), (0,)]


def shapes(backend):
    return INTERPRETED if backend == "triton" and DEVICE == "cpu" else SHAPES


def flag():
    return torch.zeros((), device=DEVICE)


def unscaled_first(params, inv_scale):
    """What torch does: every gradient times inv_scale, rounded to its dtype."""
    copies = copy_of(params)
    for p in copies:
        p.grad.mul_(inv_scale)
    return copies


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, 3.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_the_same_as_unscaling_first(backend, dtype, norm_type):
    if backend in ("cpu", "cuda", "triton") and norm_type == 3.0:
        pytest.skip("no kernel of that order")
    # A power of two, as GradScaler's: unscaling is exact.
    params = parameters(shapes(backend), dtype, scale=64.0)
    expected = unscaled_first(params, 2.0**-6)
    found = flag()
    norms = fused_component_clip_(params, 0.7, norm_type, inv_scale=2.0**-6, found_inf=found, backend=backend)
    wanted = fused_component_clip_(expected, 0.7, norm_type, backend="reference")
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    assert_norms(norms, wanted, exact)
    assert_grads(params, expected, exact)
    assert found == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_scale_given_in_any_way(backend):
    for inv_scale in (
        0.3,
        torch.tensor(0.3),
        torch.tensor([0.3], dtype=torch.float64, device=DEVICE),
        torch.tensor(0.3, device=DEVICE),
    ):
        params = parameters([(33,), (4, 5)])
        expected = unscaled_first(params, float(inv_scale))
        clipper = ComponentClipper(params, 1.5, backend=backend)
        result = clipper.clip_(inv_scale=inv_scale)
        wanted = ComponentClipper(expected, 1.5, backend="reference").clip_()
        torch.testing.assert_close(result.norms, wanted.norms)
        torch.testing.assert_close(result.coefs, wanted.coefs)
        for p, e in zip(params, expected, strict=True):
            torch.testing.assert_close(p.grad, e.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_below_the_cap_it_only_unscales(backend):
    params = parameters([(33,), (4, 5)], torch.bfloat16)
    expected = unscaled_first(params, 0.25)
    result = ComponentClipper(params, math.inf, backend=backend).clip_(inv_scale=0.25)
    assert (result.coefs == 1).all()
    assert all(same_bits(p.grad, e.grad) for p, e in zip(params, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scale_of_one_writes_nothing(backend):
    params = parameters([(33,), (4, 5)])
    before = [p.grad.clone() for p in params]
    fused_component_clip_(params, math.inf, inv_scale=torch.ones((), device=DEVICE), backend=backend)
    assert all(same_bits(p.grad, b) for p, b in zip(params, before, strict=True))


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, 0.0, 0.5, -1.0, -math.inf, 7.0])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_found_inf_finds_what_is_not_finite(backend, bad, norm_type):
    if backend in ("cpu", "cuda", "triton") and norm_type not in (2.0, 1.0, math.inf):
        pytest.skip("no kernel of that order")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        params = parameters([(40,), (3, 5), (7,)], dtype)
        found = flag()
        fused_component_clip_(params, math.inf, norm_type, found_inf=found, backend=backend)
        assert found == 0
        params[1].grad[2, 4] = bad
        fused_component_clip_(params, 0.1, norm_type, inv_scale=0.5, found_inf=found, backend=backend)
        assert found == 1
        # What was found before stays found.
        fused_component_clip_(params[:1], 0.1, norm_type, found_inf=found, backend=backend)
        assert found == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_finite_values_are_no_inf(backend):
    found = flag()
    params = [parameter(torch.full((1000,), 3e38)), parameter(torch.full((10,), 65504.0).half())]
    norms = fused_component_clip_(params, 1.0, inv_scale=2.0**-100, found_inf=found, backend=backend)
    assert found == 0
    assert norms[0].item() == pytest.approx(3e38 * 2.0**-100 * math.sqrt(1000), rel=1e-6)


@pytest.mark.parametrize("policy", ["propagate", "zero", "skip"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_policies_with_a_scale(backend, policy):
    params = parameters([(8,), (5,)])
    params[0].grad[3] = math.nan
    expected = unscaled_first(params, 0.5)
    fused_component_clip_(params, 0.1, nonfinite=policy, inv_scale=0.5, backend=backend)
    fused_component_clip_(expected, 0.1, nonfinite=policy, backend="reference")
    assert_grads(params, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_error_changes_nothing(backend):
    params = parameters([(8,), (5,)])
    params[0].grad[3] = math.nan
    before, found = [p.grad.clone() for p in params], flag()
    with pytest.raises(RuntimeError, match="non-finite for 1 of 2"):
        fused_component_clip_(params, 0.1, error_if_nonfinite=True, inv_scale=0.5, found_inf=found, backend=backend)
    assert all(same_bits(p.grad, b) for p, b in zip(params, before, strict=True))
    assert found == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_sparse_complex_and_sliced(backend):
    sparse = torch.sparse_coo_tensor([[0, 2, 0]], torch.randn(3, 4) * 8, (5, 4), check_invariants=True).to(DEVICE)
    for extra in (sparse, random_grad((6, 2), torch.complex64, 8.0)):
        params = [parameter(random_grad((6, 3), scale=8.0)), parameter(extra)]
        expected = unscaled_first(params, 0.125)
        spec = ComponentSpec().split("0", 2)
        found = flag()
        norms = fused_component_clip_(params, 0.5, components=spec, inv_scale=0.125, found_inf=found, backend=backend)
        wanted = fused_component_clip_(expected, 0.5, components=spec, backend="reference")
        torch.testing.assert_close(norms, wanted)
        for p, e in zip(params, expected, strict=True):
            torch.testing.assert_close(
                p.grad.to_dense() if p.grad.is_sparse else p.grad, e.grad.to_dense() if e.grad.is_sparse else e.grad
            )
        assert found == 0


def test_left_alone_keeps_its_scale():
    params = parameters([(3,), (4,)])
    before = params[1].grad.clone()
    named = [("a", params[0]), ("b", params[1])]
    fused_component_clip_(named, 0.1, components=lambda name, p: name if name == "a" else None, inv_scale=0.5)
    assert same_bits(params[1].grad, before)


def test_compiled():
    params = parameters([(6,), (3, 2)], scale=64.0)
    twins = copy_of(params)
    found, other = flag(), flag()
    inverse = torch.tensor(1 / 64, device=DEVICE)
    torch._dynamo.reset()
    step = torch.compile(
        lambda: fused_component_clip_(params, 0.5, inv_scale=inverse, found_inf=found),
        backend="aot_eager",
        fullgraph=True,
    )
    for bad in (False, True):
        if bad:
            params[0].grad[2] = math.inf
            twins[0].grad[2] = math.inf
        norms = step()
        wanted = fused_component_clip_(twins, 0.5, inv_scale=inverse, found_inf=other)
        assert same_bits(norms, wanted)
        assert found == other == float(bad)
        assert all(same_bits(p.grad, t.grad) for p, t in zip(params, twins, strict=True))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"inv_scale": 0.0}, ValueError, "inv_scale: expected a finite number > 0, not 0"),
        ({"inv_scale": -1.0}, ValueError, "inv_scale"),
        ({"inv_scale": math.inf}, ValueError, "inv_scale"),
        ({"inv_scale": math.nan}, ValueError, "inv_scale"),
        ({"inv_scale": True}, TypeError, "inv_scale: .* not bool"),
        ({"inv_scale": "2"}, TypeError, "inv_scale: .* not str"),
        ({"inv_scale": torch.tensor(-1.0)}, ValueError, "inv_scale: expected a finite number > 0, not -1"),
        ({"inv_scale": torch.tensor(math.nan)}, ValueError, "inv_scale"),
        ({"inv_scale": torch.ones(2)}, ValueError, r"inv_scale: expected one element, not shape \[2\]"),
        ({"inv_scale": torch.ones((), dtype=torch.int64)}, TypeError, "inv_scale: expected a floating-point tensor"),
        ({"inv_scale": torch.ones((), device="meta")}, ValueError, "inv_scale: is on the meta device"),
        ({"found_inf": 0.0}, TypeError, "found_inf: expected a Tensor of one element or None, not float"),
        ({"found_inf": torch.zeros(3)}, ValueError, "found_inf: expected one element"),
        ({"found_inf": torch.zeros((), dtype=torch.bool)}, TypeError, "found_inf: expected a floating-point tensor"),
    ],
)
def test_arguments(arguments, error, message):
    params = parameters([(3,)])
    before = params[0].grad.clone()
    for call in (
        lambda: fused_component_clip_(params, 0.1, **arguments),
        lambda: ComponentClipper(params, 0.1).clip_(**arguments),
    ):
        with pytest.raises(error, match=message):
            call()
    assert same_bits(params[0].grad, before)


# ------------------------------------------------------------------------------------------------------------
# ComponentClipGradScaler
# ------------------------------------------------------------------------------------------------------------

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
    scaler.scale(model(torch.randn(4, 6, device=DEVICE) * 50).square().sum()).backward()
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
