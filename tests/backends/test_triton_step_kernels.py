"""AdamW's step by Triton kernels on buckets made by hand: layouts, dtypes, addresses, and what is refused."""

import math
from dataclasses import replace

import pytest
import torch

from adamw_steps import (
    LR,
    RULE,
    assert_stepped,
    copy_of,
    default_dtype_of,
    layout_copy,
    random_like,
    step_of,
    written_by,
)
from cwclip_kernels import reference
from cwclip_kernels.backends import memory, triton, triton_step
from cwclip_kernels.core.adamw import AdamWStep
from cwclip_kernels.core.formula import ClipRule
from cwclip_kernels.core.loss_scale import UNSCALED, LossScale
from helpers import DEVICE, random_grad, same_bits
from no_sync import NoSync
from triton_buckets import bucket_of, cap, one_each

pytestmark = [pytest.mark.usefixtures("needs_triton"), pytest.mark.parametrize("backend", ["triton"])]


def check_step(grads, step, owners=None):
    """One step by given factors, against the definition."""
    owners = list(range(len(grads))) if owners is None else owners
    bucket, expected = bucket_of(grads, owners), copy_of(step)
    factors = torch.linspace(1.0, 0.25, bucket.count, dtype=torch.float64, device=DEVICE)
    before = [g.clone() for g in grads]
    assert triton_step.refuses_step(bucket, grads, step) is None
    triton_step.adamw_(bucket, grads, step, factors, False, None)
    reference.adamw_(bucket, grads, expected, factors, False, None)
    for actual, wanted in zip(written_by(step), written_by(expected), strict=True):
        assert_stepped(actual, wanted)
    assert all(map(same_bits, grads, before))
    return bucket


# Strides of dimensions of size 1, and of tensors without elements, say nothing.
def test_strides_that_do_not_matter(backend):
    param = random_grad((8, 1, 3)).as_strided((8, 1, 3), (3, 77, 1))
    step = step_of([param, torch.zeros((4, 0), device=DEVICE)])
    check_step([random_grad((8, 1, 3)), torch.zeros((0, 4), device=DEVICE).t()], step)


# Gaps in all tensors alike, and offsets of a slice along an inner dimension.
def test_layouts_with_gaps(backend):
    memory = [random_grad((40, 50)).abs() for _ in range(4)]
    before = [t.clone() for t in memory]
    views = [[t[1:30:3, 1::2], t[:, 40:41]] for t in memory]
    g, p, m, v = views
    steps = [torch.zeros((), device=DEVICE) for _ in g]
    check_step(g, AdamWStep(p, m, v, [None, None], steps, (RULE,), (0, 0)))
    for now, then in zip(memory, before, strict=True):
        now[1:30:3, 1::2] = then[1:30:3, 1::2]
        now[:, 40:41] = then[:, 40:41]
        assert same_bits(now, then)


# The first element at each place in a 16-byte vector: of all tensors, and of one alone.
@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float32])
def test_misaligned_tensors(backend, state_dtype):
    for offsets in (
        [1] * 5,
        [3] * 5,
        [1, 0, 0, 0, 0],
        [0, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1],
    ):
        dtypes = [torch.bfloat16, torch.bfloat16, *[state_dtype] * 3]
        memory = [random_grad((2200,), dtype).abs() for dtype in dtypes]
        before = [t.clone() for t in memory]
        g, p, m, v, w = ([t[at : at + 2100], t[2150:][at : at + 2]] for t, at in zip(memory, offsets, strict=True))
        steps = [torch.zeros((), device=DEVICE) for _ in g]
        check_step(g, AdamWStep(p, m, v, w, steps, (RULE._replace(amsgrad=True),), (0, 0)))
        for now, then, at in zip(memory, before, offsets, strict=True):
            for start, end in ((0, at), (at + 2100, 2150 + at), (2152 + at, 2200)):
                assert same_bits(now[start:end], then[start:end])


