"""Components of one tile, stepped in one pass, against the same with that pass off: the same bits, fewer launches."""

import math
from dataclasses import replace

import pytest
import torch

from adamw_steps import RULE, default_dtype_of, random_like, step_of, written_by
from cwclip_kernels.backends import triton, triton_step, triton_tables
from cwclip_kernels.core.adamw import AdamWStep
from cwclip_kernels.core.formula import ClipRule
from cwclip_kernels.core.loss_scale import UNSCALED, LossScale
from helpers import DEVICE, DTYPES, random_grad, same_bits
from single_tiles import lying_alike, record_launches, small_tiles, switch_off
from triton_buckets import bucket_of, cap, one_each

pytestmark = pytest.mark.usefixtures("needs_triton")

# Several blocks fill a tile of float32, one element more takes another.
TILE = 4096
LENGTHS = (0, 1, 7, 1025, TILE, TILE + 1, 3 * TILE + 5)
SINGLE, SEVERAL = "adamw_single_kernel", ["power_sums_kernel", "coefficients_kernel", "adamw_kernel"]
AMSGRAD = RULE._replace(amsgrad=True)


@pytest.fixture(autouse=True)
def tiles(monkeypatch):
    small_tiles(monkeypatch, TILE)


@pytest.fixture
def launches(monkeypatch):
    return record_launches(monkeypatch)


def copied(step):
    """The same step of copies of its tensors, gaps and all."""
    lists = ("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps")
    return replace(
        step, **{name: [None if t is None else lying_alike(t) for t in getattr(step, name)] for name in lists}
    )


def check(monkeypatch, bucket, grads, step, rule=ClipRule(), caps=None, inverse=None):  # noqa: B008  # immutable
    """Two steps with the pass and without, and norms as ``clip_`` has them; tiles that take the pass, and others."""
    caps = cap(1.0) if caps is None else caps
    outcomes, counts, before = [], [], [g.clone() for g in grads]
    for off in (False, True):
        own, stepped, report = replace(bucket), copied(step), torch.zeros((), device=DEVICE)
        with monkeypatch.context() as patch:
            if off:
                switch_off(patch)
            for _ in range(2):
                norms, coefs = triton_step.clip_adamw_(
                    own, grads, stepped, caps, rule, LossScale(inverse, report), None
                )
        outcomes.append([norms, coefs, report, *written_by(stepped)])
        placed = own.step_state.tables.tables.tiles
        counts.append([sum(len(getattr(t, name)) for t in placed) for name in ("single", "rest")])
    assert all(map(same_bits, *outcomes))
    assert all(map(same_bits, grads, before))
    clipped = triton.clip_(bucket, [lying_alike(g) for g in grads], caps, rule, LossScale(inverse, None), None)
    assert all(map(same_bits, outcomes[0][:2], clipped))
    assert counts[1][0] == 0
    return counts[0]


# Each pair of two of them.
@pytest.mark.parametrize(
    ("dtype", "amsgrad", "p"),
    [(dtype, (i + j) % 2 == 0, p) for i, dtype in enumerate(DTYPES) for j, p in enumerate((1.0, 2.0, math.inf))],
)
def test_gives_the_bits_of_the_three_kernels(monkeypatch, dtype, amsgrad, p):
    with default_dtype_of(dtype):
        grads = [random_grad((n,), dtype) for n in LENGTHS]
        step = step_of([random_like(g) for g in grads], (AMSGRAD if amsgrad else RULE._replace(maximize=True),))
        single, rest = check(monkeypatch, one_each(grads), grads, step, ClipRule(p))
    assert single == {8: 3, 4: 4, 2: 5}[dtype.itemsize]
    assert rest > 0


def test_mixed_dtypes(monkeypatch):
    half, single, double = torch.bfloat16, torch.float32, torch.float64
    kinds = [(half, half, half), (single, half, half), (half, half, single), (single, half, single)]
    kinds += [(single, single, single), (double, double, double), (torch.float16, torch.float16, single)]
    grads, params, states = ([random_grad((40,), each[i]) for each in kinds for _ in range(2)] for i in range(3))
    for each in (grads, params, states):
        each.append(random_grad((2 * TILE + 3,)))
    lists = [[random_like(t).abs() for t in states] for _ in range(3)]
    rule_of = (*(0, 1) * len(kinds), 0)
    maxima = [w if r else None for w, r in zip(lists[2], rule_of, strict=True)]
    times = [torch.zeros((), device=DEVICE) for _ in grads]
    step = AdamWStep(params, lists[0], lists[1], maxima, times, (RULE, AMSGRAD), rule_of)
    assert check(monkeypatch, one_each(grads), grads, step, inverse=cap(0.125))[0] == 2 * len(kinds)


