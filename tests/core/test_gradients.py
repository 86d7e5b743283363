"""Gradients that hang on no parameter: from torch.func and torch.autograd.grad, in place and out of place."""

import math
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from cwclip_kernels import ComponentSpec, clip_gradients, clip_gradients_, fused_component_clip_, thresholds
from cwclip_kernels.core import cache
from helpers import (
    BACKENDS,
    DEVICE,
    DTYPES,
    GRAD_TOLERANCE,
    assert_norms,
    parameter,
    random_grad,
    same_bits,
)

SHAPES = {"layers.0.weight": (6, 4), "layers.0.bias": (6,), "layers.1.weight": (3, 6), "head": (), "empty": (0,)}


def gradients(dtype=torch.float32):
    return {name: random_grad(shape, dtype) for name, shape in SHAPES.items()}


def copies(grads):
    return {name: None if g is None else g.clone() for name, g in grads.items()}


def expected_of(grads, max_norm, *args, **kwargs):
    """The reference's norms and gradients, on parameters."""
    params = {name: parameter(g.clone()) for name, g in grads.items()}
    norms = fused_component_clip_(params.items(), max_norm, *args, backend="reference", **kwargs)
    return norms, {name: p.grad for name, p in params.items()}


def assert_close(actual, expected):
    assert list(actual) == list(expected)
    for name, e in expected.items():
        rtol, atol = GRAD_TOLERANCE[e.dtype]
        torch.testing.assert_close(
            actual[name], e, rtol=max(rtol, 1e-6 if e.dtype != torch.float64 else 0), atol=atol
        )


