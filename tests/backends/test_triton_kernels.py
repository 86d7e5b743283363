"""What the Triton kernels compute, against plain float64 torch: interpreted on the CPU where there is no GPU."""

import math

import pytest
import torch

from cwclip_kernels.backends import triton as backend
from cwclip_kernels.backends import triton_tables
from cwclip_kernels.backends.native import packed
from cwclip_kernels.core.formula import ClipRule
from cwclip_kernels.core.loss_scale import UNSCALED
from helpers import DEVICE, DTYPES, NORM_TOLERANCE, assert_norms, random_grad, same_bits
from triton_buckets import ORDERS, bucket_of, cap, check_clip, expected_scaled, expected_sums, one_each

pytestmark = pytest.mark.usefixtures("needs_triton")


# Nothing; less than, around and between whole 16-byte vectors; around one tile of the first pass.
def sizes(dtype):
    tile = triton_tables.SUM_TILE_BYTES // dtype.itemsize
    return (0, 1, 2, 7, 8, 31, 33, 1000, tile - 1, tile, tile + 1)


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_power_sums_and_clip(dtype, p):
    grads = [random_grad((n,), dtype) for n in sizes(dtype)]
    owners = list(range(len(grads)))
    torch.testing.assert_close(
        backend.power_sums(one_each(grads), grads, p, None),
        expected_sums(grads, owners, len(grads), p),
        rtol=2 * NORM_TOLERANCE[dtype],
        atol=0,
    )
    check_clip(grads, owners, cap(3.0), ClipRule(p))