@pytest.mark.parametrize(
    ("nonfinite", "inverse"), [("propagate", None), ("zero", 0.125), ("skip", None), ("skip", 0.125)]
)
def test_values_that_are_not_finite(monkeypatch, nonfinite, inverse):
    grads = [random_grad((n,), scale=10.0**e) for n in (300, 2 * TILE) for e in (0, 0, 0, -30, 30)]
    for bad, value in ((0, math.inf), (1, math.nan), (5, -math.inf), (6, math.nan)):
        grads[bad][123] = value
    step = step_of([random_like(g) for g in grads], (AMSGRAD,))
    caps = cap([1.0, 1.0, 0.0, math.inf, 1e-3] * 2)
    rule = ClipRule(nonfinite=nonfinite)
    assert (
        check(monkeypatch, one_each(grads), grads, step, rule, caps, None if inverse is None else cap(inverse))[0]
        == 5
    )


def test_gaps_slices_and_misaligned_tensors(monkeypatch):
    memory = [random_grad((120, 50)).abs() for _ in range(4)]
    g, p, m, v = ([t[1:30:3, 1::2], t[:, 40:41], t[40:, :39], t.view(-1)[3:40], t[35:37]] for t in memory)
    p[3] = random_grad((37,))  # its 16-byte boundaries are elsewhere
    g, p, m, v = ([*each, random_grad((8, 6)).abs()] for each in (g, p, m, v))
    times = [torch.zeros((), device=DEVICE) for _ in g]
    bucket = bucket_of(g, [0, 1, 2, 3, 4, 5])
    slices = [(i, ()) for i in range(5)]
    boxes = [(5, ((0, 0, 3),)), (5, ((0, 3, 5),))]  # rows
    bucket.slices, bucket.count = tuple(slices + boxes), 7
    bucket.components = torch.tensor([0, 1, 2, 3, 4, 5, 6])
    assert check(monkeypatch, bucket, g, AdamWStep(p, m, v, [None] * 6, times, (RULE,), (0,) * 6))[0] == 7


# Tiles in two gradients; in one, since the other has none; no tile at all.
def test_components_of_several_gradients(monkeypatch):
    grads = [random_grad((n,)) for n in (10, 20, 30, 0, 0)]
    step = step_of([random_like(g) for g in grads])
    assert check(monkeypatch, bucket_of(grads, [0, 0, 3, 3, 1], count=5), grads, step) == [1, 2]


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ((5, 300, TILE), [SINGLE]),
        ((5, 2 * TILE), [SINGLE, *SEVERAL]),
        ((2 * TILE, 3 * TILE), SEVERAL),
        ((5, 0), [SINGLE, "coefficients_kernel"]),
    ],
)
def test_launches(launches, lengths, expected):
    grads = [random_grad((n,)) for n in lengths]
    step = step_of([random_like(g) for g in grads])
    triton_step.clip_adamw_(one_each(grads), grads, step, cap(0.5), ClipRule(), UNSCALED, None)
    assert launches == ["advance_kernel", *expected]
    launches.clear()
    factors = torch.ones(len(grads), device=DEVICE)
    triton_step.adamw_(one_each(grads), grads, step, factors, False, None)
    assert launches == ["advance_kernel", "adamw_kernel"]


def test_each_element_has_one_row():
    grads = [random_grad((n,), dtype) for n in LENGTHS for dtype in DTYPES]
    owners = [i // 2 * 2 if i % 3 == 0 else i for i in range(len(grads))]
    bucket = bucket_of(grads, owners, count=len(grads))
    tables = triton_tables.build_step_tables(bucket, grads, [DTYPES.index(g.dtype) for g in grads], owners)
    for tiles in tables.tiles:
        assert torch.equal(torch.cat((tiles.rest, tiles.single)), tiles.rows)
    rows = torch.cat([tiles.rows for tiles in tables.tiles])
    assert [int(rows[rows[:, 0] == i, 2].sum()) for i in range(len(grads))] == [g.numel() for g in grads]
    single = torch.cat([tiles.single[:, 3] for tiles in tables.tiles])
    assert sorted([*single.tolist(), *tables.sums.components.tolist()]) == list(range(bucket.count))
    measured = torch.cat([tiles.rows for tiles in tables.sums.sum_tiles])
    assert sorted(measured[:, 6].tolist()) == list(range(tables.sums.count))
    assert not set(torch.tensor(owners)[measured[:, 0]].tolist()) & set(single.tolist())


# Norms and coefficients are what a skipped step has all the same.
def test_a_skipped_step_measures_and_changes_no_bit():
    grads = [random_grad((n,)) for n in (40, 2 * TILE)]
    step = replace(step_of([random_like(g) for g in grads], (AMSGRAD,)), skip=torch.ones((), device=DEVICE))
    before, bucket = [t.clone() for t in written_by(step)], one_each(grads)
    norms, coefs = triton_step.clip_adamw_(bucket, grads, step, cap(0.5), ClipRule(), UNSCALED, None)
    assert all(map(same_bits, written_by(step), before))
    assert norms.tolist() == pytest.approx([g.norm().item() for g in grads])
    assert (coefs < 1).all()
