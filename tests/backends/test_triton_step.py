"""ComponentClipAdamW by Triton kernels against the definition: interpreted on the CPU where there is no GPU."""

import copy
import math

import pytest
import torch

from adamw_steps import LR, Pair, assert_stepped, default_dtype_of, layout_copy, random_like
from cwclip_kernels import ComponentSpec, component_norms
from cwclip_kernels.backends import triton_tables
from cwclip_kernels.optim import ComponentClipAdamW
from helpers import DEVICE, DTYPES, random_grad, same_bits

pytestmark = [pytest.mark.usefixtures("needs_triton"), pytest.mark.parametrize("backend", ["triton"])]

# Nothing, one element, less than a 16-byte vector, around one block of a program, several blocks.
SHAPES = ((0,), (), (3,), (5, 7), (1023,), (1025,), (2500,))


OPTIONS = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True, "betas": (0.0, 0.5)},
    "uncorrected": {"correct_bias": False, "weight_decay": 0.0},
    "float32 states": {"state_dtype": torch.float32, "amsgrad": True},
    "measured only": {"max_norm": math.inf},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_as_the_definition(backend, dtype, options):
    with default_dtype_of(dtype):
        pair = Pair(backend, [random_grad(shape, dtype) for shape in SHAPES], **OPTIONS[options])
        for _ in range(3):
            pair.step()
    clipped = pair.ours.last.coefs < 1
    assert clipped.any() == (options != "measured only")
    assert not clipped.all()


# With no cap it is torch's own AdamW.
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_as_torch(backend, dtype, amsgrad):
    first = [random_grad((n,), dtype) for n in (7, 300)]
    params = [[torch.nn.Parameter(t.clone()) for t in first] for _ in range(2)]
    options = {"lr": LR, "weight_decay": 0.1, "amsgrad": amsgrad}
    ours = ComponentClipAdamW(params[0], max_norm=math.inf, backend=backend, **options)
    theirs = torch.optim.AdamW(params[1], **options)
    for _ in range(4):
        for a, b in zip(*params, strict=True):
            a.grad = random_like(a)
            b.grad = a.grad.clone()
        ours.step()
        theirs.step()
    for a, b in zip(*params, strict=True):
        assert_stepped(a, b)
        assert ours.state[a]["step"] == 4


def test_groups_have_their_own_hyperparameters(backend):
    groups = [
        {"lr": 0.2, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.0},
        {"lr": 0.05, "betas": (0.9, 0.99), "amsgrad": True, "weight_decay": 0.1},
        {"lr": torch.tensor(0.3, device=DEVICE), "maximize": True},
        {"lr": torch.tensor(0.1, dtype=torch.float64, device=DEVICE), "correct_bias": False},
        {"lr": torch.tensor([0.25], dtype=torch.bfloat16, device=DEVICE), "amsgrad": True, "max_norm": 0.5},
    ]
    tensors = [
        random_grad((n,), dtype) for n in (20, 70) for dtype in (torch.float32, torch.bfloat16) for _ in groups
    ]

    def grouped(named):
        return [{"params": named[i :: len(groups)], **group} for i, group in enumerate(groups)]

    pair = Pair(backend, tensors, grouped)
    for _ in range(2):
        pair.step()


def test_a_learning_rate_that_is_a_tensor_is_read_at_every_step(backend):
    lr = torch.tensor(0.1, device=DEVICE)
    pair = Pair(backend, [random_grad((30,))], lr=lr)
    pair.step()
    before = layout_copy(pair.params[0][0])
    lr.fill_(0.0)
    pair.step()
    assert same_bits(pair.params[0][0].detach(), before)
    lr.fill_(0.5)
    pair.step()
    assert (pair.params[0][0] - before).abs().max() > 0.1