GROUPINGS = [None, "module", "layer", "type", "all", lambda name, _: None if "bias" in name else name[:6]]
GROUPINGS += [ComponentSpec("layer").split("*.0.weight", sizes=(2, 4), names=("q", "k"), dim=0)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_as_gradients_of_parameters(backend, dtype):
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    for components, max_norm in zip(GROUPINGS, [0.7, {"layers.0": 0.5}, 0.1, {"*": 0.3}, 1.0, 0.2, 0.6], strict=True):
        grads = gradients(dtype)
        norms, wanted = expected_of(grads, max_norm, components=components)
        before, kept = copies(grads), copies(grads)
        new, found = clip_gradients(grads, max_norm, components=components, backend=backend)
        assert_norms(found, norms, exact)
        assert_close(new, wanted)
        assert all(same_bits(grads[name], before[name]) for name in grads)
        version = grads["layers.0.weight"]._version
        assert_norms(clip_gradients_(kept, max_norm, components=components, backend=backend), norms, exact)
        assert all(same_bits(kept[name], new[name]) for name in kept)
        assert grads["layers.0.weight"]._version == version
        assert not any(new[name] is grads[name] for name in grads)


def test_every_form_comes_back_as_it_was_given():
    grads = list(gradients().values())
    wanted = list(expected_of({str(i): g for i, g in enumerate(grads)}, 0.7)[1].values())
    for form in (list, tuple, iter):
        new, norms = clip_gradients(form(grads), 0.7)
        assert isinstance(new, tuple if form is tuple else list)
        assert norms.shape == (len(grads),)
        for a, b in zip(new, wanted, strict=True):
            torch.testing.assert_close(a, b)
    pairs, _ = clip_gradients(zip("abcde", grads, strict=True), {"a": 0.7})
    assert [name for name, _ in pairs] == list("abcde")
    torch.testing.assert_close(pairs[0][1], wanted[0])
    assert same_bits(pairs[1][1], grads[1])
    alone, norms = clip_gradients(grads[0], 0.7)
    torch.testing.assert_close(alone, wanted[0])
    assert norms.shape == (1,)
    new, _ = clip_gradients(OrderedDict(a=grads[0], b=None), 0.7)
    torch.testing.assert_close(new, {"a": wanted[0], "b": None})
    assert clip_gradients({}, 1.0)[0] == {}
    assert clip_gradients_([], 1.0).shape == (0,)


def test_a_missing_gradient_is_a_component_all_the_same():
    w, unused = nn.Parameter(torch.ones(3, device=DEVICE)), nn.Parameter(torch.ones(2, device=DEVICE))
    grads = torch.autograd.grad((2 * w).sum(), (unused, w), allow_unused=True)
    norms = clip_gradients_(grads, 1.0)
    assert norms.tolist() == pytest.approx([0.0, math.sqrt(12)])
    assert grads[1].norm() <= 1
    assert clip_gradients_([None, None], 1.0).tolist() == [0.0, 0.0]


def test_names_are_those_of_the_model():
    """With DistributedDataParallel's prefix and torch.compile's, patterns in either spelling."""
    grads = {f"module._orig_mod.{name}": g for name, g in gradients().items()}
    for pattern in ("layers.0.*", "module.layers.0.*"):
        new, norms = clip_gradients(grads, {pattern: 0.0})
        assert norms.shape == (5,)
        assert [name for name, g in new.items() if g.numel() and not g.any()] == list(grads)[:2]
    with pytest.raises(ValueError, match=r"max_norm: .*'layer\.0'.* matches no"):
        clip_gradients(grads, {"layer.0": 1.0})


def test_expanded_and_shared_gradients_are_copied_but_not_clipped_in_place():
    a, b = (torch.ones(3, device=DEVICE, requires_grad=True) for _ in range(2))
    grads = torch.autograd.grad((a + b).sum(), (a, b))
    new, norms = clip_gradients(grads, 0.5)
    assert norms.tolist() == pytest.approx([math.sqrt(3)] * 2)
    assert [g.norm().item() for g in new] == pytest.approx([0.5, 0.5], rel=1e-5)
    with pytest.raises(ValueError, match=r"gradient of '0' has several elements on one place"):
        clip_gradients_(grads, 0.5)
    one = torch.ones(4, device=DEVICE)
    with pytest.raises(ValueError, match="gradients of 'a' and 'b' share memory"):
        clip_gradients_({"a": one, "b": one}, 0.5)
    assert one.tolist() == [1.0] * 4


@pytest.mark.parametrize("values", [[1e5, math.inf, 0.5], [math.nan, 1.0]])
@pytest.mark.parametrize("nonfinite", ["propagate", "zero", "skip"])
def test_loss_scale_and_policies(nonfinite, values):
    grads = {"a": torch.tensor(values, device=DEVICE), "b": random_grad((5,), scale=64.0)}
    norms, wanted = expected_of(grads, 0.7, nonfinite=nonfinite, inv_scale=2.0**-6)
    found = torch.zeros((), device=DEVICE)
    new, actual = clip_gradients(grads, 0.7, nonfinite=nonfinite, inv_scale=2.0**-6, found_inf=found)
    assert_norms(actual, norms, torch.float32)
    torch.testing.assert_close(new, wanted, equal_nan=True)
    assert found == 1
    with pytest.raises(RuntimeError, match="non-finite for 1 of 2 components: 'a'"):
        clip_gradients_(grads, 0.7, error_if_nonfinite=True)
    # The same by torch's operations, as for gradients with a graph.
    with_graph = {name: g.clone().requires_grad_() * 1.0 for name, g in grads.items()}
    new, actual = clip_gradients(with_graph, 0.7, nonfinite=nonfinite, inv_scale=2.0**-6, found_inf=found.zero_())
    assert_norms(actual, norms, torch.float32)
    torch.testing.assert_close({n: g.detach() for n, g in new.items()}, wanted, equal_nan=True)
    assert found == 1
    with pytest.raises(RuntimeError, match="non-finite for 1 of 2 components: 'a'"):
        clip_gradients(with_graph, 0.7, error_if_nonfinite=True)


def test_thresholds_learn():
    one, other = (thresholds.EMA(warmup_steps=1, warmup_norm=2.0) for _ in range(2))
    for step in range(4):
        grads = gradients()
        del grads["empty"]
        norms, wanted = expected_of(grads, one)
        if step % 2:  # with a graph
            grads = {name: g.requires_grad_() * 1.0 for name, g in grads.items()}
        new, actual = clip_gradients(grads, other)
        assert_norms(actual, norms, torch.float32)
        assert_close({name: g.detach() for name, g in new.items()}, wanted)
    for name, tensor in one.state_dict()["tensors"].items():
        torch.testing.assert_close(other.state_dict()["tensors"][name], tensor)
    budget = thresholds.FromGlobal(1.0, "numel")
    grads = gradients()
    norms, wanted = expected_of(grads, thresholds.FromGlobal(1.0, "numel"))
    assert_close(clip_gradients(grads, budget)[0], wanted)
    with pytest.raises(ValueError, match="ParamRelative reads parameters"):
        clip_gradients(grads, thresholds.ParamRelative())


# ------------------------------------------------------------------------------------------------------------
# Graphs and transforms
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.0, math.inf])
@pytest.mark.parametrize("components", [None, "all", GROUPINGS[-1]])
def test_derivatives(components, norm_type):
    """Of the first and second order, by finite differences; some components are clipped and some aren't."""
    names = ["layers.0.weight", "layers.1.bias"]
    inputs = [random_grad((6, 2), torch.float64).requires_grad_(), (1e-3 * torch.ones(2).double()).requires_grad_()]

    def clip(*grads):
        new, _ = clip_gradients(dict(zip(names, grads, strict=True)), 0.1, norm_type, components=components)
        return tuple(new.values())

    clip_inputs = [g * 1.0 for g in inputs]
    coefs = [new / old for new, old in zip(clip(*clip_inputs), clip_inputs, strict=True)]
    assert (coefs[0] < 1).any()
    assert torch.autograd.gradcheck(lambda *g: clip(*(x * 1.0 for x in g)), inputs)
    if norm_type == 2.0:
        assert torch.autograd.gradgradcheck(lambda *g: clip(*(x * 1.0 for x in g)), inputs)


