"""Every bad argument gets an error that names it, before anything is changed."""

import math
from decimal import Decimal
from fractions import Fraction

import pytest
import torch

from cwclip_kernels import ComponentClipper, component_norms, fused_component_clip_
from cwclip_kernels.arguments import checked_int, checked_number, some_of
from helpers import DEVICE, grads_of, parameter, parameters, random_grad, same_bits
from numpys import of_numpy


@pytest.fixture
def params():
    return parameters([(4, 3), (5,)])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"max_norm": True}, TypeError, "max_norm: expected a number.* not bool"),
        ({"max_norm": "1"}, TypeError, "max_norm: expected a number.* not str"),
        ({"max_norm": None}, TypeError, "max_norm: expected a number.* not NoneType"),
        ({"max_norm": [1.0, 2.0]}, TypeError, "max_norm: expected a number.* not list"),
        ({"max_norm": 1j}, TypeError, "max_norm: expected a number.* not complex"),
        *(({"max_norm": yes}, TypeError, "max_norm: expected a number.* bool") for yes in of_numpy("bool_", True)),
        ({"max_norm": Decimal(1)}, TypeError, "max_norm: expected a number.* not Decimal"),
        ({"max_norm": -1.0}, ValueError, "max_norm: expected a number >= 0, not -1.0"),
        ({"max_norm": -math.inf}, ValueError, "max_norm: expected a number >= 0, not -inf"),
        ({"max_norm": math.nan}, ValueError, "max_norm: expected a number >= 0, not nan"),
        ({"max_norm": 10**400}, ValueError, "max_norm: .* too large for a float"),
        (
            {"max_norm": torch.tensor(1)},
            TypeError,
            "max_norm: expected a floating-point tensor, not torch.int64",
        ),
        ({"max_norm": torch.tensor(True)}, TypeError, "max_norm: expected a floating-point tensor"),
        ({"max_norm": torch.ones(3)}, ValueError, r"max_norm: expected shape \[\] or \[2\].*, not \[3\]"),
        (
            {"max_norm": torch.ones(2, 1)},
            ValueError,
            r"max_norm: expected shape \[\] or \[2\].*, not \[2, 1\]",
        ),
        ({"max_norm": torch.tensor([1.0, -2.0])}, ValueError, "max_norm: expected caps >= 0, not -2.0"),
        ({"max_norm": torch.tensor(math.nan)}, ValueError, "max_norm: expected caps >= 0, not nan"),
        (
            {"max_norm": {"x*": 1.0}},
            ValueError,
            r"max_norm: the pattern 'x\*' matches none of the 2 components",
        ),
        ({"max_norm": {"0": -1.0}}, ValueError, r"max_norm\['0'\]: expected a number >= 0, not -1.0"),
        ({"max_norm": {"0": True}}, TypeError, r"max_norm\['0'\]: expected a number or .*, not bool"),
        ({"max_norm": {0: 1.0}}, TypeError, "max_norm: expected strings as patterns, not int"),
        ({"norm_type": math.nan}, ValueError, "norm_type: expected a number, not nan"),
        ({"norm_type": "2"}, TypeError, "norm_type: expected a number or 'inf', not str"),
        ({"norm_type": True}, TypeError, "norm_type: expected a number or 'inf', not bool"),
        ({"norm_type": None}, TypeError, "norm_type: expected a number or 'inf', not NoneType"),
        ({"error_if_nonfinite": 1}, TypeError, "error_if_nonfinite: expected a bool, not int"),
        ({"eps": -1e-6}, ValueError, "eps: expected a finite number >= 0, not -1e-06"),
        ({"eps": math.inf}, ValueError, "eps: expected a finite number >= 0, not inf"),
        ({"eps": math.nan}, ValueError, "eps: expected a finite number >= 0, not nan"),
        ({"eps": "0"}, TypeError, "eps: expected a number, not str"),
        (
            {"nonfinite": "ignore"},
            ValueError,
            "nonfinite: expected one of propagate, zero, skip, error, not 'ignore'",
        ),
        ({"nonfinite": None}, TypeError, "nonfinite: expected one of .* not NoneType"),
        ({"nonfinite": "zero", "error_if_nonfinite": True}, ValueError, "contradicts nonfinite='zero'"),
        (
            {"backend": "cudnn"},
            ValueError,
            "backend: expected None or one of cuda, cpu, triton, foreach, reference, not",
        ),
        ({"backend": 1}, TypeError, "backend: expected a string or None, not int"),
        ({"components": "layers"}, ValueError, "components: expected one of"),
    ],
)
@pytest.mark.parametrize("way", ["function", "class"])
def test_bad_argument(params, changes, error, message, way):
    before = grads_of(params)
    arguments = {"max_norm": 0.1, **changes}
    clip = fused_component_clip_ if way == "function" else lambda *a, **k: ComponentClipper(*a, **k).clip_()
    with pytest.raises(error, match=message):
        clip(params, **arguments)
    assert all(same_bits(p.grad, b) for p, b in zip(params, before, strict=True))


