"""``ComponentClipAdamW`` on every backend: against clipping and torch's AdamW, to the bit where that is promised."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cwclip_kernels import ComponentClipper, ComponentSpec, component_norms
from cwclip_kernels.optim import ComponentClipAdamW
from helpers import BACKENDS, DEVICE, assert_norms, random_grad, same_bits
from stepping import assert_stepped_alike, give_gradients, named, run, states_of, twins

# Tiny, one vector and a bit, more than one tile (128 KiB of float32), a matrix, no dimension, no element.
SHAPES = [(3,), (33,), (40_000,), (17, 65), (), (0,), (4, 8, 3, 3)]
STEPS, LR, CAP = 50, 1e-2, 0.05
FUSED = [b for b in BACKENDS if b in ("cpu", "cuda", "triton")]

# Every option that changes the arithmetic, alone and together.
OPTIONS = [
    {},
    {"amsgrad": True},
    {"maximize": True},
    {"weight_decay": 0.0},
    {"betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.3, "amsgrad": True, "maximize": True},
]


@pytest.mark.parametrize(
    ("options", "dtype"),
    [*((options, torch.float32) for options in OPTIONS), ({}, torch.float64), (OPTIONS[-1], torch.float64)],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_clipping_and_then_torchs_step(backend, options, dtype):
    ours, theirs = twins(SHAPES, dtype)
    optimizer = ComponentClipAdamW(ours, lr=LR, max_norm=CAP, backend=backend, **options)
    clipper = ComponentClipper(theirs, CAP, backend="reference")
    fused = torch.optim.AdamW(theirs, lr=LR, fused=True, **options)

    def clip_and_step():
        clipper.clip_()
        fused.step()

    steps = STEPS if backend in ("cpu", "foreach") else 5  # interpreted and simulated kernels take their time
    run(steps, (ours, optimizer.step), (theirs, clip_and_step))
    assert_stepped_alike(ours, theirs, steps, LR)
    assert_stepped_alike(states_of(optimizer, ours), states_of(fused, theirs), steps, LR)


GROUPINGS = {
    "parameter": None,
    "module": "module",
    "layer": "layer",
    "all": "all",
    "some alone": lambda name, p: None if p.ndim == 1 else name,
    "rows": ComponentSpec().split("*.0.weight", 4, dim=0),
    "columns": ComponentSpec().split("*.0.weight", (20, 45), dim=1),
    "units": ComponentSpec("layer").unitwise("*.weight", dim=0),
}


@pytest.mark.parametrize("grouping", GROUPINGS.values(), ids=list(GROUPINGS))
@pytest.mark.parametrize("backend", BACKENDS)
def test_components(backend, grouping):
    ours, theirs = twins([(16, 65), (65,), (70, 130), (7,)])
    optimizer = ComponentClipAdamW(named(ours), lr=LR, max_norm=CAP, components=grouping, backend=backend)
    clipper = ComponentClipper(named(theirs), CAP, components=grouping, backend="reference")
    plain = torch.optim.AdamW(theirs, lr=LR)
    results = []

    def clip_and_step():
        results.append(clipper.clip_())
        plain.step()

    run(3, (ours, optimizer.step), (theirs, clip_and_step))
    assert_stepped_alike(ours, theirs, 3, LR)
    assert optimizer.last.names == results[-1].names
    assert_norms(optimizer.last.norms, results[-1].norms, torch.float32)
    torch.testing.assert_close(optimizer.last.coefs, results[-1].coefs, rtol=2e-6, atol=0)


# (parameter, gradient, state); None: the parameter's.
DTYPES = [
    (torch.bfloat16, None, None),
    (torch.bfloat16, None, torch.float32),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float16, None, None),
    (torch.float16, torch.float32, None),
    (torch.float16, None, torch.float32),
    (torch.float32, torch.bfloat16, None),
    (torch.float32, torch.float64, None),
    (torch.float64, torch.float32, None),
]


@pytest.mark.filterwarnings("ignore:.*grad_dtype.*")
@pytest.mark.parametrize(("dtype", "grad_dtype", "state_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("backend", [None, "foreach"])
def test_dtypes_equal_the_definition(backend, dtype, grad_dtype, state_dtype):
    ours, theirs = twins(SHAPES, dtype)
    optimizer, definition = (
        ComponentClipAdamW(params, lr=LR, max_norm=CAP, state_dtype=state_dtype, backend=name)
        for name, params in ((backend, ours), ("reference", theirs))
    )
    for p in (*ours, *theirs):
        if grad_dtype is not None and hasattr(p, "grad_dtype"):
            p.grad_dtype = grad_dtype
    for _ in range(3):
        give_gradients(ours, theirs, dtype=grad_dtype)
        optimizer.step()
        definition.step()
    # Norms are as exact as gradients.
    exact = torch.float32 if dtype == torch.float64 else dtype
    assert_stepped_alike(ours, theirs, 3, LR, dtype=exact)
    kept = state_dtype or dtype
    assert {t.dtype for t in (optimizer.state[ours[0]][n] for n in ("exp_avg", "exp_avg_sq"))} == {kept}
    assert_stepped_alike(states_of(optimizer, ours), states_of(definition, theirs), 3, 1.0, dtype=exact)


def laid_out(shape, how):
    """A parameter in a memory layout that isn't the plain one."""
    if how == "channels_last":
        return nn.Parameter(random_grad(shape).contiguous(memory_format=torch.channels_last))
    if how == "transposed":
        return nn.Parameter(random_grad(shape).transpose(0, 1))
    if how == "misaligned":
        return nn.Parameter(random_grad((math.prod(shape) + 1,))[1:].view(shape))
    return nn.Parameter(random_grad((*shape, 2))[..., 0])  # with gaps


