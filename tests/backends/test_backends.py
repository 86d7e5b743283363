"""Every backend x dtype x order x layout against the definition, and the definition against float64."""

import math

import pytest
import torch

from cwclip_kernels import ComponentClipper, component_norms, fused_component_clip_
from cwclip_kernels.optim import ComponentClipAdamW
from helpers import (
    BACKENDS,
    DEVICE,
    DTYPES,
    FUSED,
    assert_grads,
    assert_norms,
    copy_of,
    float64_norm,
    grads_of,
    parameter,
    parameters,
    random_grad,
    same_bits,
)

TESTED = tuple(b for b in BACKENDS if b != "reference")
ORDERS = (2.0, 1.0, math.inf)

# Around the vector width (8, 32, 64 elements a step) and a tile of the CPU kernel (32 Ki floats, 64 Ki halves),
# nothing at all, a scalar; matrices and a convolution for the layouts.
SIZES = [(0,), (), (1,), (7,), (8,), (9,), (31,), (33,), (64,), (65,), (3, 0, 2), (129, 3), (17, 5, 3, 3)]
LARGE = [(32767,), (32768,), (32769,), (65535,), (65537,), (131072 + 3,), (300, 1000)]


def check(params, backend, max_norm=0.7, norm_type=2.0, **more):
    """One clip by this backend and by the reference: same norms, same gradients."""
    expected = copy_of(params)
    norms = fused_component_clip_(params, max_norm, norm_type, backend=backend, **more)
    expected_norms = fused_component_clip_(expected, max_norm, norm_type, backend="reference", **more)
    dtypes = {p.grad.dtype for p in params if p.grad is not None} or {torch.float32}
    assert norms.dtype == expected_norms.dtype
    # A component of several dtypes is as exact as the least of them.
    exact = torch.float64 if dtypes == {torch.float64} else torch.float32
    assert_norms(norms, expected_norms, exact)
    assert_grads(params, expected, exact)
    return norms


@pytest.mark.parametrize("norm_type", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", TESTED)
def test_small_sizes(backend, dtype, norm_type):
    check(parameters(SIZES, dtype), backend, norm_type=norm_type)


@pytest.mark.parametrize("norm_type", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", [b for b in TESTED if b != "triton" or DEVICE != "cpu"])
def test_sizes_around_a_tile(backend, dtype, norm_type):
    check(parameters(LARGE, dtype), backend, norm_type=norm_type)


@pytest.mark.parametrize("norm_type", [3.0, 0.5, 0.0, -1.0, -math.inf, 2.5])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64])
def test_other_orders_are_composed_from_torch(dtype, norm_type):
    params = parameters(SIZES, dtype)
    norms = check(params, None, norm_type=norm_type)
    # An empty gradient has no norm of these orders in torch; here it is 0, as without gradient.
    assert norms[0] == 0


