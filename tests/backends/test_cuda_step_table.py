"""What the CUDA backend keeps on the device between steps of an optimizer, and what it refuses."""

import copy
from unittest import mock

import pytest
import torch

from cwclip_kernels.backends import cuda
from cwclip_kernels.core.adamw import AdamWRule, AdamWStep
from cwclip_kernels.core.bucket import Bucket
from cwclip_kernels.optim import ComponentClipAdamW
from helpers import DEVICE, random_grad, same_bits
from stepping import assert_stepped_alike, give_gradients, twins

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="about a machine that a GPU isn't; see test_cuda_gpu.py")

LR, CAP = 1e-2, 0.5
SHAPES = [(9,), (70, 500), (), (0,)]


@pytest.fixture
def uploads(gpu):
    """How often a table has been made so far."""
    made = []
    real = gpu.cuda_step_table
    with mock.patch.object(gpu, "cuda_step_table", lambda *a: (made.append(1), real(*a))[1]):
        yield made


def trained(max_norm=CAP, **options):
    """Two optimizers in step, their parameters, and a function that takes one more step of both."""
    ours, theirs = twins(SHAPES)
    optimizers = [
        ComponentClipAdamW(params, LR, max_norm=max_norm, backend=backend, **options)
        for params, backend in ((ours, "cuda"), (theirs, "reference"))
    ]

    def step():
        give_gradients(ours, theirs)
        for optimizer in optimizers:
            optimizer.step()

    step()
    return ours, theirs, optimizers, step


# -------------------------------------------------------------------------------------------------------
# The table
# -------------------------------------------------------------------------------------------------------


def test_the_table_is_made_once(uploads):
    ours, theirs, optimizers, step = trained()
    for turn in range(4):  # with gradients at other addresses, and other numbers
        for optimizer in optimizers:
            optimizer.param_groups[0].update(
                lr=LR / (turn + 1), betas=(0.8, 0.9 + turn / 100), weight_decay=turn / 10
            )
        step()
    assert len(uploads) == 1
    assert_stepped_alike(ours, theirs, 5, LR)


def swap_states(optimizers, lists):
    for optimizer in optimizers:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def swap_one_state(optimizers, lists):
    for optimizer, params in zip(optimizers, lists, strict=True):
        state = optimizer.state[params[1]]
        state["exp_avg_sq"] = state["exp_avg_sq"].clone()


def swap_a_count(optimizers, lists):
    for optimizer, params in zip(optimizers, lists, strict=True):
        optimizer.state[params[0]]["step"] = torch.tensor(70.0, dtype=torch.float64)


def swap_data(optimizers, lists):
    for params in lists:
        params[1].data = params[1].data.clone()


def swap_groups(optimizers, lists):
    """The same tensors, by another group's rule."""
    for optimizer, params in zip(optimizers, lists, strict=True):
        del optimizer.param_groups[0]["params"][1]
        optimizer.add_param_group({"params": [params[1]], "lr": 5 * LR, "maximize": True})


@pytest.mark.parametrize("swap", [swap_states, swap_one_state, swap_a_count, swap_data, swap_groups])
def test_what_has_moved_is_found(swap, uploads):
    """The old memory isn't written any more, the new is."""
    ours, theirs, optimizers, step = trained()
    old = [p.data for p in ours] + [t for state in optimizers[0].state.values() for t in state.values()]
    before = [t.clone() for t in old]
    swap(optimizers, (ours, theirs))
    kept = {t.data_ptr() for t in (*ours, *(t for s in optimizers[0].state.values() for t in s.values()))}
    for _ in range(3):
        step()
    assert len(uploads) == 2
    assert_stepped_alike(ours, theirs, 4, 10 * LR)
    for t, values in zip(old, before, strict=True):
        assert t.data_ptr() in kept or same_bits(t, values)