@pytest.mark.parametrize("grad_is_plain", [False, True])
@pytest.mark.parametrize("how", ["channels_last", "transposed", "misaligned", "gaps"])
@pytest.mark.parametrize("backend", [None, "foreach"])
def test_layouts(backend, how, grad_is_plain):
    ours = [laid_out((6, 5, 4, 3), how)]
    theirs = [nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format)) for p in ours]
    optimizer = ComponentClipAdamW(ours, lr=LR, max_norm=CAP, backend=backend)
    clipper, plain = ComponentClipper(theirs, CAP), torch.optim.AdamW(theirs, lr=LR)
    for _ in range(3):
        give_gradients(ours, theirs)
        if grad_is_plain:
            for p in ours:
                p.grad = p.grad.contiguous()
        before = ours[0].stride()
        optimizer.step()
        clipper.clip_()
        plain.step()
        assert ours[0].stride() == before
    assert_stepped_alike(ours, theirs, 3, LR)


@pytest.mark.parametrize("backend", BACKENDS)
def test_norms_are_component_norms_to_the_bit(backend):
    params, _ = twins(SHAPES)
    give_gradients(params)
    expected = component_norms(params, backend=backend)
    optimizer = ComponentClipAdamW(params, max_norm=CAP, backend=backend)
    before = [p.grad.clone() for p in params]
    optimizer.step()
    assert same_bits(optimizer.last.norms, expected)
    assert all(same_bits(p.grad, grad) for p, grad in zip(params, before, strict=True))  # gradients aren't written


@pytest.mark.parametrize("backend", BACKENDS)
def test_below_its_cap_a_component_is_stepped_as_if_there_were_none(backend):
    clipped, free = twins(SHAPES)
    caps = [1e9 if i % 2 == 0 else CAP for i in range(len(SHAPES))]
    some = ComponentClipAdamW(clipped, max_norm=torch.tensor(caps, device=DEVICE), backend=backend)
    none = ComponentClipAdamW(free, max_norm=math.inf, backend=backend)
    run(3, (clipped, some.step), (free, none.step))
    for i, (a, b) in enumerate(zip(clipped, free, strict=True)):
        assert same_bits(a, b) == (i % 2 == 0 or a.numel() == 0), i