# The first element at every place in a 16-byte vector, with sizes that end before the first boundary and after it.
@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_views(dtype):
    for offset in range(1, 16 // dtype.itemsize):
        memory = random_grad((700,), dtype)
        before = memory.clone()
        views = [memory[offset : offset + 1], memory[offset + 16 : offset + 19], memory[offset + 32 : offset + 640]]
        check_clip(views, [0, 1, 1], cap(0.1), ClipRule())
        for start, end in ((0, offset), (offset + 1, offset + 16), (offset + 19, offset + 32), (offset + 640, 700)):
            assert same_bits(memory[start:end], before[start:end])


@pytest.mark.parametrize("p", ORDERS)
def test_components_of_mixed_dtypes(p):
    grads = [random_grad((n,), dtype) for n in (5, 300) for dtype in DTYPES]
    check_clip(grads, [0, 0, 0, 0, 2, 0, 2, 3], cap(0.5), ClipRule(p), count=5)


def test_no_gradient_no_elements_no_components():
    empty = [torch.zeros(0, device=DEVICE), torch.zeros((3, 0), device=DEVICE)]
    for grads, owners in ((empty, [0, 2]), ([], [])):
        bucket = bucket_of(grads, owners, count=3)
        norms, coefs = backend.clip_(bucket, grads, cap(0.0), ClipRule(), UNSCALED, None)
        assert norms.tolist() == [0.0] * 3
        assert coefs.tolist() == [1.0] * 3
        assert backend.power_sums(bucket, grads, 2.0, None).tolist() == [0.0] * 3
        backend.scale_(bucket, grads, coefs, False, None)
    assert backend.power_sums(bucket_of([], [], count=0), [], 2.0, None).shape == (0,)


def test_dense_layouts_are_clipped_in_place():
    grads = [
        random_grad((4, 6, 5, 3)).to(memory_format=torch.channels_last),
        random_grad((17, 33)).t(),
        random_grad((6, 4, 5)).permute(2, 0, 1)[:, :, :1].squeeze().as_strided((6, 5), (1, 6)),
        random_grad(()),
        random_grad((8, 1, 3)).as_strided((8, 1, 3), (3, 77, 1)),
    ]
    bucket = one_each(grads)
    pointers = packed(g.data_ptr() for g in grads)
    check_clip(grads, list(range(len(grads))), cap(0.5), ClipRule())
    backend.power_sums(bucket, grads, 2.0, None)
    assert {group.dims for group in bucket.state.tables.tables.sum_tiles} == {0}
    assert bucket.state.addresses.sent[0] == pointers


def test_layouts_with_gaps():
    memory = random_grad((40, 50))
    before = memory.clone()
    views = [memory[:, ::2], memory[1:30:3, 1::2]]
    norms, coefs = backend.clip_(one_each(views), views, cap(0.5), ClipRule(), UNSCALED, None)
    assert_norms(norms, torch.stack([before[:, ::2].norm(), before[1:30:3, 1::2].norm()]), torch.float32)
    before[:, ::2] *= coefs[0]
    before[1:30:3, 1::2] *= coefs[1]
    assert same_bits(memory, before)
    backend.scale_(one_each(views), views, torch.tensor([1.0, 0.5], device=DEVICE), False, None)
    before[1:30:3, 1::2] *= 0.5
    assert same_bits(memory, before)


def test_caps_one_or_one_each():
    grads = [random_grad((50,)) for _ in range(6)]
    check_clip([g.clone() for g in grads], list(range(6)), cap(1.0), ClipRule())
    each = cap([0.0, 1.0, 1e9, math.inf, 1e-30, 2.0])
    _, coefs = check_clip([g.clone() for g in grads], list(range(6)), each, ClipRule())
    assert coefs[0] == 0
    assert coefs[2] == coefs[3] == 1
    strided = torch.stack((each, each), 1)[:, 0]
    check_clip(grads, list(range(6)), strided, ClipRule())


def test_bad_caps_are_loud_and_stay_with_their_component():
    grads = [random_grad((50,)) for _ in range(3)]
    _, coefs = check_clip(grads, [0, 1, 2], cap([math.nan, -1.0, 1.0]), ClipRule())
    assert coefs.isnan().tolist() == [True, True, False]


def test_eps_is_not_rounded_to_float32():
    for eps in (1e-6, 0.1):
        grad = torch.full((1,), 2.0**-30, dtype=torch.float64, device=DEVICE)
        _, coefs = backend.clip_(one_each([grad]), [grad], cap(1e-8), ClipRule(eps=eps), UNSCALED, None)
        assert coefs.item() == 1e-8 / (2.0**-30 + eps)


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("nonfinite", ["propagate", "zero", "skip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nonfinite_values_stay_in_their_component(dtype, nonfinite, p):
    grads = [random_grad((n,), dtype) for n in (900, 900, 900, 900, 3)]
    grads[1][333] = math.inf
    grads[2][5] = -math.inf
    grads[2][6] = math.nan
    grads[4][0] = -math.nan  # outside whole vectors
    norms, coefs = check_clip(grads, [0, 1, 2, 3, 4], cap(1.0), ClipRule(p, nonfinite=nonfinite))
    assert norms[1] == math.inf
    assert norms.isnan().tolist() == [False, False, True, False, True]
    if nonfinite == "propagate":
        assert grads[1][333].isnan()
        assert coefs[1] == 0
        assert coefs[2].isnan()
    else:
        assert set(coefs[[1, 2, 4]].tolist()) == {0.0 if nonfinite == "zero" else 1.0}


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale(dtype):
    coefs = torch.tensor([1.0, 0.3, 0.0, 1.5, 1e-12], dtype=torch.float64, device=DEVICE)
    for kind in (torch.float32, torch.float64):
        grads = [random_grad((100,), dtype) for _ in coefs]
        grads[0].view(torch.uint8)[:80] = 0xFF  # NaN with a payload
        grads[2][:3] = torch.tensor([math.inf, math.nan, -1.0])
        for zero_fill in (False, True):
            scaled = [g.clone() for g in grads]
            backend.scale_(one_each(grads), scaled, coefs.to(kind), zero_fill, None)
            assert same_bits(scaled[0], grads[0])
            for i in (1, 3, 4):
                assert same_bits(scaled[i], expected_scaled(grads[i], coefs[i].to(kind)))
            if zero_fill:
                assert same_bits(scaled[2], torch.zeros_like(grads[2]))
            else:
                assert scaled[2][:2].isnan().all()
                assert same_bits(scaled[2][2:], expected_scaled(grads[2][2:], coefs[2].to(kind)))


# Every bit pattern, so every tie, subnormal and carry into the exponent.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("coef", [0.5, 0.75, 0.3, 1e-3])
def test_every_half_precision_value_is_rounded_once_to_nearest_even(dtype, coef):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).to(DEVICE)
    scaled = every.clone()
    factor = torch.tensor([coef], device=DEVICE)
    backend.scale_(one_each([every]), [scaled], factor, False, None)
    expected = expected_scaled(every, factor)
    torch.testing.assert_close(scaled, expected, rtol=0, atol=0, equal_nan=True)


# Where float32 squares or their sums would overflow, underflow to nothing, or lose digits as subnormals.
@pytest.mark.parametrize(
    ("dtype", "magnitudes"),
    [
        (torch.float32, (1e30, 3e38, 1e-20, 1e-23, 1e-30, 1e-44, 1e18, 1e-12)),
        (torch.bfloat16, (1e30, 3e38, 1e-20, 1e-23, 1e-30, 1e-38, 1e18, 1e-12)),
        (torch.float16, (60000.0, 6e-5, 6e-8)),
        (torch.float64, (1e150, 1e-150)),
    ],
)
@pytest.mark.parametrize("p", ORDERS)
def test_extreme_magnitudes(dtype, magnitudes, p):
    grads = [(torch.rand(3001, dtype=torch.float64) * m).to(DEVICE, dtype) for m in magnitudes]
    grads.append(torch.cat([g[:600] for g in grads]))
    owners = list(range(len(grads)))
    sums = backend.power_sums(one_each(grads), grads, p, None)
    expected = expected_sums(grads, owners, len(grads), p)
    torch.testing.assert_close(sums, expected, rtol=2 * NORM_TOLERANCE[dtype], atol=0)


# Equal values, whose rounding errors all point the same way.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1.7])
def test_equal_values_do_not_drift(dtype, value):
    grad = torch.full((100_003,), value, dtype=dtype, device=DEVICE)
    for p in (1.0, 2.0):
        exact = grad[0].double().item() ** p * grad.numel()
        assert backend.power_sums(one_each([grad]), [grad], p, None).item() == pytest.approx(
            exact, rel=2 * NORM_TOLERANCE[dtype] if dtype != torch.float64 else 1e-12
        )


@pytest.mark.parametrize("p", ORDERS)
def test_same_bits_every_run(p):
    grads = [random_grad((n,), dtype) for n in (20_000, 77) for dtype in DTYPES]
    runs = []
    for _ in range(2):
        copies = [g.clone() for g in grads]
        results = backend.clip_(
            bucket_of(copies, [0, 1, 0, 1, 2, 2, 0, 1]), copies, cap(0.5), ClipRule(p), UNSCALED, None
        )
        runs.append([*results, *copies])
    assert all(same_bits(a, b) for a, b in zip(*runs, strict=True))


# Tiny tiles and chunks stand in for gigabytes: loops over chunks of partials, and partials merged beforehand.
@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize(("sum_tile", "scale_tile"), [(64, 64), (64, 256), (16, 1024)])
def test_more_partials_than_a_chunk(monkeypatch, p, sum_tile, scale_tile):
    monkeypatch.setattr(triton_tables, "CHUNK", 4)
    monkeypatch.setattr(triton_tables, "SUM_TILE_BYTES", sum_tile)
    monkeypatch.setattr(triton_tables, "SCALE_TILE_BYTES", scale_tile)
    grads = [
        random_grad((n,), dtype) for n, dtype in ((400, DTYPES[0]), (150, DTYPES[1]), (20, DTYPES[0]), (9, DTYPES[2]))
    ]
    check_clip(grads, [1, 1, 0, 3], cap(0.5), ClipRule(p), count=4)
    grads[0][123] = math.nan
    bucket = bucket_of(grads, [1, 1, 0, 3])
    assert backend.power_sums(bucket, grads, p, None).isnan().tolist() == [False, True, False, False]
    assert scale_tile > 256 or bucket.state.tables.tables.chunks is not None


def test_many_tiny_tensors_in_one_component(monkeypatch):
    monkeypatch.setattr(triton_tables, "CHUNK", 16)
    grads = [random_grad((1 + i % 5,)) for i in range(60)]
    check_clip(grads, [int(i % 20 == 0) for i in range(60)], cap(0.5), ClipRule())