# A GPU faults on 16 bytes at any other address, the interpreter doesn't: first elements, then vectors' in bfloat16.
@pytest.mark.parametrize(
    ("elements", "state", "expected"),
    [
        ([0, 0, 0, 0, 0], torch.bfloat16, (0, 96)),
        ([3, 3, 3, 3, 3], torch.bfloat16, (5, 88)),
        ([3, 3, 3, 3, 3], torch.float32, (5, 88)),
        ([3, 3, 7, 3, 3], torch.float32, (5, 88)),
        ([3, 3, 7, 3, 3], torch.bfloat16, (5, 0)),
        ([1, 0, 0, 0, 0], torch.float32, (0, 0)),
        ([0, 1, 0, 0, 0], torch.float32, (7, 0)),
        ([0, 0, 1, 0, 0], torch.float32, (0, 0)),
        ([0, 0, 0, 1, 0], torch.float32, (0, 0)),
        ([0, 0, 0, 0, 1], torch.float32, (0, 0)),
    ],
)
def test_vectors_are_aligned_in_all_tensors(backend, elements, state, expected):
    from triton_probe import common_body_kernel

    dtypes = [torch.bfloat16, torch.bfloat16, state, state, state]
    at = torch.tensor([2**40 + n * dtype.itemsize for n, dtype in zip(elements, dtypes, strict=True)], device=DEVICE)
    found = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    common_body_kernel[(1,)](at, found, *map(triton.type_of, (torch.bfloat16, torch.bfloat16, state)))
    assert tuple(found.tolist()) == expected


def test_mixed_dtypes_in_one_bucket(backend):
    half, single, double = torch.bfloat16, torch.float32, torch.float64
    grads = [random_grad((40,), dtype) for dtype in (half, single, single, double, torch.float16, half)]
    params = [random_grad((40,), dtype) for dtype in (half, half, single, double, torch.float16, half)]
    step = step_of(params, (RULE, RULE._replace(amsgrad=True)), (0, 1, 0, 0, 1, 1))
    wide = step_of(params, (RULE, RULE._replace(amsgrad=True)), (0, 1, 0, 0, 1, 1), single)
    for i in (0, 4):
        for name in ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"):
            getattr(step, name)[i] = getattr(wide, name)[i]
    with default_dtype_of(double):  # for the definition's float64
        bucket = check_step(grads, step)
    assert len(bucket.step_state.kinds) == 6


# An optimizer reads a tensor on the CPU itself, so that it takes a GPU to get one here by way of it.
def test_learning_rates_that_are_tensors_are_read_at_every_step(backend):
    kinds = (torch.float32, torch.float64, torch.bfloat16)
    lrs = [torch.full((1,) * i, 0.25, dtype=dtype, device=DEVICE) for i, dtype in enumerate(kinds)]
    grads = [random_grad((20,)) for _ in range(4)]
    bucket, factors = one_each(grads), torch.ones(4, device=DEVICE)
    for rule_of in ((2, 3, 1, 0), (1, 0, 3, 2)):
        step = step_of([random_like(g) for g in grads], (RULE, *(RULE._replace(lr=lr) for lr in lrs)), rule_of)
        expected = copy_of(step)
        triton_step.adamw_(bucket, grads, step, factors, False, None)
        reference.adamw_(bucket, grads, expected, factors, False, None)
        for actual, wanted in zip(written_by(step), written_by(expected), strict=True):
            assert_stepped(actual, wanted)
        for lr in lrs:
            lr.mul_(2.0)


# beta1 = 1/2 makes m half of g, exactly, until it is rounded: to each value's nearest, ties among them.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_are_rounded_once_to_nearest_even(backend, dtype):
    every = torch.arange(-(2**15), 2**15, 5, dtype=torch.int16).view(dtype).to(DEVICE, torch.float32)
    between = torch.nextafter(every, torch.zeros(()).to(DEVICE))
    ties = (every + torch.roll(every, 1)) / 2
    for grad in (every, between, ties):
        step = step_of([torch.zeros(grad.shape, dtype=dtype, device=DEVICE)], (RULE._replace(beta1=0.75),))
        step.exp_avgs[0].zero_()
        triton_step.adamw_(one_each([grad]), [grad], step, torch.ones(1, device=DEVICE), False, None)
        torch.testing.assert_close(step.exp_avgs[0], (grad / 4).to(dtype), rtol=0, atol=0, equal_nan=True)


def test_one_phase_and_two_give_the_same_bits(backend):
    params = [random_grad((n,), dtype) for n in (5, 700) for dtype in (torch.float32, torch.bfloat16)]
    grads, step = [random_like(p) for p in params], step_of(params)
    other, scale = copy_of(step), LossScale(cap(0.125), None)
    for bucket, loss_scale in ((one_each(grads), UNSCALED), (bucket_of(grads, [0, 2, 2, 0]), scale)):
        norms, coefs = triton_step.clip_adamw_(bucket, grads, step, cap(0.5), ClipRule(), loss_scale, None)
        triton_step.adamw_(bucket, grads, other, loss_scale.factors(coefs), False, None)
        assert coefs.min() < 1
        assert all(map(same_bits, written_by(step), written_by(other)))
        assert norms.dtype == coefs.dtype == torch.float32
    assert norms[1] == 0  # a component without gradients
    assert coefs[1] == 1