@pytest.mark.parametrize("bad", ["zero gradient", "cap of inf", "cap of 0", "no eps"])
def test_derivatives_where_nothing_or_all_is_clipped(bad):
    x = (torch.zeros(3) if bad in ("zero gradient", "no eps") else torch.randn(3)).requires_grad_()
    cap = {"cap of inf": math.inf, "cap of 0": 0.0}.get(bad, 1.0)
    new, _ = clip_gradients([x * 2.0], cap, eps=0.0 if bad == "no eps" else 1e-6)
    (slope,) = torch.autograd.grad(new[0].sum(), x)
    assert slope.tolist() == [0.0 if bad == "cap of 0" else 2.0] * 3


def test_one_step_of_meta_learning():
    """The gradient through a clipped inner step, by finite differences."""
    model = nn.Linear(3, 1).double()
    x, y = torch.randn(4, 3).double(), torch.randn(4, 1).double()

    def inner(params):
        return (functional_call(model, params, x) - y).square().sum()

    def outer(weight, bias):
        params = {"weight": weight * 1.0, "bias": bias * 1.0}
        grads = torch.autograd.grad(inner(params), list(params.values()), create_graph=True)
        new, _ = clip_gradients(zip(params, grads, strict=True), 0.1)
        return inner({name: params[name] - g for name, g in new})

    start = [p.detach().clone().requires_grad_() for p in model.parameters()]
    assert torch.autograd.gradcheck(outer, start)

    def by_transforms(params):
        new, _ = clip_gradients(grad(inner)(params), 0.1)
        return inner({name: params[name] - new[name] for name in params})

    params = {name: p.detach() for (name, _), p in zip(model.named_parameters(), start, strict=True)}
    wanted = torch.autograd.grad(outer(*start), start)
    for actual, e in zip(grad(by_transforms)(params).values(), wanted, strict=True):
        torch.testing.assert_close(actual, e)


def test_gradients_of_single_examples():
    model = nn.Linear(3, 2, device=DEVICE)
    params = {name: p.detach() for name, p in model.named_parameters()}
    xs = torch.randn(5, 3, device=DEVICE)

    def one(x):
        grads = grad(lambda p: functional_call(model, p, x).square().sum())(params)
        return clip_gradients(grads, {"weight": 0.1, "bias": 1e9})

    new, norms = vmap(one)(xs)
    assert norms.shape == (5, 2)
    for i, x in enumerate(xs):
        wanted, expected = one(x)
        torch.testing.assert_close({name: g[i] for name, g in new.items()}, wanted)
        torch.testing.assert_close(norms[i], expected)
        assert wanted["weight"].norm() <= 0.1


def test_what_transforms_refuse():
    def inside(**options):
        def loss(x):
            clip_gradients([x * 2.0], **{"max_norm": 1.0, **options})
            return x.sum()

        return lambda: grad(loss)(torch.ones(2))

    for call, words in [
        (inside(max_norm=thresholds.EMA()), "max_norm: a threshold can't be used in a function that torch.func"),
        (inside(nonfinite="error"), "nonfinite='error' can't be used"),
        (inside(found_inf=torch.zeros(())), "found_inf can't be used"),
        (inside(backend="cpu"), "backend='cpu' can't clip copies in a function that torch.func transforms"),
        (lambda: grad(lambda x: clip_gradients_([x * 2.0], 1.0).sum())(torch.ones(2)), "use clip_gradients, which"),
    ]:
        with pytest.raises(RuntimeError, match=words):
            call()


@pytest.mark.usefixtures("needs_extension")
def test_what_graphs_refuse():
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="gradient of 'a' has a graph"):
        clip_gradients_({"a": x * 2}, 1.0)
    with pytest.raises(ValueError, match="is itself a parameter"):
        clip_gradients({"a": x}, 1.0)
    with pytest.raises(RuntimeError, match="backend='cpu' can't clip copies of gradients with a graph"):
        clip_gradients({"a": x * 2}, 1.0, backend="cpu")
    with pytest.raises(TypeError, match="'a' is torch.sparse_coo, which can't be clipped with its graph"):
        clip_gradients({"a": (x * 2).to_sparse()}, 1.0)
    with torch.no_grad():
        new, _ = clip_gradients({"a": x * 2}, 1.0, backend="cpu")
    assert not new["a"].requires_grad


