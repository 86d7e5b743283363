"""Derivatives of ``clip_gradients``: forwards, backwards, twice; also where its coefficient is a constant."""

import math

import pytest
import torch
from torch.autograd import forward_ad

from cwclip_kernels import ComponentSpec, clip_gradients, clip_gradients_

# Of forward-mode derivatives and inductor, when they are first used.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*")  # of one category in one version, another in the next

G, T = torch.tensor([3.0, 4.0], dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64)


def clipped(grad, cap=1.0, **options):
    return clip_gradients([grad * 1.0], cap, **options)[0][0]


def naive(grads, cap=1.0):
    norm = torch.linalg.vector_norm(torch.cat(grads))
    return [(cap / (norm + 1e-6)).clamp(max=1.0) * grad for grad in grads]


def expected():
    return torch.func.jvp(lambda grad: naive([grad])[0], (G,), (T,))[1]


def test_forwards():
    assert torch.allclose(torch.func.jvp(clipped, (G,), (T,))[1], expected())
    assert torch.allclose(torch.func.jacfwd(clipped)(G) @ T, expected())
    with forward_ad.dual_level():
        dual = clip_gradients([forward_ad.make_dual(G, T)], 1.0)[0][0]
        tangent = forward_ad.unpack_dual(dual).tangent
    assert torch.allclose(tangent, expected())


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # of linearize itself
def test_forwards_linearized():
    assert torch.allclose(torch.func.linearize(clipped, G)[1](T), expected())


def test_forwards_compiled():
    compiled = torch.compile(lambda grad: torch.func.jvp(clipped, (grad,), (T,))[1], fullgraph=True, backend="eager")
    assert torch.allclose(compiled(G), expected())


def test_arguments_of_transformed_functions_are_gradients_too():
    """They are leaves that require grad, at the transform's own level."""
    plain = torch.func.jacrev(lambda grad: naive([grad])[0])(G)
    assert torch.allclose(torch.func.jacrev(lambda grad: clip_gradients([grad], 1.0)[0][0])(G), plain)
    assert torch.allclose(torch.func.vjp(lambda grad: clip_gradients(grad, 1.0)[0], G)[1](T)[0], plain.T @ T)


def test_caps_and_scales_of_each_example():
    grads, caps = torch.randn(5, 4), torch.rand(5)
    found = torch.vmap(clipped)(grads, caps)
    assert torch.allclose(found, torch.stack([clipped(grad, cap) for grad, cap in zip(grads, caps, strict=True)]))
    found = torch.vmap(lambda grad, scale: clipped(grad, inv_scale=scale))(grads, caps)
    each = [clipped(grad, inv_scale=scale) for grad, scale in zip(grads, caps, strict=True)]
    assert torch.allclose(found, torch.stack(each))


def test_backwards_compiled():
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def loss(clip):
        return clip(weight * weight).square().sum()

    compiled = torch.compile(lambda: loss(clipped), fullgraph=True, backend="eager")
    ours, plain = torch.autograd.grad(compiled(), weight), torch.autograd.grad(loss(lambda g: naive([g])[0]), weight)
    assert torch.allclose(ours[0], plain[0])


# What becomes of the gradient's other elements where its norm is NaN.
@pytest.mark.parametrize(
    ("cap", "nonfinite", "derivative"),
    [(1.0, "skip", [0.0, 1.0, 1.0]), (1.0, "zero", [0.0] * 3), (math.inf, "propagate", [0.0, 1.0, 1.0])],
)
def test_where_the_coefficient_is_a_constant(cap, nonfinite, derivative):
    weight = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    new, _ = clip_gradients([weight + torch.tensor([math.nan, 0.0, 0.0])], cap, nonfinite=nonfinite)
    assert torch.autograd.grad(new[0][1:].sum(), weight)[0].tolist() == derivative


def test_twice_where_a_part_of_the_component_is_zero():
    x, y = G.clone().requires_grad_(), torch.zeros(2, dtype=torch.float64, requires_grad=True)
    second = []
    for clip in (lambda grads: clip_gradients(grads, 1.0, components="all")[0], naive):
        first = torch.autograd.grad(sum(g.sum() for g in clip([x * 1, y * 1])), (x, y), create_graph=True)
        second.append(torch.autograd.grad(sum(g.sum() for g in first), (x, y)))
    for ours, plain in zip(*second, strict=True):
        assert torch.allclose(ours, plain)
    zero = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(clipped(zero).sum(), zero, create_graph=True)
    assert first.tolist() == [1.0] * 3
    assert torch.autograd.grad(first.sum(), zero, allow_unused=True, materialize_grads=True)[0].tolist() == [0.0] * 3


def test_a_recorded_graph_does_not_lose_the_clipping():
    from torch.fx.experimental.proxy_tensor import make_fx

    class Clip(torch.nn.Module):
        def forward(self, grad):
            return clip_gradients([grad], 1.0)[0][0]

    grad = torch.full((3,), 5.0)
    strict = torch.export.export(Clip(), (torch.ones(3),), strict=True).module()
    assert torch.equal(strict(grad), Clip()(grad))
    for record in (
        lambda: torch.export.export(Clip(), (torch.ones(3),), strict=False),
        lambda: make_fx(Clip())(torch.ones(3)),
        lambda: make_fx(lambda grad: clip_gradients_([grad], 1.0))(torch.ones(3)),
    ):
        with pytest.raises(RuntimeError, match="can't record clipping"):
            record()


@pytest.mark.parametrize("call", [clip_gradients, clip_gradients_])
@pytest.mark.parametrize("sizes", [2, (2, 2)])
def test_a_gradient_that_is_cut_has_to_be_there(call, sizes):
    """Its components depend on its shape, and K would be another one."""
    grads = {"w": None, "b": torch.ones(3)}
    with pytest.raises(ValueError, match=r"the gradient of 'w' is None.*give zeros"):
        call(grads, 0.5, components=ComponentSpec().split("w", sizes))
    assert grads["b"].tolist() == [1.0] * 3
    assert clip_gradients_(
        {"w": torch.ones(4, 3), "b": None}, 9.0, components=ComponentSpec().split("w", sizes)
    ).shape == (3,)
