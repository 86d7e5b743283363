"""Norms and scaling apart: what was measured, reduced or decided elsewhere, applied in one pass."""

import math
import weakref

import pytest
import torch

from cwclip_kernels import (
    ComponentClipper,
    ComponentSpec,
    component_clip_with_norms_,
    component_norms,
    component_scale_,
    fused_component_clip_,
    thresholds,
)
from helpers import (
    BACKENDS,
    DEVICE,
    DTYPES,
    assert_grads,
    assert_norms,
    copy_of,
    grads_of,
    parameter,
    parameters,
    random_grad,
    same_bits,
)

SHAPES = [(33,), (12, 3), (), (0,), (129,)]


def flag():
    return torch.zeros((), device=DEVICE)


def exact(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_both_halves_are_the_whole(backend, dtype, norm_type):
    """component_norms and then component_clip_with_norms_ do what fused_component_clip_ does."""
    params = parameters(SHAPES, dtype, scale=64.0)
    expected, before = copy_of(params), grads_of(params)
    common = {"inv_scale": 2.0**-6, "backend": backend}
    found = flag()
    norms = component_norms(params, norm_type, found_inf=found, **common)
    assert found == 0
    assert all(same_bits(a, b) for a, b in zip(before, grads_of(params), strict=True))
    coefs = component_clip_with_norms_(params, 0.7, norms, norm_type, **common)
    clipper = ComponentClipper(expected, 0.7, norm_type, backend="reference")
    wanted = clipper.clip_(inv_scale=2.0**-6)
    assert_norms(norms, wanted.norms, exact(dtype))
    assert_norms(coefs, wanted.coefs, exact(dtype))
    assert_grads(params, expected, exact(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_scaling_by_coefficients(backend, dtype):
    params = parameters(SHAPES, dtype)
    coefs = torch.rand(len(SHAPES), device=DEVICE) * 3 - 1
    coefs[1] = 1.0
    # Rounded once, from float32 or wider.
    wide = torch.promote_types(dtype, torch.float32)
    expected = [parameter((p.grad.to(wide) * c.to(wide)).to(dtype)) for p, c in zip(params, coefs, strict=True)]
    version = params[0].grad._version
    component_scale_(params, coefs, backend=backend)
    assert_grads(params, expected)
    assert same_bits(params[1].grad, expected[1].grad)
    assert params[0].grad._version > version


@pytest.mark.parametrize("backend", BACKENDS)
def test_coefficients_given_in_any_way(backend):
    for coefs in (3, -0.5, torch.tensor(0.25), torch.full((2,), 2.0, dtype=torch.float64), torch.ones(2).bfloat16()):
        params = parameters([(33,), (4, 5)])
        factors = torch.as_tensor(coefs, dtype=torch.float64).expand(2).tolist()
        expected = [parameter(p.grad * f * 0.5) for p, f in zip(params, factors, strict=True)]
        ComponentClipper(params, 1.0, backend=backend).scale_(coefs, inv_scale=0.5)
        assert_grads(params, expected, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_coefficient_of_zero(backend):
    """0 * inf is NaN, as in torch, unless zeros are asked for."""
    bad = torch.tensor([1.0, math.inf, math.nan], device=DEVICE)
    params = [parameter(bad.clone()), parameter(bad.clone())]
    component_scale_(params, torch.tensor([0.0, 1.0]), backend=backend)
    assert params[0].grad.isnan().tolist() == [False, True, True]
    component_scale_(params, torch.tensor([0.0, 1.0]), zero_fill=True, backend=backend)
    assert params[0].grad.tolist() == [0.0, 0.0, 0.0]
    assert same_bits(params[1].grad, bad)
    clipper = ComponentClipper(params[1:], 1.0, nonfinite="zero", backend=backend)
    result = clipper.clip_with_norms_(clipper.norms())
    assert result.coefs.item() == 0.0
    assert params[1].grad.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("backend", "norm_type"), [*((backend, 2.0) for backend in BACKENDS), (None, 3.0)])
def test_found_inf_without_clipping(backend, norm_type):
    for bad in (math.inf, math.nan):
        params = parameters([(33,), (4,)])
        params[1].grad[2] = bad
        found = flag()
        norms = component_norms(params, norm_type, inv_scale=0.5, found_inf=found, backend=backend)
        assert found == 1
        assert norms.isfinite().tolist() == [True, False]
    # An overflow of the sum alone is not a gradient that is inf or NaN.
    found = flag()
    component_norms([parameter(torch.tensor([1e200], dtype=torch.float64, device=DEVICE))], 3.0, found_inf=found)
    assert found == 0


def test_slices_groups_and_components_left_alone():
    params = parameters([(6, 4), (6,), (5,)])
    named = [("qkv.weight", params[0]), ("qkv.bias", params[1]), ("rest", params[2])]
    spec = ComponentSpec(lambda name, _: None if name == "rest" else "qkv").split(
        "qkv.*", sizes=(2, 2, 2), names=("q", "k", "v"), dim=0
    )
    before = copy_of(params)
    clipper = ComponentClipper(named, 1.0, components=spec)
    assert clipper.names == ("qkv[q]", "qkv[k]", "qkv[v]")
    clipper.scale_(torch.tensor([2.0, 3.0, 4.0]))
    rows = torch.tensor([2.0, 2.0, 3.0, 3.0, 4.0, 4.0], device=DEVICE)
    assert torch.equal(params[0].grad, before[0].grad * rows[:, None])
    assert torch.equal(params[1].grad, before[1].grad * rows)
    assert same_bits(params[2].grad, before[2].grad)


@pytest.mark.parametrize(
    "make",
    [
        lambda: {"0": 0.1, "*": math.inf},
        lambda: torch.tensor([0.1, 2.0]),
        lambda: thresholds.EMA(warmup_steps=1),
        lambda: thresholds.Percentile(40.0, window=4),
    ],
)
def test_thresholds_learn_from_the_norms_given(make):
    one, other = make(), make()
    for _ in range(3):
        params = parameters([(33,), (4, 5)])
        expected = copy_of(params)
        clipper = ComponentClipper(params, one)
        result, wanted = clipper.clip_with_norms_(clipper.norms()), ComponentClipper(expected, other).clip_()
        assert torch.equal(result.caps, wanted.caps)
        assert_grads(params, expected, torch.float32)
    if isinstance(one, thresholds.Threshold):
        states = [threshold.state_dict()["tensors"] for threshold in (one, other)]
        assert states[0]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


def test_other_norms_than_the_gradients():
    """Those of a larger model, say; more precise than float32 they stay so."""
    params = parameters([(33,)], torch.float32)
    before = grads_of(params)
    norms = torch.tensor([3.0], dtype=torch.float64)
    coefs = component_clip_with_norms_(params, 1.0, norms, eps=0.0)
    assert coefs.dtype == torch.float64
    assert coefs.item() == 1 / 3
    torch.testing.assert_close(params[0].grad, before[0] / 3)
    assert norms.item() == 3.0


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda p: component_scale_(p, torch.ones(3)), ValueError, r"coefs: expected shape \[\] or \[2\]"),
        (lambda p: component_scale_(p, torch.ones(1)), ValueError, "coefs: expected shape"),
        (lambda p: component_scale_(p, torch.ones(2, dtype=torch.int64)), TypeError, "coefs: expected a floating"),
        (lambda p: component_scale_(p, math.nan), ValueError, "coefs: expected a finite number"),
        (lambda p: component_scale_(p, "1"), TypeError, "coefs: expected a number or a Tensor"),
        (lambda p: component_scale_(p, [1.0, 1.0]), TypeError, "coefs: expected a number or a Tensor"),
        (lambda p: component_scale_(p, 0.5, zero_fill=1), TypeError, "zero_fill"),
        (lambda p: component_scale_(p, 0.5, inv_scale=-1.0), ValueError, "inv_scale"),
        (lambda p: component_clip_with_norms_(p, 1.0, torch.ones(1)), ValueError, r"norms: expected shape \[2\]"),
        (lambda p: component_clip_with_norms_(p, 1.0, 3.0), TypeError, r"norms: expected a Tensor of shape \[2\]"),
        (lambda p: component_clip_with_norms_(p, 1.0, -torch.ones(2)), ValueError, "norms: expected norms >= 0"),
        (lambda p: component_clip_with_norms_(p, -1.0, torch.ones(2)), ValueError, "max_norm"),
        (
            lambda p: component_clip_with_norms_(p, 1e-3, torch.tensor([1.0, math.inf]), 2.0, True),
            RuntimeError,
            "non-finite for 1 of 2 components: '1'",
        ),
        (lambda p: component_norms(p, inv_scale=0.0), ValueError, "inv_scale"),
        (lambda p: component_norms(p, found_inf=torch.zeros(2)), ValueError, "found_inf"),
    ],
)
def test_wrong_arguments_change_nothing(call, error, words):
    params = parameters([(33,), (4, 5)])
    before = grads_of(params)
    with pytest.raises(error, match=words):
        call(params)
    assert all(same_bits(a, b) for a, b in zip(before, grads_of(params), strict=True))