@pytest.mark.parametrize("norm_type", [*ORDERS, 3.0])
def test_the_definition_against_float64(norm_type):
    params = parameters(LARGE)
    grads = grads_of(params)
    expected = torch.stack([float64_norm([g], norm_type) for g in grads])
    assert_norms(fused_component_clip_(params, 2.0, norm_type, backend="reference").cpu(), expected, torch.float32)
    for p, grad, norm in zip(params, grads, expected, strict=True):
        coef = min(1.0, 2.0 / (norm.item() + 1e-6))
        torch.testing.assert_close(p.grad.double(), grad.double() * coef, rtol=3e-7, atol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes_in_one_component(backend):
    params = [p for dtype in DTYPES for p in parameters([(5,), (40,)], dtype)]
    norms = check(params, backend, components="all")
    assert norms.dtype == torch.float64
    assert component_norms(params[:6], backend=backend).dtype == torch.float32
    norms = check(params, backend, components=lambda name, p: int(name) % 3)
    assert norms.shape == (3,)


@pytest.mark.parametrize("backend", TESTED)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_is_its_absolute_value(backend, dtype):
    params = parameters([(3,), (4, 5)], dtype)
    params[1].grad = params[1].grad.conj()
    assert params[1].grad.is_conj()
    grads = grads_of(params)
    norms = check(params, backend)
    assert_norms(norms.cpu(), torch.stack([float64_norm([g]) for g in grads]), dtype)


def test_complex_of_order_one_is_two_passes_over_two_backends():
    params = [*parameters([(4,)], torch.complex64), *parameters([(6,), (7,)])]
    norms = check(params, None, norm_type=1.0, components=lambda name, p: "joint" if name != "2" else "alone")
    assert norms.shape == (2,)
    if DEVICE == "cpu":
        text = ComponentClipper(params, 1.0, 1.0).explain()
        assert "'foreach' (cpu serves complex gradients for norm_type 2 only)" in text
        assert "in two passes" in text
        with pytest.raises(RuntimeError, match="backend='cpu' serves complex gradients for norm_type 2 only"):
            fused_component_clip_(params, 1.0, 1.0, backend="cpu")


@pytest.mark.parametrize("backend", TESTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_layouts_are_clipped_in_place(backend, dtype):
    channels_last = random_grad((4, 3, 5, 6), dtype).to(memory_format=torch.channels_last)
    transposed = random_grad((40, 30), dtype).t()
    permuted = random_grad((3, 4, 5), dtype).permute(2, 0, 1)
    misaligned = [random_grad((1000 + k,), dtype)[k:] for k in (1, 3, 5)]
    params = [parameter(g) for g in (channels_last, transposed, permuted, *misaligned)]
    places = [(p.grad.data_ptr(), p.grad.stride()) for p in params]
    check(params, backend)
    assert places == [(p.grad.data_ptr(), p.grad.stride()) for p in params]


@pytest.mark.parametrize("backend", TESTED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_with_gaps_leave_the_gaps_alone(backend, dtype):
    bases = [random_grad(shape, dtype) for shape in [(50, 40), (200, 3), (6, 7, 8), (3000, 2)]]
    views = [bases[0][:, :13], bases[1][:, 1], bases[2][::2, :, 1::3], bases[3][:, 1]]
    params = [parameter(v) for v in views]
    for base, param, view in zip(bases, params, views, strict=True):
        param.grad = view  # not a copy: the gaps must be somebody else's
        assert param.grad.data_ptr() == view.data_ptr()
        del base
    untouched = [b.clone() for b in bases]
    check(params, backend, max_norm=0.3)
    for base, old, view in zip(bases, untouched, views, strict=True):
        changed = view.clone()
        view.copy_(torch.zeros_like(view))
        old_view = old.as_strided(view.shape, view.stride(), view.storage_offset())
        assert not same_bits(changed, old_view)
        old_view.zero_()
        assert same_bits(base, old)


@pytest.mark.parametrize("backend", BACKENDS)
def test_interleaved_views_of_one_buffer_are_different_gradients(backend):
    buffer = random_grad((64, 2))
    expected = [buffer[:, 0].clone(), buffer[:, 1].clone()]
    params = [parameter(buffer[:, 0]), parameter(buffer[:, 1])]
    for param, column in zip(params, (0, 1), strict=True):
        param.grad = buffer[:, column]
    fused_component_clip_(params, 0.1, backend=backend)
    for column, grad in enumerate(expected):
        torch.testing.assert_close(buffer[:, column], grad * (0.1 / (grad.norm() + 1e-6)))


@pytest.mark.parametrize("backend", TESTED)
@pytest.mark.parametrize("coalesced", [True, False])
def test_sparse_gradients_count_coalesced(backend, coalesced):
    indices = torch.tensor([[0, 2, 2, 5]] if not coalesced else [[0, 2, 3, 5]], device=DEVICE)
    grad = torch.sparse_coo_tensor(indices, random_grad((4, 3)), (8, 3), check_invariants=True)
    embedding = parameter(grad.coalesce() if coalesced else grad)
    dense = parameter(grad.to_dense())
    other = parameters([(10,)])
    twin = copy_of(other)
    norms = fused_component_clip_([embedding, *other], 0.2, backend=backend)
    expected = fused_component_clip_([dense, *twin], 0.2, backend="reference")
    assert_norms(norms, expected, torch.float32)
    torch.testing.assert_close(embedding.grad.to_dense(), dense.grad)
    assert embedding.grad.is_coalesced() == coalesced
    assert_grads(other, twin)


def test_sparse_embedding_in_a_training_step():
    embedding = torch.nn.Embedding(10, 4, sparse=True, device=DEVICE)
    (embedding(torch.tensor([1, 1, 3], device=DEVICE)) ** 2).sum().backward()
    dense = embedding.weight.grad.to_dense()
    norm = fused_component_clip_(embedding, 0.01)
    torch.testing.assert_close(norm[0], dense.norm())
    torch.testing.assert_close(embedding.weight.grad.to_dense(), dense * (0.01 / (dense.norm() + 1e-6)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_lazy_minus_signs(backend):
    z = random_grad((33,), torch.complex64)
    param = parameter(random_grad((33,)))
    param.grad = z.conj().imag
    assert param.grad.is_neg()
    before = param.grad.clone()
    norm = fused_component_clip_([param], 0.1, backend=backend)
    torch.testing.assert_close(norm[0], before.norm())
    torch.testing.assert_close(param.grad.clone(), before * (0.1 / (before.norm() + 1e-6)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        # Squares that overflow or vanish in the gradient's own dtype, and in float32.
        (torch.float16, 60000.0),
        (torch.float16, 6e-8),
        (torch.bfloat16, 1e30),
        (torch.bfloat16, 1e-30),
        (torch.float32, 1e30),
        (torch.float32, 1e-30),
        (torch.float64, 1e150),
        (torch.float64, 1e-150),
    ],
)
def test_extreme_magnitudes(backend, dtype, value):
    grad = torch.full((1000,), value, dtype=dtype, device=DEVICE)
    expected = grad[0].double() * math.sqrt(1000)
    norm = fused_component_clip_([parameter(grad)], math.inf, backend=backend)
    assert_norms(norm, expected[None], dtype)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton" or DEVICE != "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_norms_of_large_tensors_are_exact(backend, dtype):
    # All of one sign and size, where naive float32 sums drift most: torch's own norm is off by 1e-4 and more.
    grad = (torch.rand(5_000_000) + 0.5).to(DEVICE, dtype)
    expected = grad.double().pow(2).sum().sqrt()
    assert_norms(component_norms([parameter(grad)], backend=backend), expected[None], dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_components_in_any_order_and_number(backend):
    params = parameters([(n % 37 + 1,) for n in range(150)])
    params[7].grad = params[60].grad = None
    shuffled = torch.randperm(150).tolist()
    grouping = {str(i): shuffled[i] % 40 for i in range(150)}
    norms = check(params, backend, components=lambda name, p: grouping[name])
    keys = list(dict.fromkeys(grouping.values()))
    for k in (0, 17, 39):
        members = [p for i, p in enumerate(params) if grouping[str(i)] == keys[k] and p.grad is not None]
        assert norms[k] > 0
        assert len(members) > 0


@pytest.mark.parametrize("backend", FUSED)
def test_rounding_of_half_precisions_bit_by_bit(backend):
    """All 65,536 values through coefficients that hit ties, subnormals and overflow: the bits torch rounds to."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        for max_norm in (0.5, 0.3, 1.0 - 2**-12, 2.0**-14):
            values = every.view(dtype)
            values = values[values.isfinite()]
            # Every value its own component of norm |v|, so that coefficients take many values as well.
            if backend == "triton" and DEVICE == "cpu":
                values = values[torch.randint(len(values), (64,))]  # the interpreter is slow
            params = [parameter(chunk.to(DEVICE)) for chunk in values.clone().split(997)]
            expected = grads_of(params)
            result = ComponentClipper(params, max_norm, math.inf, backend=backend).clip_()
            for p, grad, coef in zip(params, expected, result.coefs, strict=True):
                assert same_bits(p.grad, (grad.float() * coef).to(dtype) if coef != 1 else grad)


# torch promotes the product of two 0-d tensors: a tiny float64 coefficient would come to it unrounded, where the
# definition rounds it to the gradient's arithmetic first, to 0, and inf * 0 is NaN. What "zero" erases is decided
# before that: a norm of order 0 is finite, so its coefficient isn't 0.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (1,), (3,)])
@pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
def test_scalars_beside_float64_are_rounded_as_all_others(nonfinite, dtype, shape):
    params = [parameter(torch.full((), 2.0).double()), parameter(torch.full(shape, math.inf).to(dtype))]
    expected = copy_of(params)
    fused_component_clip_(params, 1e-100, 0.0, nonfinite=nonfinite)
    fused_component_clip_(expected, 1e-100, 0.0, nonfinite=nonfinite, backend="reference")
    assert params[1].grad.isnan().all()
    assert expected[1].grad.isnan().all()
    assert params[0].grad == expected[0].grad


@pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
@pytest.mark.parametrize("backend", ["foreach", "reference"])
def test_a_step_erases_only_what_the_policy_does(backend, nonfinite):
    """Not what a coefficient erases that is below float32's range."""
    params = [parameter(torch.full((3,), 2.0).double()), parameter(torch.full((3,), math.inf))]
    ComponentClipAdamW(params, max_norm=1e-100, norm_type=0.0, nonfinite=nonfinite, backend=backend).step()
    assert params[1].isnan().all()
    assert params[0].isfinite().all()
