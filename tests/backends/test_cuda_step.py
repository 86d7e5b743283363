"""An optimizer's step by the CUDA kernels: dtypes, layouts and machines, and what lies on the device between steps.

On the CPU, as in test_cuda_kernels.py; what holds for every backend is in tests/optim/.
"""

import math
import random
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from cwclip_kernels import ComponentSpec
from cwclip_kernels.backends import native
from cwclip_kernels.optim import ComponentClipAdamW, adamw
from cwclip_kernels.thresholds import Threshold
from helpers import DEVICE, random_grad, same_bits
from seed import SEED
from stepping import assert_stepped_alike, give_gradients, states_of, twins

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="about a machine that a GPU isn't; see test_cuda_gpu.py")

LR, CAP, STEPS = 1e-2, 0.5, 2
TILE_BYTES = 32 * 1024  # csrc/cuda/program.h
RULES = 56  # that travel in one launch's parameters (csrc/cuda/step.h)
FEW, MANY = 464, 4048  # gradients that one launch can address

# (parameter, gradient, states): every combination that has a kernel.
COMBINATIONS = [(torch.float32,) * 3, (torch.float64,) * 3]
COMBINATIONS += [
    (half, grad, state)
    for half in (torch.bfloat16, torch.float16)
    for grad in (half, torch.float32)
    for state in (half, torch.float32)
]


def pair(ours, theirs, max_norm=CAP, **options):
    """An optimizer on the kernels, and the definition; each with its own parameters."""
    return [
        ComponentClipAdamW(params, LR, max_norm=max_norm, backend=backend, **options)
        for params, backend in ((ours, "cuda"), (theirs, "reference"))
    ]


def check(ours, theirs, optimizers, steps=STEPS, grad_dtype=None, gradients=give_gradients, lr=3 * LR):
    """Some steps of both, which have to agree. Gradients stay as they are, and the workspace is zero again.

    ``lr``: what the largest update of a parameter is about, and three times that where two steps may add up.
    """
    for _ in range(steps):
        gradients(ours, theirs, dtype=grad_dtype)
        before = [p.grad.clone() for p in ours]
        for optimizer in optimizers:
            optimizer.step()
        assert all(same_bits(p.grad, grad) for p, grad in zip(ours, before, strict=True))
        for state in kernel_states(optimizers[0]):
            for workspace in state.workspaces.values():
                assert not workspace[: native._C.partials_at(state.program)].any()
    exact = ours[0].dtype
    assert_stepped_alike(ours, theirs, steps, lr, dtype=exact)
    assert_stepped_alike(states_of(optimizers[0], ours), states_of(optimizers[1], theirs), steps, 1.0, dtype=exact)


def buckets_of(optimizer):
    return [
        bucket
        for unit in optimizer._units()
        for plans in unit.session.plans._kept.values()
        for plan in plans
        for bucket in plan.buckets
    ]


def kernel_states(optimizer):
    return [bucket.state for bucket in buckets_of(optimizer) if bucket.state is not None]


def with_grad_dtype(params, dtype):
    for p in params:
        if dtype != p.dtype and hasattr(p, "grad_dtype"):
            p.grad_dtype = dtype


def state_of(p, dtype, like=torch.zeros_like, amsgrad=False):
    """A state as the optimizer makes it; or with its tensors laid out another way."""
    names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * amsgrad
    return {"step": torch.zeros(()), **{name: like(p.detach(), dtype=dtype) for name in names}}


# -------------------------------------------------------------------------------------------------------
# Elements
# -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*grad_dtype.*")
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(("dtype", "grad_dtype", "state_dtype"), COMBINATIONS, ids=str)
def test_sizes_around_packets_and_tiles(dtype, grad_dtype, state_dtype, amsgrad, machine):
    tile = TILE_BYTES // grad_dtype.itemsize
    sizes = (0, 1, 3, 4, 5, 8, 1023, 1025, 2 * 256 * 4 + 1, tile - 1, tile + 1, 2 * tile + 7)
    ours, theirs = twins([*((size,) for size in sizes), ()], dtype)
    with_grad_dtype([*ours, *theirs], grad_dtype)
    wide = torch.float32 if state_dtype != dtype else None
    options = {"amsgrad": amsgrad, "state_dtype": wide, "maximize": amsgrad, "weight_decay": 0.1}
    check(ours, theirs, pair(ours, theirs, **options), grad_dtype=grad_dtype)