def test_a_clipper_warns_of_replaced_parameters_and_a_graph_is_not_kept():
    model = torch.nn.Linear(3, 2, device=DEVICE)
    clipper = ComponentClipper(model, 1.0)
    model.bias = torch.nn.Parameter(torch.zeros(2, device=DEVICE))
    with pytest.warns(UserWarning, match="has been replaced"):
        clipper.scale_(0.5)
    params = parameters([(3,)])
    coefs = torch.ones(1, device=DEVICE, requires_grad=True)
    component_scale_(params, coefs * 2)
    assert not params[0].grad.requires_grad
    gone = weakref.ref(coefs)
    del coefs
    assert gone() is None


def test_meta_gradients():
    model = torch.nn.Linear(3, 2, device="meta")
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    component_scale_(model, 0.5)
    assert component_clip_with_norms_(model, 1.0, torch.ones(2)).is_meta
    assert component_norms(model, inv_scale=0.5).is_meta


@pytest.mark.builds
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # of importing inductor
@pytest.mark.parametrize(
    ("max_norm", "compiler"),
    [(0.3, "inductor"), ({"1": 0.3}, "aot_eager"), ("tensor", "aot_eager"), ("Percentile", "inductor")],
)
def test_compiled(max_norm, compiler):
    """The eager calls' bits, in one graph."""
    torch._dynamo.reset()
    params = parameters([(30, 2), (30,)])
    expected = copy_of(params)
    cap = torch.tensor([0.3, 4.0], device=DEVICE) if max_norm == "tensor" else max_norm
    caps = [thresholds.Percentile(40.0, window=4) if cap == "Percentile" else cap for _ in range(2)]
    clippers = [ComponentClipper(p, c) for p, c in zip((params, expected), caps, strict=True)]
    factor = torch.tensor([0.5, 2.0], device=DEVICE)

    def step(own, clipper):
        found = torch.zeros((), device=DEVICE)
        norms = component_norms(own, inv_scale=0.5, found_inf=found)
        result = clipper.clip_with_norms_(norms * 1.0, inv_scale=0.5)
        component_scale_(own, factor)
        clipper.scale_(0.5)
        component_clip_with_norms_(own, 0.2, result.norms)
        return result.norms, result.coefs, result.caps, found

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    for _ in range(2):
        for p, e in zip(params, expected, strict=True):
            p.grad = random_grad(p.shape)
            e.grad = p.grad.clone()
        for a, b in zip(compiled(params, clippers[0]), step(expected, clippers[1]), strict=True):
            torch.testing.assert_close(a, b, rtol=0.0, atol=0.0)
        assert all(same_bits(a, b) for a, b in zip(grads_of(params), grads_of(expected), strict=True))
    torch._dynamo.reset()