def test_found_inf_is_reported(backend):
    grads = [random_grad((50,)) for _ in range(2)]
    for found in (0.0, 1.0):
        report = torch.zeros((), device=DEVICE)
        bucket, step = one_each(grads), step_of([random_grad((50,)) for _ in range(2)])
        triton_step.clip_adamw_(bucket, grads, step, cap(1.0), ClipRule(), LossScale(None, report), None)
        assert report.item() == found
        grads[1][7] = math.nan


def test_a_step_neither_waits_for_the_device_nor_copies_to_it(backend, monkeypatch):
    lr = torch.tensor(LR, device=DEVICE)
    rules = (RULE, RULE._replace(lr=lr, amsgrad=True))
    grads = [random_grad((n,)) for n in (9, 30)]
    step, bucket = step_of([random_like(g) for g in grads], rules, (0, 1)), one_each(grads)
    skip = torch.zeros((), device=DEVICE)

    def run(**changes):
        own = replace(step, skip=skip, **changes)
        assert triton_step.refuses_step(bucket, grads, own) is None
        triton_step.clip_adamw_(bucket, grads, own, cap(0.5), ClipRule(), UNSCALED, None)

    run()
    sent = []
    monkeypatch.setattr("cwclip_kernels.backends.memory.upload", lambda table, device: sent.append(table) or table)
    with NoSync():
        run()
    assert not sent
    run(rules=(RULE._replace(lr=0.2), rules[1]))
    assert [table.numel() for table in sent] == [18]  # two rows of hyperparameters
    run(
        rules=(RULE._replace(lr=0.2), rules[1]),
        rule_of=(1, 1),
        max_exp_avg_sqs=[random_like(g).abs_() for g in grads],
    )
    assert len(bucket.step_state.kinds) == 1


