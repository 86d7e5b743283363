"""Gradients of a scaled loss: inv_scale and found_inf on every backend."""

import math

import pytest
import torch

from cwclip_kernels import ComponentClipper, ComponentSpec, fused_component_clip_
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
    large = torch.full((1000,), 3e38, device=DEVICE), torch.full((10,), 65504.0, device=DEVICE).half()
    params = list(map(parameter, large))
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