@pytest.mark.parametrize("max_norm", [1, 0.5, *of_numpy("float32", 0.5), *of_numpy("int64", 1), Fraction(1, 2)])
def test_any_real_number_is_a_cap(params, max_norm):
    fused_component_clip_(params, max_norm)
    assert all(n <= float(max_norm) * (1 + 1e-5) for n in component_norms(params))


def test_signature_of_torch_by_position(params):
    total = fused_component_clip_(params, 1e9, float("inf"), False, components="all")
    assert total.item() == max(p.grad.abs().max().item() for p in params)
    assert fused_component_clip_(params, 1e9, "inf", components="all").item() == total.item()


def test_a_parameter_as_gradient_is_refused():
    weight = torch.nn.Parameter(random_grad((3,)))
    params = [parameter(random_grad((2,))), parameter(random_grad((3,)))]
    params[1].grad = weight
    before = [params[0].grad.clone(), weight.detach().clone()]
    for backend in (None, "foreach", "reference"):
        with pytest.raises(ValueError, match="the gradient of '1' is itself a parameter"):
            fused_component_clip_(params, 0.1, backend=backend)
    assert same_bits(params[0].grad, before[0])
    assert same_bits(weight.detach(), before[1])


def test_a_parameter_as_gradient_is_refused_after_good_steps():
    params = [parameter(random_grad((3,)))]
    clipper = ComponentClipper(params, 0.1)
    clipper.clip_()
    leaf = random_grad((3,)).requires_grad_()
    params[0].grad = leaf
    with pytest.raises(ValueError, match="is itself a parameter"):
        clipper.clip_()


@pytest.mark.parametrize("backend", [None, "foreach", "reference"])
def test_shared_gradients_are_refused(backend):
    a, b = parameters([(3,), (3,)])
    clipper = ComponentClipper([("a", a), ("b", b)], 0.1, backend=backend)
    clipper.clip_()
    b.grad = a.grad
    before = a.grad.clone()
    with pytest.raises((ValueError, RuntimeError), match="share memory"):
        clipper.clip_()
    with pytest.raises(ValueError, match="gradients of 'a' and 'b' share memory"):
        fused_component_clip_([("a", a), ("b", b)], 0.1, backend=backend)
    assert same_bits(a.grad, before)


@pytest.mark.parametrize("backend", [None, "foreach", "reference"])
def test_overlapping_memory_is_refused_even_after_good_steps(backend):
    params = [*parameters([(2,)]), parameter(random_grad((3, 4)))]
    clipper = ComponentClipper(params, 0.1, backend=backend)
    clipper.clip_()
    params[0].grad = random_grad((2,))
    before = params[0].grad.clone()
    params[1].grad = random_grad((1, 4)).expand(3, 4)
    with pytest.raises((ValueError, RuntimeError), match="several elements on one place in memory"):
        clipper.clip_()
    with pytest.raises(ValueError, match="the gradient of '1' has several elements"):
        fused_component_clip_(params, 0.1, backend=backend)
    assert same_bits(params[0].grad, before)


