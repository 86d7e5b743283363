"""Components of one tile, clipped in the first launch, against the same with that off: same bits, fewer launches."""

import math
from dataclasses import replace

import pytest
import torch

from cwclip_kernels.backends import triton, triton_tables
from cwclip_kernels.core.formula import ClipRule
from cwclip_kernels.core.loss_scale import UNSCALED, LossScale
from helpers import DEVICE, DTYPES, random_grad, same_bits
from single_tiles import lying_alike, record_launches, small_tiles, switch_off
from triton_buckets import ORDERS, bucket_of, cap, check_clip, one_each

pytestmark = pytest.mark.usefixtures("needs_triton")

# Several blocks fill a tile of float32, one element more takes another.
TILE = 9000
LENGTHS = (0, 1, 7, 1025, TILE, TILE + 1, 3 * TILE + 5)
FIRST, OTHERS = "sum_or_clip_kernel", ["coefficients_kernel", "scale_kernel"]


@pytest.fixture(autouse=True)
def tiles(monkeypatch):
    small_tiles(monkeypatch, TILE)


def check(monkeypatch, bucket, grads, rule=ClipRule(), caps=None, inverse=None):  # noqa: B008  # immutable
    """One clip with the path and without; the single tiles, and gradients that both have clipped."""
    outcomes, single = [], []
    for off in (False, True):
        own, copies, found = replace(bucket), [lying_alike(g) for g in grads], torch.zeros((), device=DEVICE)
        with monkeypatch.context() as patch:
            if off:
                switch_off(patch)
            norms, coefs = triton.clip_(
                own, copies, cap(1.0) if caps is None else caps, rule, LossScale(inverse, found), None
            )
        outcomes.append([norms, coefs, found, *copies])
        single.append(sum(len(t.rows) - t.several for t in own.state.tables.tables.sum_tiles))
    assert all(map(same_bits, *outcomes))
    assert single[1] == 0
    return single[0], outcomes[0]


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gives_the_bits_of_the_three_kernels(monkeypatch, dtype, p):
    grads = [random_grad((n,), dtype) for n in LENGTHS]
    single, (_, coefs, *_) = check(monkeypatch, one_each(grads), grads, ClipRule(p))
    assert single == {8: 3, 4: 4, 2: 5}[dtype.itemsize]
    assert (coefs < 1).sum() >= len(grads) - 3
    check_clip(grads, list(range(len(grads))), cap(3.0), ClipRule(p))


def test_mixed_dtypes_take_the_same_launches(monkeypatch):
    small_tiles(monkeypatch, 400)
    grads = [random_grad((n,), dtype) for n in (40, 1700) for dtype in DTYPES]
    owners = [0, 1, 2, 3, 4, 4, 5, 6]
    single, _ = check(monkeypatch, bucket_of(grads, owners), grads, inverse=cap(0.125))
    assert single == 4
    launches = record_launches(monkeypatch)
    check_clip(grads, owners, cap(0.5), ClipRule())
    assert launches == [FIRST, *OTHERS]


# A coefficient of 1 or 0, a factor of 1 or not; and the report of inf and NaN.
@pytest.mark.parametrize(
    ("nonfinite", "inverse"),
    [("propagate", None), ("propagate", 0.125), ("zero", 1.0), ("zero", 0.125), ("skip", 0.125)],
)
def test_values_that_are_not_finite(monkeypatch, nonfinite, inverse):
    small_tiles(monkeypatch, 400)
    grads = [random_grad((n,), scale=10.0**e) for n in (300, 700) for e in (0, 0, 0, -30, 30)]
    for bad, value in ((0, math.inf), (1, math.nan), (5, -math.inf), (6, math.nan)):
        grads[bad][123] = value
    caps = cap([1.0, 1.0, 0.0, math.inf, 1e-3] * 2)
    scale = None if inverse is None else cap(inverse)
    rule = ClipRule(nonfinite=nonfinite)
    single, (_, _, found, *_) = check(monkeypatch, one_each(grads), grads, rule, caps, scale)
    assert single == 5
    assert found == 1
    for finite in (grads[2:5], grads[7:]):
        assert check(monkeypatch, one_each(finite), finite, rule, inverse=scale)[1][2] == 0