def test_hyperparameters_change_between_steps(backend):
    pair = Pair(backend, [random_grad((30,)), random_grad((9,))])
    scheduled = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (pair.ours, pair.theirs)]
    for beta in (0.9, 0.5, 0.0):
        for optimizer in (pair.ours, pair.theirs):
            optimizer.param_groups[0]["betas"] = (beta, 0.99)
            optimizer.param_groups[0]["weight_decay"] = beta
            optimizer.param_groups[0]["eps"] = 0.1 * beta
        pair.step()
        for scheduler in scheduled:
            scheduler.step()


COMPONENTS = {
    "parameter": "parameter",
    "module": "module",
    "type": "type",
    "all": "all",
    "split": ComponentSpec("parameter").split("*.3.w", sizes=(4, 2, 6), names=("q", "k", "v"), dim=0),
    "split inside": ComponentSpec("parameter").split("*.3.w", sizes=5, dim=1),
    "unitwise": ComponentSpec("parameter").unitwise("*.w", dim=0),
    "unitwise inside": ComponentSpec("parameter").unitwise("*.3.w", dim=1),
}


@pytest.mark.parametrize("components", COMPONENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_components(backend, dtype, components):
    tensors = [random_grad(shape, dtype) for shape in ((10,), (8, 6), (1, 4), (12, 10))]
    pair = Pair(backend, tensors, components=COMPONENTS[components], state_dtype=torch.float32, amsgrad=True)
    for _ in range(2):
        pair.step()


def test_parameters_without_component_are_stepped_unclipped(backend):
    tensors = [random_grad((10,), scale=10.0), random_grad((20,), scale=10.0)]
    pair = Pair(backend, tensors, components=lambda name, _: name if "0" in name else None)
    pair.step()
    assert len(pair.ours.last.names) == 1


def test_a_parameter_without_gradient_keeps_its_bits(backend):
    pair = Pair(backend, [random_grad((10,)), random_grad((20,))])
    pair.step()
    before = layout_copy(pair.params[0][0])
    for with_gradient in (False, True):
        for params, optimizer in zip(pair.params, (pair.ours, pair.theirs), strict=True):
            params[0].grad = torch.ones(10, device=DEVICE) if with_gradient else None
            params[1].grad = torch.ones(20, device=DEVICE)
            optimizer.step()
        pair.check()
        assert same_bits(pair.params[0][0].detach(), before) != with_gradient


# Tiles of 64 bytes of gradient cut everything; their starts are whole 16-byte vectors.
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_of_many_tiles(backend, dtype, monkeypatch):
    monkeypatch.setattr(triton_tables, "STEP_TILE_BYTES", 64)
    monkeypatch.setattr(triton_tables, "SUM_TILE_BYTES", 64)
    monkeypatch.setattr(triton_tables, "CHUNK", 4)
    with default_dtype_of(dtype):
        pair = Pair(backend, [random_grad((n,), dtype) for n in (1, 31, 32, 33, 300)])
        pair.step()


def test_several_tiles_of_several_blocks(backend):
    tile = triton_tables.STEP_TILE_BYTES // 4
    Pair(backend, [random_grad((2 * tile + 5,))]).step()


def test_dense_layouts(backend):
    tensors = [
        random_grad((4, 6, 5, 3)).to(memory_format=torch.channels_last),
        random_grad((17, 33)).t(),
        random_grad((6, 4, 5)).permute(2, 0, 1),
    ]
    pair = Pair(backend, tensors, components=ComponentSpec("parameter").split("*.1.w", sizes=11, dim=0))
    pair.step()
    assert all(p.stride() == t.stride() for p, t in zip(pair.params[0], tensors, strict=True))


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("nonfinite", ["propagate", "zero", "skip"])
def test_nonfinite_values_stay_in_their_component(backend, nonfinite, p):
    pair = Pair(backend, [random_grad((300,)) for _ in range(5)], nonfinite=nonfinite, norm_type=p, amsgrad=True)
    grads = [random_grad((300,)) for _ in range(5)]
    grads[1][123] = math.inf
    grads[2][5] = math.nan
    grads[3][0] = -math.inf
    pair.step(grads)
    bad = [bool((~p.isfinite()).any()) for p in pair.params[0]]
    assert bad == [False, *[nonfinite != "zero"] * 3, False]
    if nonfinite == "zero":
        for i in (1, 2, 3):
            assert not pair.ours.state[pair.params[0][i]]["exp_avg"].any()


@pytest.mark.parametrize("components", ["all", "parameter"])
def test_norms_have_the_bits_of_component_norms(backend, components):
    for dtype in (torch.float32, torch.bfloat16):
        pair = Pair(backend, [random_grad((n,), dtype) for n in (5, 700, 40_000)], components=components)
        pair.step(check=False)
        expected = component_norms(pair.params[0], components=components, backend=backend)
        assert same_bits(pair.ours.last.norms, expected)


def test_gradients_are_never_written(backend):
    param = torch.nn.Parameter(random_grad((100,)))
    optimizer = ComponentClipAdamW([param], max_norm=1e-3, backend=backend)
    grad = random_grad((100,))
    param.grad = grad.clone()
    optimizer.step()
    assert optimizer.last.coefs < 0.1
    assert same_bits(param.grad, grad)


# What isn't clipped is stepped as if there were no cap, to the bit; and in two phases as in one.
@pytest.mark.parametrize("options", [{"max_norm": 1e9}, {"max_norm": math.inf, "nonfinite": "error"}])
def test_a_coefficient_of_1_changes_no_bit(backend, options):
    tensors = [random_grad((n,), dtype) for n in (5, 700) for dtype in (torch.float32, torch.bfloat16)]
    pair = Pair(backend, tensors, other=backend, max_norm=math.inf)
    other = Pair(backend, tensors, other=backend, **options)
    for _ in range(2):
        grads = [random_like(p) for p in tensors]
        pair.step(grads, check=False)
        other.step(grads, check=False)
    assert all(map(same_bits, *([p.detach() for p in x.params[0]] for x in (pair, other))))


def test_a_skipped_step_changes_no_bit(backend):
    pair = Pair(
        backend, [random_grad((n,), dtype) for n in (40, 3) for dtype in (torch.float32, torch.float16)], amsgrad=True
    )
    for found in (0.0, 1.0, 0.0):
        written = [t for p in pair.params[0] for t in (p.detach(), *pair.ours.state[p].values())]
        before = [t.clone() for t in written]
        for optimizer in (pair.ours, pair.theirs):
            optimizer.grad_scale = torch.tensor(4.0, device=DEVICE)
            optimizer.found_inf = torch.tensor(found, device=DEVICE)
        grads = [random_like(p) for p in pair.params[0]]
        if found:
            grads[0][5] = math.inf
        pair.step(grads)
        assert found == 0.0 or all(map(same_bits, written, before))
        assert pair.ours.last.norms.isfinite().all() == (found == 0.0)
    assert pair.ours.state[pair.params[0][0]]["step"] == 2


def test_states_move(backend):
    pair = Pair(backend, [random_grad((30,)), random_grad((5,))], amsgrad=True)
    pair.step()
    old = [t for p in pair.params[0] for t in pair.ours.state[p].values()]
    before = [t.clone() for t in old]
    for optimizer in (pair.ours, pair.theirs):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    pair.step()
    assert all(map(same_bits, old, before))  # nothing was written where they lay


def test_a_refused_step_raises_before_anything_is_written(backend):
    params = [torch.nn.Parameter(random_grad((4, 6))) for _ in range(2)]
    optimizer = ComponentClipAdamW(params, max_norm=1.0, backend=backend)
    for p in params:
        p.grad = random_grad((4, 6))
    params[1].grad = params[1].grad.t().contiguous().t()
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="backend='triton' doesn't step parameters whose memory layout"):
        optimizer.step()
    assert all(map(same_bits, [p.detach() for p in params], before))
