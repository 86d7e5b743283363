"""Equal to torch.nn.utils.clip_grad_norm_ where that can do the same."""

import math

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from cwclip_kernels import ComponentClipper, component_norms, fused_component_clip_
from helpers import (
    BACKENDS,
    DEVICE,
    DTYPES,
    FUSED,
    GRAD_TOLERANCE,
    assert_grads,
    copy_of,
    parameter,
    parameters,
    random_grad,
)

# Order 3 is composed from torch operations, which the kernels leave to others.
SERVED = [
    (backend, p)
    for backend in (None, *BACKENDS)
    for p in (2.0, 1.0, math.inf, 3.0)
    if p != 3.0 or backend not in FUSED
]
SHAPES = [(30, 20), (20,), (), (5, 4, 3), (1,)]


def in_float64(params):
    """The same gradients for torch's function, whose own float32 sums are off by more than 1e-6 on some inputs."""
    return [parameter(p.grad.double()) for p in params]


@pytest.mark.parametrize(("backend", "norm_type"), SERVED)
@pytest.mark.parametrize("max_norm", [0.05, 1.0, 30.0, 1e5, 0.0])
def test_parameter_is_the_loop_over_parameters(backend, max_norm, norm_type):
    params = parameters(SHAPES)
    expected = in_float64(params)
    norms = fused_component_clip_(params, max_norm, norm_type, backend=backend)
    loop = torch.stack([clip_grad_norm_(p, max_norm, norm_type) for p in expected])
    torch.testing.assert_close(norms.double(), loop, rtol=1e-6, atol=0.0)
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p.grad.double(), e.grad, rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize(("backend", "norm_type"), SERVED)
@pytest.mark.parametrize("max_norm", [0.05, 1.0, 1e5])
def test_all_is_one_clip_over_everything(backend, max_norm, norm_type):
    params = parameters(SHAPES)
    expected = in_float64(params)
    norm = fused_component_clip_(params, max_norm, norm_type, components="all", backend=backend)
    total = clip_grad_norm_(expected, max_norm, norm_type)
    torch.testing.assert_close(norm[0].double(), total, rtol=1e-6, atol=0.0)
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p.grad.double(), e.grad, rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_less_exact_than_torch(backend, dtype):
    """Against float64, at most twice torch's own error at that dtype, plus one rounding."""
    params = parameters([(64, 48), (500,)], dtype)
    torch_way, exact = copy_of(params), [p.grad.double() for p in params]
    fused_component_clip_(params, 0.3, backend=backend)
    for p, t, grad in zip(params, torch_way, exact, strict=True):
        clip_grad_norm_(t, 0.3)
        truth = grad * (0.3 / (grad.norm() + 1e-6))
        ours, theirs = ((x.grad.double() - truth).abs().max() for x in (p, t))
        rtol, atol = GRAD_TOLERANCE[dtype]
        assert ours <= 2 * theirs + rtol * truth.abs().max() + atol


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["float", "scalar", "vector", "mapping"])
def test_every_form_of_cap(backend, form):
    params = parameters([(9, 8), (7,), (11,)], scale=2.0)
    names = ("a.weight", "a.bias", "b.weight")
    per_component = [0.1, 0.4, 0.1]
    max_norm = {
        "float": 0.1,
        "scalar": torch.tensor(0.1, dtype=torch.float64, device=DEVICE),
        "vector": torch.tensor(per_component, device=DEVICE),
        "mapping": {"*.bias": 0.4, "a.*": 0.1},
    }[form]
    expected_caps = {"vector": per_component, "mapping": [0.1, 0.4, math.inf]}.get(form, [0.1] * 3)
    expected = copy_of(params)
    fused_component_clip_(list(zip(names, params, strict=True)), max_norm, backend=backend)
    for p, cap in zip(expected, expected_caps, strict=True):
        if math.isfinite(cap):
            clip_grad_norm_(p, cap)
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p.grad, e.grad, rtol=2e-6, atol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_live_cap_is_read_at_every_call(backend):
    params = parameters([(30,), (40,)])
    cap = torch.tensor(1.0, device=DEVICE)
    clipper = ComponentClipper(params, cap, backend=backend)
    for value in (1.0, 0.25, 0.5):
        cap.fill_(value)
        for p in params:
            p.grad = random_grad(p.shape, scale=3.0)
        clipper.clip_()
        torch.testing.assert_close(
            component_norms(params), torch.full((2,), value, device=DEVICE), rtol=1e-5, atol=0.0
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_names_and_count_do_not_depend_on_which_gradients_exist(backend):
    params = parameters([(3,), (4,), (5,)])
    params[1].grad = None
    expected = copy_of(params)
    result = ComponentClipper(params, 0.1, backend=backend).clip_()
    assert result.names == ("0", "1", "2")
    assert result.norms[1] == 0
    assert result.coefs[1] == 1
    for e in (expected[0], expected[2]):
        clip_grad_norm_(e, 0.1)
    assert params[1].grad is None
    assert_grads(params, expected)


def test_no_gradients_and_no_parameters():
    params = [parameter(None, (3,)), parameter(None, (2, 2))]
    norms = fused_component_clip_(params, 1.0)
    assert norms.tolist() == [0.0, 0.0]
    assert norms.dtype == torch.float32
    assert norms.device.type == DEVICE
    assert fused_component_clip_([], 1.0).shape == (0,)
    assert fused_component_clip_(torch.nn.ReLU(), 1.0).shape == (0,)
    assert fused_component_clip_(params, 1.0, error_if_nonfinite=True).tolist() == [0.0, 0.0]
    left_alone = parameters([(3,)])
    assert fused_component_clip_(left_alone, 1e-3, components=lambda name, p: None).shape == (0,)
    assert left_alone[0].grad.norm() > 1e-3


def test_training_goes_as_with_the_loop():
    """Five steps of a small model, clipped either way: the same weights."""

    def train(clip):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2)).to(DEVICE)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(5):
            x = torch.randn(32, 8).to(DEVICE)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            clip(model)
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    ours = train(lambda model: fused_component_clip_(model, 0.05))
    loop = train(lambda model: [clip_grad_norm_(p, 0.05) for p in model.parameters()])
    for a, b in zip(ours, loop, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