# Only the bookkeeping: nothing is captured here, and pinned memory needs a GPU.
def test_a_captured_step_has_copies_of_its_own(backend, monkeypatch):
    monkeypatch.setattr(memory, "_pinned", lambda numbers: torch.empty(len(numbers) // 8, dtype=torch.int64))
    monkeypatch.setattr(memory, "_KEPT_FOR_GRAPHS", kept := [])
    grads, factors = [random_grad((20,)), random_grad((3,))], torch.ones(2, device=DEVICE)
    bucket = check_step(grads, step_of([random_like(g) for g in grads]))
    sent = numbers_of(bucket)
    before = [numbers.clone() for numbers in sent]
    monkeypatch.setattr(triton_step, "stream_of", lambda device: None)
    step = step_of([random_like(g) for g in grads], (RULE._replace(lr=0.3),))
    expected = copy_of(step)
    triton_step.adamw_(bucket, grads, step, factors, False, None)
    reference.adamw_(bucket, grads, expected, factors, False, None)
    for actual, wanted in zip(written_by(step), written_by(expected), strict=True):
        assert_stepped(actual, wanted)
    assert all(now is then for now, then in zip(numbers_of(bucket), sent, strict=True))
    assert all(map(torch.equal, sent, before))
    assert len(kept) == 5  # tables, and the addresses and hyperparameters on the host


def numbers_of(bucket):
    """What eager calls have sent to the device."""
    state = bucket.step_state
    each = (bucket.state.addresses, state.addresses, state.rules, state.rule_of)
    return [numbers.sent[1] for numbers in each]


@pytest.mark.parametrize("native", [True, False])
def test_amsgrad_moves_from_one_parameter_to_another(backend, native, monkeypatch):
    if not native:
        monkeypatch.setattr(triton_step.native, "unavailable", lambda: "missing")
    grads = [random_grad((20,)) for _ in range(2)]
    rules, bucket = (RULE, RULE._replace(amsgrad=True, lr=0.3)), one_each(grads)
    for rule_of in ((0, 1), (1, 0)):
        step = step_of([random_like(g) for g in grads], rules, rule_of)
        expected, factors = copy_of(step), torch.ones(2, device=DEVICE)
        assert triton_step.refuses_step(bucket, grads, step) is None
        triton_step.adamw_(bucket, grads, step, factors, False, None)
        reference.adamw_(bucket, grads, expected, factors, False, None)
        for actual, wanted in zip(written_by(step), written_by(expected), strict=True):
            assert_stepped(actual, wanted)


# 2^33 elements further on, with addresses as much lower.
def test_offsets_beyond_32_bits(backend):
    grads = [random_grad((50,), dtype) for dtype in (torch.float32, torch.bfloat16)]
    step = step_of([random_like(g) for g in grads])
    expected, bucket, far = copy_of(step), one_each(grads), 2**33
    factors = torch.ones(2, device=DEVICE)
    reference.adamw_(bucket, grads, expected, factors, False, None)
    skipped = replace(step, skip=torch.ones((), device=DEVICE))
    triton_step.adamw_(bucket, grads, skipped, factors, False, None)
    for tiles in bucket.step_state.tables.on(bucket.device, memory.stream_of(bucket.device)).tiles:
        tiles.rows[:, 1] += far
    size = torch.tensor([4, 2], device=DEVICE) * far
    for numbers, lists in ((bucket.state.addresses, 1), (bucket.step_state.addresses, 3)):
        numbers.sent[1][: 2 * lists] -= size.repeat(lists)
    triton_step.adamw_(bucket, grads, step, factors, False, None)
    for actual, wanted in zip(written_by(step), written_by(expected), strict=True):
        assert_stepped(actual, wanted)


def refusals():
    """What is refused: how to make it of a plain step, and words of the reason."""
    half, double = torch.bfloat16, torch.float64
    return {
        "integers": (lambda g, s: s.params.__setitem__(0, s.params[0].int()), "torch.int32 parameters"),
        "half gradients": (lambda g, s: g.__setitem__(0, g[0].to(half)), "from torch.bfloat16 gradients"),
        "half states": (lambda g, s: s.exp_avgs.__setitem__(0, s.exp_avgs[0].to(half)), "means of torch.bfloat16"),
        "mixed states": (
            lambda g, s: s.exp_avg_sqs.__setitem__(0, s.exp_avg_sqs[0].to(double)),
            "means of torch.float32, torch.float64",
        ),
        "layout": (lambda g, s: s.exp_avgs.__setitem__(0, s.exp_avgs[0].t().contiguous().t()), "memory layout"),
        "shape": (lambda g, s: s.params.__setitem__(0, s.params[0].view(6, 4)), "memory layout"),
        "shared memory": (lambda g, s: s.exp_avgs.__setitem__(0, s.params[0]), "share memory"),
        "half step": (lambda g, s: s.steps.__setitem__(0, s.steps[0].to(half)), "'step' of torch.bfloat16"),
        "mixed steps": (
            lambda g, s: s.steps.__setitem__(1, s.steps[1].to(double)),
            "'step' of torch.float32, torch.f",
        ),
        "vector of steps": (lambda g, s: s.steps.__setitem__(0, torch.zeros(2, device=DEVICE)), "of shape [2]"),
        "elsewhere": (lambda g, s: s.exp_avgs.__setitem__(0, s.exp_avgs[0].to("meta")), "on meta"),
        "steps elsewhere": (lambda g, s: s.steps.__setitem__(0, s.steps[0].to("meta")), "'step' on meta"),
    }


@pytest.mark.parametrize("case", refusals())
def test_refusals_say_why(backend, case):
    change, words = refusals()[case]
    grads = [random_grad((4, 6)) for _ in range(2)]
    step = step_of([random_like(g) for g in grads])
    bucket = one_each(grads)
    assert triton_step.refuses_step(bucket, grads, step) is None
    changed = copy_of(step)
    change(grads, changed)
    assert words in triton_step.refuses_step(one_each(grads), grads, changed)
    if case not in ("half gradients",):  # which the plan would notice: its gradients never change
        assert words in triton_step.refuses_step(bucket, grads, changed)
        assert triton_step.refuses_step(bucket, grads, step) is None


@pytest.mark.parametrize("subclassed", [False, True])
def test_works_without_the_extension_and_for_subclasses(backend, subclassed, monkeypatch):
    class Named(torch.nn.Parameter):
        pass

    if not subclassed:
        monkeypatch.setattr(triton_step.native, "unavailable", lambda: "missing")
    kind = Named if subclassed else torch.nn.Parameter
    grads = [random_grad((20,)) for _ in range(2)]
    step = step_of([kind(random_like(g)) for g in grads])
    with torch.no_grad():
        bucket = check_step(grads, step)
        assert bucket.step_state.native is None
        first = bucket.step_state
        for each in (step.params, step.exp_avgs):
            each[0] = layout_copy(each[0])
        assert triton_step.refuses_step(bucket, grads, step) is None
        triton_step.adamw_(bucket, grads, step, torch.ones(2, device=DEVICE), False, None)
        assert bucket.step_state is first
        assert step.steps[0] == 2


def test_nothing_to_step(backend):
    for count in (0, 2):
        bucket = bucket_of([], [], count=count)
        step = step_of([])
        norms, coefs = triton_step.clip_adamw_(bucket, [], step, cap(1.0), ClipRule(), UNSCALED, None)
        assert norms.tolist() == [0.0] * count
        assert coefs.tolist() == [1.0] * count