def test_a_gradient_of_another_rule_is_found(uploads):
    params, grads = [torch.ones(5), torch.ones(5)], [torch.ones(5), torch.ones(5)]
    states = [[torch.zeros(5), torch.zeros(5)] for _ in range(2)]
    steps = [torch.zeros(()), torch.zeros(())]
    rules = tuple(AdamWRule(lr, 0.9, 0.999, 0.0, 0.0, False, False, True) for lr in (0.25, 0.5))
    bucket = Bucket(grads[0].device, "cuda", "", (0, 1), torch.tensor([0, 1]), None, 2, torch.float32, True)
    for turn, rule_of in enumerate(((0, 1), (1, 0), (1, 1))):
        before = [p.clone() for p in params]
        step = AdamWStep(params, *states, [None, None], steps, rules, rule_of)
        assert cuda.refuses_step(bucket, grads, step) is None
        cuda.adamw_(bucket, grads, step, torch.ones(2, dtype=torch.float64), False, None)
        for p, old, i in zip(params, before, rule_of, strict=True):
            torch.testing.assert_close(old - p, torch.full((5,), rules[i].lr))
        assert len(uploads) == turn + 1


def test_sets_of_gradients_have_their_own_tables(uploads):
    ours, theirs, optimizers, _ = trained()
    for turn in range(6):
        give_gradients(ours, theirs)
        if turn % 2:
            ours[1].grad = theirs[1].grad = None
        for optimizer in optimizers:
            optimizer.step()
    assert len(uploads) == 2
    assert_stepped_alike(ours, theirs, 7, LR)
    assert [optimizers[0].state[p]["step"].item() for p in ours] == [7, 4, 7, 7]


# -------------------------------------------------------------------------------------------------------
# CUDA graphs
# -------------------------------------------------------------------------------------------------------


def test_while_a_graph_is_captured_nothing_is_uploaded(gpu, uploads):
    """The stand-in has no graphs: a call that is told it is captured runs like any other."""
    capturing = mock.patch.object(gpu, "cuda_stream", return_value=(0, 0, True))
    ours, _ = twins(SHAPES)
    optimizer = ComponentClipAdamW(ours, LR, max_norm=CAP, backend="cuda")
    give_gradients(ours)
    before = [p.detach().clone() for p in ours]
    with capturing, pytest.raises(RuntimeError, match="first call with these gradients .* make one before"):
        optimizer.step()
    ours_too, theirs, optimizers, step = trained()
    with capturing:
        step()
    assert_stepped_alike(ours_too, theirs, 2, LR)
    swap_one_state(optimizers, (ours_too, theirs))
    count = len(uploads)
    with capturing, pytest.raises(RuntimeError, match="have moved.* make a step before"):
        optimizers[0].step()
    assert len(uploads) == count
    optimizers[0].step()
    assert all(map(same_bits, before, (p.detach() for p in ours)))


# -------------------------------------------------------------------------------------------------------
# Refusals
# -------------------------------------------------------------------------------------------------------


class Subclass(torch.Tensor):
    pass


def refusal(p, g, m=None, v=None, w=None, t=None, more=()):
    """What the backend says about one parameter, or two, given as their tensors."""
    m = torch.empty_strided(p.shape, p.stride(), dtype=p.dtype) if m is None else m
    v = torch.empty_strided(p.shape, p.stride(), dtype=p.dtype) if v is None else v
    rows = [(p, g, m, v, w, torch.zeros(()) if t is None else t), *more]
    params, grads, ms, vs, ws, ts = map(list, zip(*rows, strict=True))
    rule = AdamWRule(LR, 0.9, 0.999, 1e-8, 0.0, w is not None, False, True)
    step = AdamWStep(params, ms, vs, ws, ts, (rule,), (0,) * len(rows))
    places = tuple(range(len(rows)))
    bucket = Bucket(g.device, "cuda", "", places, torch.tensor(places), None, len(rows), torch.float32, True)
    reason = cuda.refuses_step(bucket, grads, step)
    assert (bucket.step_state is None) == (reason is not None)
    assert (step.addresses is None) == (reason is not None)
    return reason


F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16


def zeros(dtype=F32, shape=(4, 6)):
    return torch.zeros(shape, dtype=dtype)