def test_layouts_dtypes_and_devices_that_are_not_served():
    with pytest.warns(UserWarning, match="Sparse"):
        compressed = torch.nn.Parameter(torch.eye(3, device=DEVICE).to_sparse_csr())
    compressed.grad = torch.eye(3, device=DEVICE).to_sparse_csr()
    with pytest.raises(TypeError, match="the gradient of '0' has layout torch.sparse_csr.*to_dense"):
        fused_component_clip_([compressed], 1.0)
    small = torch.nn.Parameter(torch.zeros(3, device=DEVICE).to(torch.float8_e4m3fn))
    small.grad = torch.ones(3, device=DEVICE).to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match="is torch.float8_e4m3fn: only float32"):
        fused_component_clip_([small], 1.0)
    ghost = torch.nn.Parameter(torch.zeros(3, device="meta"))
    ghost.grad = torch.zeros(3, device="meta")
    real = parameter(torch.ones(3))
    with pytest.raises(ValueError, match="the gradient of '1' is on the meta device"):  # but see test_without_data
        fused_component_clip_([real, ghost], 1.0)


def test_wrapped_gradients_are_refused():
    class Wrapped(torch.Tensor):
        pass

    param = parameter(random_grad((3,)))
    param.grad = random_grad((3,)).as_subclass(Wrapped)
    with pytest.raises(TypeError, match="the gradient of '0' is a .*Wrapped"):
        fused_component_clip_([param], 1.0)


@pytest.mark.skipif(DEVICE != "cpu", reason="about CPU tensors")
def test_a_named_backend_is_used_or_refused(params, monkeypatch):
    with pytest.raises(RuntimeError, match="backend='cpu' serves norm_type 1, 2 and inf, not 3; backend=None takes"):
        fused_component_clip_(params, 1.0, 3.0, backend="cpu")
    with pytest.raises(RuntimeError, match="backend='cuda' serves NVIDIA GPUs, not cpu; backend=None takes"):
        fused_component_clip_(params, 1.0, backend="cuda")
    from cwclip_kernels.backends import native

    monkeypatch.setattr(native, "unavailable", lambda: "the compiled extension is missing (for this test)")
    with pytest.raises(RuntimeError, match="backend='cpu' the compiled extension is missing"):
        fused_component_clip_(params, 1.0, backend="cpu")
    assert "'foreach' (cpu the compiled extension is missing" in ComponentClipper(params, 1.0).explain()


# Both ends, one of them open, inf where it is allowed, and what float() can't hold.
@pytest.mark.parametrize(
    ("value", "limits", "message"),
    [
        (0.0, {"above_low": True}, "x: expected a finite number > 0, not 0.0"),
        (1.5, {"high": 1.0}, "x: expected a finite number >= 0 and <= 1, not 1.5"),
        (math.inf, {}, "x: expected a finite number >= 0, not inf"),
        (-math.inf, {"finite": False}, "x: expected a number >= 0, not -inf"),
        (math.nan, {"low": -math.inf, "finite": False}, "x: expected a number, not nan"),
        (10**400, {"finite": False}, "x: 1.* is too large for a float; use math.inf$"),
        (10**400, {}, "x: 1.* is too large for a float$"),
    ],
)
def test_numbers(value, limits, message):
    with pytest.raises(ValueError, match=message):
        checked_number(value, "x", **limits)
    assert all(checked_number(half, "x", **limits) == 0.5 for half in of_numpy("float32", 0.5))


@pytest.mark.parametrize(
    "value", [1.0, "1", None, True, *of_numpy("bool_", True), *map(torch.tensor, (True, [1, 2]))]
)
def test_what_is_no_whole_number(value):
    with pytest.raises(TypeError, match=f"x: expected a whole number, not {type(value).__name__}"):
        checked_int(value, "x")


def test_whole_numbers():
    assert [checked_int(value, "x", 1) for value in (1, torch.tensor(3))] == [1, 3]
    assert all(checked_int(two, "x", 1) == 2 for two in of_numpy("int64", 2))
    with pytest.raises(ValueError, match="x: expected a whole number >= 1, not 0"):
        checked_int(0, "x", 1)


def test_the_first_few_of_many_names():
    assert some_of([]) == ""
    assert some_of(["a", "b", "c"]) == "'a', 'b', 'c'"
    assert some_of(range(5), 2) == "0, 1 and 3 more"