@pytest.mark.builds
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # of importing inductor
@pytest.mark.parametrize("max_norm", [0.3, {"0": 0.3}, "tensor", "EMA"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_compiled_where_no_gradient_exists(max_norm, dtype):
    """Coefficients are of the norms given, and thresholds learn from these, as in eager calls."""
    torch._dynamo.reset()
    outcomes = []
    for mode in ("eager", "compiled"):
        params = [parameter(None, (5,)), parameter(None, (2, 3))]
        cap = {"tensor": torch.tensor([0.3, 4.0], device=DEVICE), "EMA": thresholds.EMA(warmup_steps=1)}
        clipper = ComponentClipper(params, cap[max_norm] if isinstance(max_norm, str) else max_norm)
        call = clipper.clip_with_norms_
        if mode == "compiled":
            call = torch.compile(call, fullgraph=True, backend="aot_eager")
        for values in ([3.0, 0.1], [6.0, 8.0]):
            result = call(torch.tensor(values, dtype=dtype, device=DEVICE), inv_scale=0.5)
        learnt = clipper.max_norm.state_dict()["tensors"] if max_norm == "EMA" else {}
        outcomes.append((result.norms, result.coefs, result.caps, *learnt.values()))
    for eager, compiled in zip(*outcomes, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=0.0, atol=0.0)
    assert outcomes[0][1][0] < 1
    with pytest.raises(RuntimeError, match="non-finite for 1 of 2"):
        torch.compile(component_clip_with_norms_, fullgraph=True, backend="aot_eager")(
            params, 0.3, torch.tensor([math.inf, 1.0], device=DEVICE), error_if_nonfinite=True
        )
    torch._dynamo.reset()


@pytest.mark.builds
def test_operators():
    words = repr((("a", "b"), ("a", "b"), ((0, 0, ()), (1, 1, ())), (), (), ()))
    ops = torch.ops.cwclip_kernels
    grads, found = [random_grad((5,)), random_grad((2, 3))], torch.zeros((), device=DEVICE)
    inverse, coefs = torch.tensor(0.5, device=DEVICE), torch.tensor([0.5, 2.0], device=DEVICE)
    for inv_scale in (None, inverse):
        torch.library.opcheck(ops.component_scale_.default, (grads, words, coefs, inv_scale, False, None))
        torch.library.opcheck(ops.component_norms.default, (grads, words, 2.0, inv_scale, None))
        torch.library.opcheck(ops.component_norms_and_inf.default, (grads, words, 2.0, inv_scale, None, found))
        for caps, patterns, values in ((coefs, "", []), (None, "['a']", [0.3]), (None, "", [0.3])):
            arguments = grads, words, coefs, caps, patterns, values, inv_scale, 2.0, 1e-6, [1], "propagate", None
            torch.library.opcheck(ops.component_clip_with_norms_.default, arguments)
    for caps, patterns, values in ((coefs, "", []), (None, "['a']", [0.3]), (None, "", [0.3])):
        arguments = repr((("a", "b"), (), (), (), (), ())), coefs, caps, patterns, values, 2.0, 1e-6, [1], "propagate"
        torch.library.opcheck(ops.component_coefficients.default, arguments)


def test_fused_clip_is_what_it_was():
    """found_inf is set where a norm is inf and the call goes on."""
    params = parameters([(4,)])
    params[0].grad[0] = math.inf
    found = flag()
    fused_component_clip_(params, thresholds.Percentile(), found_inf=found)
    assert found == 1