ONE = zeros()
REFUSED = [
    ({"p": zeros(), "g": zeros(BF16)}, "float32 parameters with torch.bfloat16 gradients and torch.float32 states"),
    ({"p": zeros(F64), "g": zeros()}, "float64 parameters with torch.float32 gradients"),
    ({"p": zeros(F16), "g": zeros(BF16)}, "float16 parameters with torch.bfloat16 gradients"),
    ({"p": zeros(BF16), "g": zeros(F64)}, "bfloat16 parameters with torch.float64 gradients"),
    ({"p": zeros(), "g": zeros(), "m": zeros(F64), "v": zeros(F64)}, "and torch.float64 states"),
    ({"p": zeros(F64), "g": zeros(F64), "m": zeros(), "v": zeros()}, "and torch.float32 states"),
    (
        {"p": zeros(BF16), "g": zeros(BF16), "m": zeros(), "v": zeros(BF16)},
        "and torch.float32, torch.bfloat16 states",
    ),
    ({"p": zeros(BF16), "g": zeros(BF16), "w": zeros()}, "and torch.bfloat16, torch.float32 states"),
    ({"p": zeros(), "g": zeros(shape=(6, 4)).t()}, "shapes and strides only"),
    ({"p": zeros(), "g": zeros(), "v": zeros(shape=(4, 7))[:, :6]}, "shapes and strides only"),
    ({"p": zeros(), "g": zeros(), "w": zeros(shape=(24,))}, "shapes and strides only"),
    (
        {"p": zeros(), "g": zeros(), "m": torch.zeros(4, 6, device="meta")},
        "on cpu, where their gradients are, not on meta",
    ),
    ({"p": zeros(), "g": zeros(), "t": torch.zeros((), device="meta")}, "on cpu, not torch.float32 [] on meta"),
    ({"p": zeros(), "g": zeros(), "t": torch.zeros((), dtype=torch.int64)}, "not torch.int64 [] on cpu"),
    ({"p": zeros(), "g": zeros(), "t": torch.zeros(2)}, "not torch.float32 [2] on cpu"),
    ({"p": zeros().as_subclass(Subclass), "g": zeros()}, "plain tensors"),
    ({"p": ONE, "g": zeros(), "v": ONE}, "share memory"),
]


@pytest.mark.parametrize(("tensors", "reason"), REFUSED)
def test_what_is_refused_and_why(tensors, reason, gpu):
    assert reason in refusal(**tensors)


def test_one_count_for_two_parameters_is_refused(gpu):
    t = torch.zeros(())
    other = (zeros(), zeros(), zeros(), zeros(), None, t)
    assert "share memory" in refusal(zeros(), zeros(), t=t, more=(other,))
    assert refusal(zeros(), zeros(), more=(other,)) is None


def test_what_differs_in_strides_without_a_meaning_is_stepped(gpu):
    odd = torch.empty_strided((4, 1, 6), (6, 77, 1)).zero_()
    assert refusal(odd, zeros(shape=(4, 1, 6))) is None
    assert refusal(zeros(shape=(0, 5)), torch.zeros(5, 0).t()) is None


def test_a_step_that_is_refused_changes_nothing_and_the_next_may_go_on(gpu):
    ours, theirs, optimizers, step = trained()
    good = optimizers[0].state[ours[1]]["exp_avg"]
    optimizers[0].state[ours[1]]["exp_avg"] = good.double()
    before = [p.detach().clone() for p in ours]
    with pytest.raises(RuntimeError, match="backend='cuda' doesn't step torch.float32 parameters"):
        optimizers[0].step()
    assert all(map(same_bits, before, (p.detach() for p in ours)))
    assert [optimizers[0].state[p]["step"].item() for p in ours] == [1] * len(ours)
    optimizers[0].state[ours[1]]["exp_avg"] = good
    step()
    assert_stepped_alike(ours, theirs, 2, LR)


def test_native_calls_are_checked_before_anything_is_launched(gpu):
    signature = gpu.signature_of([random_grad((3,))])
    program, _, _ = gpu.cuda_program(signature, bytes(8), None, 1, False)
    with pytest.raises(ValueError, match="9 numbers for each gradient"):
        gpu.cuda_step_table(program, bytes(71))
    gpu.cuda_place(program, 1, 0)
    launches = gpu.launches()
    with pytest.raises(ValueError, match="rules: expected 64 bytes"):
        gpu.cuda_adamw(program, bytes(8), 0, 0, 1, bytes(63), 0, 0, False, False)
    with pytest.raises(TypeError, match=r"expected cuda_clip_adamw\(program"):
        gpu.cuda_clip_adamw(program)
    assert gpu.launches() == launches