@pytest.mark.filterwarnings("ignore:.*grad_dtype.*")
# Whose tensors begin elsewhere than the others of their parameter: p, m, v, w, g; none; each.
@pytest.mark.parametrize("apart", ["p", "m", "v", "w", "g", "", "pmvwg"])
@pytest.mark.parametrize(("dtype", "grad_dtype", "state_dtype"), COMBINATIONS, ids=str)
def test_every_misalignment(dtype, grad_dtype, state_dtype, apart, gpu):
    """Tensors that begin some elements after a boundary, all as many or not."""
    bases = []

    def shifted(by, value):
        base = random_grad((value.numel() + by + 3,), value.dtype)
        bases.append((base, base.clone(), by, value.numel()))
        return base[by : by + value.numel()].copy_(value)

    def places(i):
        return [i + (name in apart) * (1 + k) for k, name in enumerate("pmvwg")]

    sizes = (1, 7, 40, 1500, 1499, 1498, 33, 1497, 1100)  # by how far they are shifted, too
    ours, theirs = twins([(size,) for size in sizes], dtype)
    ours = [nn.Parameter(shifted(places(i)[0], p.detach())) for i, p in enumerate(ours)]
    with_grad_dtype([*ours, *theirs], grad_dtype)
    wide = torch.float32 if state_dtype != dtype else None
    optimizers = pair(ours, theirs, state_dtype=wide, amsgrad=True)
    for i, p in enumerate(ours):
        starts = iter(places(i)[1:])
        optimizers[0].state[p] = {
            name: value if name == "step" else shifted(next(starts), value)
            for name, value in state_of(p, state_dtype, amsgrad=True).items()
        }

    def gradients(*lists, dtype):
        give_gradients(*lists, dtype=dtype)
        for i, p in enumerate(ours):
            p.grad = shifted(places(i)[4], p.grad)

    check(ours, theirs, optimizers, grad_dtype=grad_dtype, gradients=gradients)
    assert optimizers[0].state[ours[-1]]["exp_avg"].abs().sum() > 0  # of ours, not made anew
    for base, before, start, size in bases:
        assert same_bits(base[:start], before[:start])
        assert same_bits(base[start + size :], before[start + size :])