@pytest.mark.parametrize(
    ("grads", "error", "words"),
    [
        (nn.Linear(2, 2), TypeError, "not Linear; for the .grad of its parameters there is fused_component_clip_"),
        (3, TypeError, "grads: expected a Tensor, a mapping"),
        ("ab", TypeError, "grads: expected a Tensor, a mapping"),
        (
            {"a": {"b": torch.ones(2)}},
            TypeError,
            r"grads\['a'\]: expected a Tensor or None, not dict; flatten nested",
        ),
        ({0: torch.ones(2)}, TypeError, "grads: .* not the name 0"),
        ([torch.ones(2), "b"], TypeError, r"grads\[1\]: expected a Tensor or None, not str"),
        ([("a", torch.ones(2)), torch.ones(2)], TypeError, "not some of either"),
        ([("a", torch.ones(2)), ("a", torch.zeros(2))], ValueError, "two gradients are named 'a'"),
        ({"a": torch.ones(2, dtype=torch.int64)}, TypeError, "gradient of 'a' is torch.int64"),
        ({"a": torch.ones(2), "b": torch.ones(2)}, ValueError, r"max_norm: expected shape \[\] or \[2\]"),
    ],
)
def test_wrong_arguments(grads, error, words):
    for call in (clip_gradients, clip_gradients_):
        with pytest.raises(error, match=words):
            call(grads, torch.ones(3) if "shape" in words else 1.0)


@pytest.mark.usefixtures("needs_extension")
def test_sessions_are_kept_and_hold_no_gradient():
    cache._entries.clear()
    for _ in range(3):
        clip_gradients_(gradients(), 0.7)
        clip_gradients([random_grad((3,)), random_grad((4,))], 0.7)
        clip_gradients([random_grad((4,)), random_grad((3,))], 0.7)
    assert len(cache._entries) == 3
    plans = [entry.session.plans.made for entry in cache._entries.values()]
    assert plans == [1, 1, 1]


def test_sparse_and_complex():
    values = torch.tensor([[0, 2, 2]]), torch.tensor([3.0, 1.0, 3.0])
    grads = {"sparse": torch.sparse_coo_tensor(*values, (4,)), "complex": random_grad((5,), torch.complex64)}
    new, norms = clip_gradients(grads, 0.5)
    assert norms[0] == 5.0
    torch.testing.assert_close(new["sparse"].to_dense(), grads["sparse"].to_dense() / 10)
    torch.testing.assert_close(new["complex"], grads["complex"] * 0.5 / (norms[1] + 1e-6))
    with_graph, _ = clip_gradients([grads["complex"].requires_grad_() * 1.0], 0.5)
    torch.testing.assert_close(with_graph[0].detach(), new["complex"])


@pytest.mark.builds
def test_compiled():
    """The eager calls' bits, in one graph, in place and out of place."""
    torch._dynamo.reset()

    def step(grads):
        new, norms = clip_gradients(grads, {"layers.0": 0.3}, components="layer")
        more = clip_gradients_(new, 0.2, inv_scale=0.5)
        return new, norms, more

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        grads = gradients()
        before = copies(grads)
        actual, expected = compiled(grads), step(before)
        torch.testing.assert_close(actual, expected, rtol=0.0, atol=0.0)
        assert all(same_bits(grads[name], before[name]) for name in grads)
    with pytest.raises(Exception, match="EMA can't be traced for gradients without parameters"):
        torch.compile(lambda g: clip_gradients(g, thresholds.EMA()), backend="aot_eager", fullgraph=True)(gradients())
    torch._dynamo.reset()


def test_inference_mode():
    """Copies are ordinary tensors; what was made in inference mode isn't clipped in place."""
    with torch.inference_mode():
        grads = [random_grad((3,))]
    new, norms = clip_gradients(grads, 0.1)
    assert not new[0].is_inference()
    assert not norms.is_inference()
    assert new[0].norm() <= 0.1
    with pytest.raises((TypeError, ValueError), match="'0' was made in inference mode"):
        clip_gradients_(grads, 0.1)
    with torch.inference_mode():
        own = [torch.ones(3)]
        with pytest.raises((TypeError, ValueError), match="'0' was made in inference mode"):
            clip_gradients_(own, 0.1)
        assert clip_gradients(own, 0.1)[0][0].norm() <= 0.1
    assert own[0].tolist() == [1.0] * 3