def test_gaps_slices_and_misaligned_tensors(monkeypatch):
    memory = random_grad((120, 50))
    grads = [memory[1:30:3, 1::2], memory[:, 40:41], memory[40:, :39], memory.view(-1)[3:40], memory[35:37]]
    grads.append(random_grad((8, 6)))
    bucket = bucket_of(grads, [0, 1, 2, 3, 4, 5])
    boxes = [(5, ((0, 0, 3),)), (5, ((0, 3, 5),))]  # rows
    bucket.slices, bucket.count = tuple([(i, ()) for i in range(5)] + boxes), 7
    bucket.components = torch.tensor([0, 1, 2, 3, 4, 5, 6])
    assert check(monkeypatch, bucket, grads)[0] == 7


# Two gradients; one, since the other has no elements; none.
def test_components_of_several_gradients(monkeypatch):
    grads = [random_grad((n,)) for n in (10, 20, 30, 0, 0)]
    assert check(monkeypatch, bucket_of(grads, [0, 0, 3, 3, 1], count=5), grads)[0] == 1


# Nothing is written beside such a gradient, nor to it where its coefficient is 1.
@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_nothing_else(dtype):
    memory = random_grad((700,), dtype)
    memory.view(torch.uint8)[:32] = 0xFF  # NaN with a payload
    before, view = memory.clone(), memory[101:613]
    norms, coefs = triton.clip_(one_each([view]), [view], cap([math.inf]), ClipRule(), UNSCALED, None)
    assert same_bits(memory, before)
    triton.clip_(one_each([view]), [view], norms.double() / 2, ClipRule(), UNSCALED, None)
    assert coefs == 1
    assert same_bits(memory[:101], before[:101])
    assert same_bits(memory[613:], before[613:])
    assert not same_bits(view, before[101:613])


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ((5, 30, 300), [FIRST]),
        ((5, 600), [FIRST, *OTHERS]),
        ((600, 900), [FIRST, *OTHERS]),
        ((5, 0), [FIRST, OTHERS[0]]),
        ((0,), [OTHERS[0]]),
    ],
)
def test_launches(monkeypatch, lengths, expected):
    small_tiles(monkeypatch, 300)
    launches = record_launches(monkeypatch)
    grads = [random_grad((n,)) for n in lengths]
    triton.clip_(one_each(grads), grads, cap(0.5), ClipRule(), UNSCALED, None)
    assert launches == expected


def test_launches_of_two_steps_are_of_all_tiles(monkeypatch):
    small_tiles(monkeypatch, 300)
    launches = record_launches(monkeypatch)
    grads = [random_grad((n,), dtype) for n in (5, 700) for dtype in DTYPES]
    bucket = one_each(grads)
    assert (triton.power_sums(bucket, grads, 2.0, None) > 0).all()
    assert launches == ["power_sums_kernel", "combine_kernel"]
    launches.clear()
    triton.scale_(bucket, grads, torch.zeros(len(grads), device=DEVICE), False, None)
    assert launches == ["scale_kernel"]
    assert not any(g.any() for g in grads)


def test_single_tiles_come_last():
    grads = [random_grad((n,), dtype) for n in LENGTHS for dtype in DTYPES]
    owners = [i // 2 * 2 if i % 3 == 0 else i for i in range(len(grads))]
    tables = triton_tables.build_tables(bucket_of(grads, owners, count=len(grads)), grads)
    several = torch.cat([t.rows[: t.several, 3] for t in tables.sum_tiles]).unique()
    single = torch.cat([t.rows[t.several :, 3] for t in tables.sum_tiles])
    assert len(single) == len(single.unique()) > 0
    assert sorted([*single.tolist(), *tables.components.tolist()]) == list(range(len(grads)))
    assert set(several.tolist()) <= set(tables.components.tolist())
    assert torch.equal(torch.cat([t.rows[: t.several, 3] for t in tables.scale_tiles]).unique(), several)
    for tiles in (tables.sum_tiles, tables.scale_tiles):
        rows = torch.cat([t.rows for t in tiles])
        assert [int(rows[rows[:, 0] == i, 2].sum()) for i in range(len(grads))] == [g.numel() for g in grads]