def laid_out(shape, how, dtype):
    values = random_grad((*shape, 3), dtype)
    if how == "gaps":
        return values[..., 1]
    if how == "channels_last":
        return values[..., 0].contiguous(memory_format=torch.channels_last)
    return values[..., 0].contiguous().transpose(0, 1)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("how", ["channels_last", "transposed", "gaps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_layouts(dtype, how, amsgrad, machine):
    ours = [nn.Parameter(laid_out(shape, how, dtype)) for shape in ((6, 5, 4, 3), (2, 3, 1, 1), (20, 30, 7, 5))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    optimizers = pair(ours, theirs, amsgrad=amsgrad)

    def alike(p, dtype):
        return torch.empty_strided(p.shape, p.stride(), dtype=dtype).zero_()

    for p in ours:
        optimizers[0].state[p] = state_of(p, dtype, alike, amsgrad)

    def gradients(*lists, dtype):
        give_gradients(*lists)
        for p in ours:
            p.grad = alike(p, p.dtype).copy_(p.grad)

    check(ours, theirs, optimizers, gradients=gradients)
    assert {p.grad.stride() == p.stride() for p in ours} == {True}


SLICES = {
    "rows": ComponentSpec().split("*", (90, 7, 200 - 97), dim=0),
    "columns": ComponentSpec().split("*", (20, 1, 129), dim=1),
    "units": ComponentSpec("all").unitwise("*", dim=1),
}


@pytest.mark.parametrize("components", SLICES.values(), ids=list(SLICES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_slices_are_stepped_each_by_its_own_coefficient(dtype, components, machine):
    ours, theirs = twins([(200, 150)], dtype)
    optimizers = pair(ours, theirs, components=components, amsgrad=True)
    check(ours, theirs, optimizers)
    assert optimizers[0].state[ours[0]]["step"] == STEPS  # once a gradient, however many slices it has
    assert (optimizers[0].last.coefs < 1).any()


@pytest.mark.parametrize("count", [FEW, FEW + 1, MANY + 1])
def test_as_many_gradients_as_one_launch_can_address_and_more(count, gpu):
    ours, theirs = twins([(i % 3 + 1,) for i in range(count)])
    optimizers = pair(ours, theirs, components=lambda name, p: int(name) % 50)
    check(ours, theirs, optimizers, steps=1)
    before = gpu.launches()
    optimizers[0].step()
    assert gpu.launches() - before == 2 * math.ceil(count / MANY) + 1


def test_the_order_of_blocks_changes_no_bit(gpu):
    start, _ = twins([(3,), (30000,), (9000,)])
    give_gradients(start)
    results = []
    for processors, resident, seed in ((1, 1, 0), (2, 4, 1), (2, 4, 2), (5, 3, 3)):
        gpu.set_machine(processors, resident, seed)
        params = [nn.Parameter(p.detach().clone()) for p in start]
        for p, q in zip(params, start, strict=True):
            p.grad = q.grad.clone()
        optimizer = ComponentClipAdamW(params, LR, max_norm=CAP, backend="cuda", components="all")
        optimizer.step()
        results.append([p.detach() for p in params] + states_of(optimizer, params))
    for other in results[1:]:
        assert all(map(same_bits, results[0], other))


# -------------------------------------------------------------------------------------------------------
# Rules
# -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [3, RULES, RULES + 1, 2 * RULES + 5])
def test_param_groups_each_with_its_own_hyperparameters(count, gpu):
    ours, theirs = twins([(5 + i % 40,) for i in range(2 * count)])

    def groups(params):
        own = random.Random(SEED)
        for i in range(count):
            yield {
                "params": [params[i], params[-1 - i]],
                "lr": LR * own.random(),
                "betas": (own.random(), 0.9 + 0.1 * own.random()),
                "eps": 10.0 ** own.randint(-9, -3),
                "weight_decay": own.random(),
                **{name: own.random() < 0.5 for name in ("amsgrad", "maximize", "correct_bias")},
            }

    optimizers = pair(list(groups(ours)), list(groups(theirs)))
    check(ours, theirs, optimizers, lr=100 * LR)  # betas of any size make for large updates
    assert [optimizers[0].state[p]["step"] for p in ours] == [STEPS] * len(ours)


def keeping_lr():
    """As where tensors of learning rates are on the GPU: not read on the host."""
    read = adamw.rule_of
    return mock.patch.object(adamw, "rule_of", lambda group: read({**group, "lr": 0.0})._replace(lr=group["lr"]))


@pytest.mark.parametrize("nonfinite", ["propagate", "error"])  # in one phase, in two
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_learning_rate_on_the_device_is_read_when_the_step_runs(dtype, nonfinite, gpu):
    ours, theirs = twins([(9,), (70, 50)])
    rate = torch.tensor([0.0], dtype=dtype)
    optimizers = pair(ours, theirs, nonfinite=nonfinite)
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = rate
    for value in (LR, 3 * LR, LR / 7):
        rate.fill_(value)
        give_gradients(ours, theirs)
        with keeping_lr(), mock.patch.object(Tensor, "item", side_effect=AssertionError("a host sync")):
            optimizers[0].step()
        optimizers[1].step()
    assert_stepped_alike(ours, theirs, 3, LR)


@pytest.mark.parametrize("state", [torch.float32, torch.float64])
def test_step_counts_of_either_dtype(state, gpu):
    ours, theirs = twins([(9,), (70, 50)])
    optimizers = pair(ours, theirs)
    for optimizer, params in zip(optimizers, (ours, theirs), strict=True):
        for i, p in enumerate(params):
            optimizer.state[p] = {**state_of(p, p.dtype), "step": torch.tensor(1e5 + i, dtype=state)}
    check(ours, theirs, optimizers, steps=1)
    assert [optimizers[0].state[p]["step"].item() for p in ours] == [1e5 + 1, 1e5 + 2]


# -------------------------------------------------------------------------------------------------------
# What may stop a step
# -------------------------------------------------------------------------------------------------------


def everything(optimizer, params):
    return [t.clone() for t in (*(p.detach() for p in params), *states_of(optimizer, params))]


class Fixed(Threshold):
    """Caps that come after norms."""

    needs_norms = True

    def caps(self, device, norms):
        return torch.tensor(CAP, dtype=torch.float64, device=device)


@pytest.mark.parametrize("max_norm", [CAP, Fixed()], ids=["one phase", "two phases"])
@pytest.mark.parametrize("found", [1.0, math.nan])
def test_a_step_that_is_skipped_leaves_every_bit(found, max_norm, machine):
    params, _ = twins([(9,), (70, 500), ()])
    optimizer = ComponentClipAdamW(params, LR, max_norm=max_norm, amsgrad=True, backend="cuda")
    give_gradients(params)
    optimizer.step()
    before = everything(optimizer, params)
    give_gradients(params)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(found)
    optimizer.step()
    assert all(map(same_bits, everything(optimizer, params), before))
    expected = torch.stack([p.grad.norm() / 4 for p in params])
    torch.testing.assert_close(optimizer.last.norms, expected)  # are measured all the same
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert not any(map(same_bits, (p.detach() for p in params), before))


@pytest.mark.parametrize("max_norm", [CAP, Fixed()], ids=["one phase", "two phases"])
@pytest.mark.parametrize("policy", ["propagate", "zero", "skip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nonfinite_gradients_in_one_phase_and_in_two(dtype, policy, max_norm, machine):
    ours, theirs = twins([(100,), (9000,), (20000,), (33,)], dtype)
    optimizers = pair(ours, theirs, max_norm, nonfinite=policy)

    def gradients(*lists, dtype):
        give_gradients(*lists)
        for params in lists:
            params[2].grad[777] = math.inf
            params[3].grad[0] = math.nan

    check(ours, theirs, optimizers, gradients=gradients)
    assert ours[2].isfinite().all() == (policy == "zero")
    assert all(p.isfinite().all() for p in ours[:2])


def test_a_largest_mean_that_is_nan_stays(gpu):
    ours, theirs = twins([(9,), (70, 50)])
    optimizers = pair(ours, theirs, amsgrad=True)
    for optimizer, params in zip(optimizers, (ours, theirs), strict=True):
        for p in params:
            optimizer.state[p] = state_of(p, p.dtype, amsgrad=True)
            optimizer.state[p]["max_exp_avg_sq"].view(-1)[[0, -1]] = math.nan
    check(ours, theirs, optimizers)
    assert all(p.isnan().sum() == 2 for p in ours)


@pytest.mark.parametrize("max_norm", [CAP, Fixed(), math.inf], ids=["one phase", "two phases", "no cap"])
def test_gradients_of_a_scaled_loss(max_norm, gpu):
    ours, theirs = twins([(9,), (70, 500)])
    optimizers = pair(ours, theirs, max_norm)
    for optimizer in optimizers:
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    check(ours, theirs, optimizers)


def test_two_phases_take_their_norms_first(gpu):
    ours, theirs = twins([(9,), (70, 500), (0,)])
    optimizers = pair(ours, theirs, nonfinite="error")
    check(ours, theirs, optimizers)
    before = gpu.launches()
    optimizers[0].step()
    assert gpu.launches() - before == 3  # norms, what follows from t, the update
