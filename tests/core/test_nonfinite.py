"""inf and NaN: each policy, inside its component alone."""

import math

import pytest
import torch

from cwclip_kernels import ComponentClipper, fused_component_clip_
from helpers import BACKENDS, DEVICE, DTYPES, copy_of, grads_of, parameters, same_bits

BAD = (math.inf, -math.inf, math.nan)


def with_one_bad(dtype, value, shapes=((100,), (33, 5), (70,))):
    """Three gradients; the second holds one bad value at a random place."""
    params = parameters(shapes, dtype)
    flat = params[1].grad.view(-1)
    flat[torch.randint(flat.numel(), ())] = value
    return params


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_propagate_does_what_torch_does(backend, dtype, value):
    params = with_one_bad(dtype, value)
    expected = copy_of(params)
    norms = fused_component_clip_(params, 0.5, backend=backend)
    torch.nn.utils.clip_grad_norm_([expected[1]], 0.5)
    torch.testing.assert_close(params[1].grad, expected[1].grad, equal_nan=True, rtol=0.0, atol=0.0)
    assert norms[1].isnan() if math.isnan(value) else norms[1] == math.inf
    assert norms[[0, 2]].isfinite().all()


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("policy", ["propagate", "zero", "skip"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_bit_of_another_component_changes(backend, policy, norm_type, value):
    params = with_one_bad(torch.float32, value)
    healthy = copy_of(params)
    healthy[1].grad = torch.ones_like(healthy[1].grad)
    bad = params[1].grad.clone()
    result = ComponentClipper(params, 0.5, norm_type, nonfinite=policy, backend=backend).clip_()
    fused_component_clip_(healthy, 0.5, norm_type, nonfinite=policy, backend=backend)
    assert same_bits(params[0].grad, healthy[0].grad)
    assert same_bits(params[2].grad, healthy[2].grad)
    if policy == "zero":
        assert same_bits(params[1].grad, torch.zeros_like(bad))
        assert result.coefs[1] == 0
    elif policy == "skip":
        assert same_bits(params[1].grad, bad)
        assert result.coefs[1] == 1
    else:
        assert result.coefs[1].isnan() if math.isnan(value) else result.coefs[1] == 0


@pytest.mark.parametrize("arguments", [{"nonfinite": "error"}, {"error_if_nonfinite": True}])
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_names_the_components_and_changes_nothing(backend, value, arguments):
    params = with_one_bad(torch.float32, value)
    names = ("first", "second", "third")
    before = grads_of(params)
    with pytest.raises(
        RuntimeError, match=r"norm of order 2 is non-finite for 1 of 3 components: 'second'\. No grad"
    ):
        fused_component_clip_(list(zip(names, params, strict=True)), 0.5, backend=backend, **arguments)
    assert all(same_bits(p.grad, b) for p, b in zip(params, before, strict=True))
    params[1].grad.fill_(1.0)
    fused_component_clip_(params, 0.5, backend=backend, **arguments)
    assert params[1].grad.norm() < 0.51


def test_error_lists_at_most_eight_components():
    params = parameters([(3,)] * 12)
    for p in params:
        p.grad.fill_(math.nan)
    with pytest.raises(RuntimeError, match="for 12 of 12 components: '0', '1', .*'7' and 4 more"):
        fused_component_clip_(params, 1.0, nonfinite="error")


@pytest.mark.parametrize("policy", ["propagate", "zero", "skip"])
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cap_of_inf_only_measures(backend, value, policy):
    params = with_one_bad(torch.float32, value)
    before = grads_of(params)
    result = ComponentClipper(params, math.inf, nonfinite=policy, backend=backend).clip_()
    assert all(same_bits(p.grad, b) for p, b in zip(params, before, strict=True))
    assert not result.clipped.any()
    assert not result.norms[1].isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_component_of_many_tiles_is_one(backend):
    """The bad value in one tensor zeroes every tensor of its component."""
    size = 200_000 if backend != "triton" or DEVICE != "cpu" else 2_000
    params = with_one_bad(torch.float32, math.nan, shapes=((size,), (10,), (size,)))
    keep = params[0].grad.clone()
    grouping = {"0": "good", "1": "bad", "2": "bad"}
    fused_component_clip_(params, 1e9, nonfinite="zero", components=lambda name, p: grouping[name], backend=backend)
    assert same_bits(params[0].grad, keep)
    assert not params[1].grad.any()
    assert not params[2].grad.any()


@pytest.mark.skipif(DEVICE == "cpu", reason="CPU caps are refused by value")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_cap_on_the_device_is_loud(backend):
    params = parameters([(3,), (3,)])
    fused_component_clip_(params, torch.tensor([-1.0, 1.0], device=DEVICE), backend=backend)
    assert params[0].grad.isnan().all()
    assert params[1].grad.isfinite().all()
