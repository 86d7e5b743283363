"""The mathematics, on whatever hypothesis comes up with."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cwclip_kernels import ComponentClipper, component_norms, fused_component_clip_
from helpers import (
    BACKENDS,
    DEVICE,
    DTYPES,
    GRAD_TOLERANCE,
    copy_of,
    float64_norm,
    grads_of,
    parameter,
    parameters,
    same_bits,
)

shapes = st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=6)
orders = st.sampled_from([1.0, 2.0, math.inf])
caps = st.floats(0.0, 50.0)
groupings = st.sampled_from(["parameter", "all"])


def examples(backend):
    # The interpreter takes milliseconds for each program of a kernel.
    return settings(max_examples=5 if backend == "triton" and DEVICE == "cpu" else 30, deadline=None, database=None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_norms_respect_the_cap_and_below_it_no_bit_changes(backend, dtype):
    @examples(backend)
    @given(shapes, orders, caps, groupings, st.integers(0, 2**31))
    def check(shapes, p, cap, grouping, seed):
        torch.manual_seed(seed)
        params = parameters(shapes, dtype)
        before = grads_of(params)
        result = ComponentClipper(params, cap, p, components=grouping, backend=backend).clip_()
        members = [[i] for i in range(len(params))] if grouping == "parameter" else [list(range(len(params)))]
        rtol, atol = GRAD_TOLERANCE[dtype]
        for own, norm, coef in zip(members, result.norms, result.coefs, strict=True):
            after = float64_norm([params[i].grad for i in own], p)
            slack = atol * sum(params[i].numel() for i in own)
            assert after <= cap * (1 + rtol) + slack
            if norm.double() + 1e-6 <= cap:
                assert coef == 1
                assert all(same_bits(params[i].grad, before[i]) for i in own)
            else:
                assert 0 <= coef <= 1
                assert abs(after - norm.double().cpu() * coef.double().cpu()) <= rtol * max(after, 1e-30) + slack

    check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_clipping_twice_is_clipping_once(backend):
    """Up to eps: the first clip aims at cap * norm / (norm + eps), which the second finds eps below the cap."""
    params = parameters([(50,), (7, 9), (1,)])
    cap = 0.5
    fused_component_clip_(params, cap, backend=backend)
    once = copy_of(params)
    fused_component_clip_(params, cap, backend=backend)
    for a, b in zip(params, once, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6 / cap + 1e-6, atol=0.0)
    fused_component_clip_(once, cap + 2e-6, backend=backend)
    fused_component_clip_(params, cap + 2e-6, backend=backend)
    snapshot = grads_of(params)
    fused_component_clip_(params, cap + 2e-6, backend=backend)
    assert all(same_bits(p.grad, s) for p, s in zip(params, snapshot, strict=True))


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_same_inputs_same_bits(backend, dtype, norm_type):
    count = 300_000 if backend != "triton" or DEVICE != "cpu" else 3_000
    params = parameters([(count,), (count // 3, 2), (17,)], dtype)
    twins = [copy_of(params) for _ in range(3)]
    first = ComponentClipper(params, 0.1, norm_type, components="all", backend=backend).clip_()
    for twin in twins:
        again = ComponentClipper(twin, 0.1, norm_type, components="all", backend=backend).clip_()
        assert same_bits(first.norms, again.norms)
        assert same_bits(first.coefs, again.coefs)
        assert all(same_bits(a.grad, b.grad) for a, b in zip(params, twin, strict=True))


@pytest.mark.skipif(DEVICE != "cpu", reason="about CPU threads")
@pytest.mark.usefixtures("needs_extension")
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_whatever_the_number_of_threads_and_the_alignment(dtype):
    params = parameters([(500_000,), (3,), (90_001,), (250, 1000)], dtype)
    threads = torch.get_num_threads()
    seen = []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            shifted = [parameter(torch.cat([p.grad.new_zeros(count), p.grad.view(-1)])[count:]) for p in params]
            for s, p in zip(shifted, params, strict=True):
                s.grad = torch.cat([p.grad.new_zeros(count), p.grad.view(-1)])[count:]
            seen.append((fused_component_clip_(shifted, 0.2, components="all", backend="cpu"), grads_of(shifted)))
    finally:
        torch.set_num_threads(threads)
    for norms, grads in seen[1:]:
        assert same_bits(norms, seen[0][0])
        assert all(same_bits(a, b) for a, b in zip(grads, seen[0][1], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("raises", [False, True])  # the fused path and the one in two passes
def test_zero_cap_zeroes_and_zero_gradient_stays(backend, eps, raises):
    params = [*parameters([(10,), (3, 4)]), parameter(torch.zeros(5, device=DEVICE)), parameter(None)]
    params[2].grad[1] = -0.0
    result = ComponentClipper(params, 0.0, 2.0, raises, eps=eps, backend=backend).clip_()
    assert all(not p.grad.any() for p in params[:3])
    assert result.coefs.tolist() == [0.0, 0.0, 1.0, 1.0]
    assert torch.signbit(params[2].grad[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_scaling_gradients_scales_norms(backend):
    params = parameters([(40,), (8, 8)])
    norms = component_norms(params, backend=backend)
    for p in params:
        p.grad.mul_(8.0)  # a power of two: exact
    assert torch.equal(component_norms(params, backend=backend), norms * 8.0)