@pytest.mark.parametrize("correct_bias", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_bias_correction(backend, correct_bias):
    """A first step by hand: m = (1 - b1) g, v = (1 - b2) g^2."""
    params, before = twins([(5,), (7, 3)], torch.float64)
    optimizer = ComponentClipAdamW(
        params, lr=LR, max_norm=CAP, correct_bias=correct_bias, weight_decay=0.1, backend=backend
    )
    give_gradients(params)
    optimizer.step()
    for p, old in zip(params, before, strict=True):
        g = p.grad * min(1.0, CAP / (p.grad.norm().item() + 1e-6))
        m, root = (1 - 0.9) * g, (1 - 0.999) ** 0.5 * g.abs()
        change = g / (g.abs() + 1e-8) if correct_bias else m / (root + 1e-8)
        torch.testing.assert_close(p.detach(), (1 - LR * 0.1) * old.detach() - LR * change, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("policy", ["propagate", "zero", "skip"])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nonfinite_gradients_stay_in_their_component(backend, bad, policy):
    ours, theirs = twins([(9,), (50, 7), (6,)])
    optimizer = ComponentClipAdamW(ours, lr=LR, max_norm=CAP, nonfinite=policy, backend=backend)
    clipper = ComponentClipper(theirs, CAP, nonfinite=policy, backend="reference")
    plain = torch.optim.AdamW(theirs, lr=LR)
    give_gradients(ours, theirs)
    for each in (ours, theirs):
        each[1].grad[3, 2] = bad
    optimizer.step()
    clipper.clip_()
    plain.step()
    assert_stepped_alike(ours, theirs, 1, LR)
    assert ours[0].isfinite().all()
    assert ours[1].isfinite().all() == (policy == "zero")


@pytest.mark.parametrize("components", [None, "all"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_error_leaves_every_bit(backend, components):
    params, before = twins([(9,), (50, 7), (6,)])
    optimizer = ComponentClipAdamW(params, max_norm=CAP, nonfinite="error", components=components, backend=backend)
    give_gradients(params)
    params[1].grad[3, 2] = math.nan
    with pytest.raises(RuntimeError, match="non-finite for 1 of"):
        optimizer.step()
    assert all(map(same_bits, params, before))
    assert all(state["step"] == 0 for state in optimizer.state.values())
    params[1].grad[3, 2] = 0.0
    optimizer.step()  # goes on
    assert not any(map(same_bits, params, before))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_that_comes_and_goes_has_its_own_count(backend):
    ours, theirs = twins([(9,), (50, 7), (6,)])
    optimizer = ComponentClipAdamW(ours, lr=LR, max_norm=CAP, backend=backend)
    clipper, plain = ComponentClipper(theirs, CAP), torch.optim.AdamW(theirs, lr=LR)
    for turn in range(6):
        give_gradients(ours, theirs)
        if turn % 2:
            ours[1].grad = theirs[1].grad = None
        optimizer.step()
        clipper.clip_()
        plain.step()
    assert_stepped_alike(ours, theirs, 6, LR)
    assert [optimizer.state[p]["step"].item() for p in ours] == [6, 3, 6]


@pytest.mark.parametrize("backend", FUSED)
def test_what_a_named_backend_cant_step_is_refused_before_anything_changes(backend):
    params, before = twins([(9,), (50, 7)])
    optimizer = ComponentClipAdamW(params, max_norm=CAP, backend=backend)
    give_gradients(params)
    params[1].grad = params[1].grad.t().contiguous().t()  # another layout than its parameter's
    with pytest.raises(RuntimeError, match=f"backend='{backend}' .*(strides|layout)"):
        optimizer.step()
    assert all(map(same_bits, params, before))


def test_sparse_gradients_are_refused_like_torch():
    layer = nn.Embedding(5, 3, sparse=True)
    optimizer = ComponentClipAdamW(layer.parameters(), max_norm=CAP)
    layer(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()


def test_complex_parameters():
    values = torch.randn(40, dtype=torch.complex64, device=DEVICE)
    ours, theirs = [nn.Parameter(values.clone())], [nn.Parameter(values.clone())]
    optimizer = ComponentClipAdamW(ours, lr=LR, max_norm=CAP)
    clipper, plain = ComponentClipper(theirs, CAP), torch.optim.AdamW(theirs, lr=LR)
    for _ in range(3):
        give_gradients(ours, theirs)
        optimizer.step()
        clipper.clip_()
        plain.step()
    real = [[torch.view_as_real(p.detach()) for p in params] for params in (ours, theirs)]
    assert_stepped_alike(*real, 3, LR)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_as_exact_as_torchs_fused_step(options):
    """Over random models and ``STEPS`` steps, against torch's loop in float64."""
    shapes = [tuple(torch.randint(1, 40, (1 + i % 2,)).tolist()) for i in range(12)]
    ours, theirs = twins(shapes)
    exact = [nn.Parameter(p.detach().double()) for p in theirs]
    optimizer = ComponentClipAdamW(ours, lr=LR, max_norm=CAP, **options)
    fused = torch.optim.AdamW(theirs, lr=LR, fused=True, **options)
    loop = torch.optim.AdamW(exact, lr=LR, foreach=False, **options)
    clippers = [ComponentClipper(params, CAP) for params in (theirs, exact)]
    for _ in range(STEPS):
        give_gradients(ours, theirs)
        for p, q in zip(exact, ours, strict=True):
            p.grad = q.grad.double()
        optimizer.step()
        for clipper, other in zip(clippers, (fused, loop), strict=True):
            clipper.clip_()
            other.step()

    def error(params):
        return max((p.double() - e).abs().max().item() for p, e in zip(params, exact, strict=True))

    assert error(ours) <= 1.1 * error(theirs) + 5e-7  # two units in the last place of a parameter of 4


class Allocations(TorchDispatchMode):
    """Counts the bytes of all tensors that operators make."""

    made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and func._schema.is_mutable is False:
            self.made += result.untyped_storage().nbytes()
        return result


@pytest.mark.usefixtures("needs_extension")
@pytest.mark.parametrize("options", [{}, {"nonfinite": "error"}], ids=str)
def test_needs_no_memory_beyond_the_states(options):
    if DEVICE != "cpu":
        pytest.skip("test_step_gpu.py asks the allocator")
    params, _ = twins([(1000, 1000), (77,), (300, 300)])
    optimizer = ComponentClipAdamW(params, max_norm=CAP, **options)
    run(1, (params, optimizer.step))
    with Allocations() as found:
        optimizer.step()
    assert 0 < found.made < 1000


@pytest.mark.parametrize("betas", [(0.0, 0.99), (0.3, 0.5), (0.5, 0.0)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_small_betas_forget_large_gradients(backend, betas):
    """With beta1 = 0 the mean is the gradient, though the last one was 1e9 times as large."""
    ours, theirs = twins([(33,), (7, 3)])
    optimizer = ComponentClipAdamW(ours, lr=LR, betas=betas, max_norm=math.inf, backend=backend)
    plain = torch.optim.AdamW(theirs, lr=LR, betas=betas)
    for scale in (1e9, 1.0, 1e-3, 1e6):
        give_gradients(ours, theirs, scale=scale)
        optimizer.step()
        plain.step()
        for p, q in zip(ours, theirs, strict=True):
            mean, expected = optimizer.state[p]["exp_avg"], plain.state[q]["exp_avg"]
            torch.testing.assert_close(mean, expected, rtol=1e-6, atol=1e-6 * scale)
            assert betas[0] > 0 or torch.equal(mean, p.grad)
    assert_stepped_alike(ours, theirs, 4, LR)
