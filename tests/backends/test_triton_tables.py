"""The Triton backend's host side: tile tables, addresses that move, graphs, and what it says where it can't run."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from cwclip_kernels.backends import memory, registry, triton_tables
from cwclip_kernels.backends import triton as backend
from cwclip_kernels.backends.native import packed
from cwclip_kernels.core import formula
from helpers import DEVICE, DTYPES, random_grad, same_bits
from triton_buckets import bucket_of, expected_sums, one_each

pytestmark = pytest.mark.usefixtures("needs_triton")


# Sizes that no machine here could hold; a tensor on the meta device has shape and strides only.
def test_tables_of_huge_gradients():
    grads = [
        torch.empty(2**31 + 12_345, dtype=torch.bfloat16, device="meta"),
        torch.empty(3, dtype=torch.float32, device="meta"),
        torch.empty(2**24, dtype=torch.float32, device="meta"),
        torch.empty(2**28, dtype=torch.float64, device="meta"),
        torch.empty(0, device="meta"),
    ]
    bucket = bucket_of(grads, [2, 2, 0, 2, 1])
    tables = triton_tables.build_tables(bucket, grads)
    for tiles in (tables.sum_tiles, tables.scale_tiles):
        for dtypes, _, group, several in tiles:
            assert several == len(group)
            assert group.dtype == torch.int64
            for i in group[:, 0].unique().tolist():
                assert {dtypes[j] for j in group[group[:, 0] == i, 5].tolist()} == {grads[i].dtype}
                _, start, length, *_ = group[group[:, 0] == i].sort(0).values.T
                assert start[0] == 0
                assert torch.equal((start[1:] - start[:-1]).unique(), length.max().view(1)) or len(start) == 1
                assert length.sum() == grads[i].numel()
    slots = torch.cat([tiles.rows[:, 6] for tiles in tables.sum_tiles])
    assert torch.equal(slots.sort().values, torch.arange(tables.count))
    assert tables.chunks is not None
    assert (tables.chunks.diff() <= triton_tables.CHUNK).all()
    assert tables.chunks[-1] == tables.count
    assert tables.spans[-1] == len(tables.chunks) - 1
    assert tables.spans.diff()[0] <= triton_tables.CHUNK  # 64 MB
    assert tables.components.tolist() == [0, 1, 2]


def test_offsets_beyond_32_bits():
    grads = [random_grad((5000,), dtype) for dtype in DTYPES]
    bucket, far = one_each(grads), 2**33
    call = backend.prepare(bucket, grads, None)
    (group,) = call.tables.sum_tiles
    rows = group.rows.clone()
    rows[:, 1] += far
    sizes = torch.tensor([grad.element_size() for grad in grads], device=DEVICE)
    moved = call._replace(
        addresses=call.addresses - far * sizes,
        tables=replace(call.tables, sum_tiles=[group._replace(rows=rows)]),
    )
    with backend.launching_on(bucket.device):
        partials = backend.partial_sums(moved, 1.0)
    assert partials.tolist() == pytest.approx([grad.double().abs().sum().item() for grad in grads], rel=1e-6)


def test_gradients_move_between_calls():
    grads = [random_grad((300,)), random_grad((9,), torch.bfloat16)]
    bucket = one_each(grads)
    first = backend.power_sums(bucket, grads, 2.0, None)
    tables = bucket.state.tables
    before = bucket.state.addresses.sent[1]
    assert same_bits(backend.power_sums(bucket, grads, 2.0, None), first)
    assert bucket.state.addresses.sent[1] is before
    moved = [g.clone() for g in grads]
    assert same_bits(backend.power_sums(bucket, moved, 2.0, None), first)
    assert bucket.state.addresses.sent[0] == packed(g.data_ptr() for g in moved)
    assert bucket.state.tables is tables


def test_values_of_sparse_gradients_change_size():
    bucket = bucket_of([torch.empty(0)], [0], plain=False)
    for n in (10, 20_000, 3):
        values = random_grad((n,))
        expected = expected_sums([values], [0], 1, 2.0)
        torch.testing.assert_close(backend.power_sums(bucket, [values], 2.0, None), expected, rtol=2e-6, atol=0)


def test_default_device_does_not_matter():
    grad = random_grad((100,))
    bucket = one_each([grad])
    with torch.device("meta"):
        sums = backend.power_sums(bucket, [grad], 2.0, None)
    torch.testing.assert_close(sums, expected_sums([grad], [0], 1, 2.0), rtol=2e-6, atol=0)


def test_captured_graphs_get_addresses_of_their_own(monkeypatch):
    # Only the bookkeeping: nothing is captured here, and pinned memory needs a GPU.
    monkeypatch.setattr(memory, "_pinned", lambda numbers: torch.empty(len(numbers) // 8, dtype=torch.int64))
    monkeypatch.setattr(memory, "_KEPT_FOR_GRAPHS", [])
    grads = [random_grad((300,)), random_grad((9,))]
    bucket = one_each(grads)
    eager = backend.prepare(bucket, grads, None)
    numbers, placed = bucket.state.addresses, bucket.state.tables
    with pytest.raises(RuntimeError, match="make one before"):
        memory.Placed(placed.tables).on(bucket.device, None)
    assert placed.on(bucket.device, None) is eager.tables
    captured = [numbers.on(bucket.device, packed(pointers), None) for pointers in ((1, 2), (3, 4))]
    assert [addresses.tolist() for addresses in captured] == [[1, 2], [3, 4]]
    ((tables,), *hosts) = memory._KEPT_FOR_GRAPHS
    assert tables is eager.tables
    assert [host.tolist() for (host,) in hosts] == [[1, 2], [3, 4]]
    assert backend.prepare(bucket, grads, None).addresses is eager.addresses


def test_refusals_say_what_to_do(monkeypatch):
    device = torch.device(DEVICE)
    assert backend.refuses(device, torch.bfloat16, 2.0) is None
    assert "norm_type 1, 2 and inf, not 3" in backend.refuses(device, torch.bfloat16, 3.0)
    assert "torch.int8" in backend.refuses(device, torch.int8, 2.0)
    assert "not mps" in backend.unavailable(torch.device("mps"))

    unavailable = backend.unavailable.__wrapped__
    interpreted = backend.kernels().interpreted
    monkeypatch.setattr(backend.kernels(), "interpreted", not interpreted)
    wrong = unavailable(device)
    assert "TRITON_INTERPRET" in wrong
    assert ("set" if DEVICE == "cpu" else "unset") in wrong

    def missing():
        raise ModuleNotFoundError("No module named 'triton'")

    monkeypatch.setattr(backend, "kernels", missing)
    assert "pip install" in unavailable(device)


# As Intel's Arc; Max has float64.
@pytest.mark.parametrize("has_fp64", [False, True])
def test_gpus_without_float64_are_refused(monkeypatch, has_fp64):
    properties = SimpleNamespace(has_fp64=has_fp64)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(formula, "_xpu_has_float64", formula._xpu_has_float64.__wrapped__)
    monkeypatch.setattr(backend, "unavailable", backend.unavailable.__wrapped__)
    monkeypatch.setattr(backend.kernels(), "interpreted", False)
    gpu = torch.device("xpu", 0)
    name, why = registry.choose(gpu, torch.float32, 2.0, None)
    assert formula.wide_dtype(gpu) == (torch.float64 if has_fp64 else torch.float32)
    if has_fp64:
        assert (name, why) == ("triton", "first choice on xpu")
    else:
        assert name == "foreach"
        assert "triton computes norms in float64, which this GPU doesn't have" in why
        with pytest.raises(RuntimeError, match="take backend='foreach', with float32 there"):
            registry.choose(gpu, torch.float32, 2.0, "triton")
