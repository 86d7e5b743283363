"""The CUDA kernels and their launches by themselves: odd shapes on odd machines, the workspace, and their hand-over.

Without a GPU, as everywhere in the suite, they run on the CPU (_support/native/). Here that is used to choose how
many processors there are, how many blocks run at a time, and who goes first.
"""

import math
import random
import struct
from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import torch

from cuda_on_host import FORMS
from cwclip_kernels import ComponentClipper, component_norms, fused_component_clip_
from cwclip_kernels.backends import cuda, native
from helpers import DEVICE, DTYPES, assert_grads, assert_norms, copy_of, grads_of, parameter, random_grad, same_bits
from seed import SEED

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="about a machine that a GPU isn't; see test_cuda_gpu.py")

TILE_BYTES = 32 * 1024  # csrc/cuda/program.h
FEW, MANY = 464, 4048  # gradients that one launch can address


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    monkeypatch.setenv("CWCLIP_CUDA_FORM", str(request.param))
    return request.param


def shifted(size, dtype, by):
    """A gradient that begins ``by`` elements after an address that torch aligns, in memory that ends with it."""
    return random_grad((size + by,), dtype)[by:]


def check(params, max_norm=0.7, norm_type=2.0, **more):
    """As the reference does, the workspace zero afterwards, and every gradient's neighbourhood as it was."""
    expected = copy_of(params)
    clipper = ComponentClipper(params, max_norm, norm_type, backend="cuda", **more)
    bases = {p.grad._base.data_ptr(): p.grad._base for p in params if p.grad is not None and p.grad._base is not None}
    around = {at: (base, base.clone()) for at, base in bases.items()}
    norms = clipper.clip_().norms
    assert_zeroed(clipper)
    reference = fused_component_clip_(expected, max_norm, norm_type, backend="reference", **more)
    dtypes = {p.grad.dtype for p in params if p.grad is not None}
    exact = torch.float64 if dtypes == {torch.float64} else torch.float32
    assert_norms(norms, reference, exact)
    assert_grads(params, expected, exact)
    for base, before in around.values():
        inside = torch.zeros(base.numel(), dtype=torch.bool)
        for p in params:
            if p.grad._base is base:
                inside.as_strided(p.grad.shape, p.grad.stride(), p.grad.storage_offset()).fill_(True)
        assert same_bits(base.flatten()[~inside], before.flatten()[~inside])
    return clipper


def assert_zeroed(clipper):
    """Counters, tickets, done and list are what the next call expects."""
    ((plan,),) = clipper._session.plans._kept.values()
    (bucket,) = plan.buckets
    state = bucket.state
    (workspace,) = state.workspaces.values()
    assert not workspace[: native._C.partials_at(state.program)].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_around_warps_vectors_and_tiles(dtype, form, machine):
    tile = TILE_BYTES // dtype.itemsize
    sizes = (0, 1, 7, 31, 32, 33, 255, 256, 257, tile - 1, tile, tile + 1, 2 * tile, 3 * tile + 5)
    check([parameter(random_grad((size,), dtype)) for size in sizes])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_misalignment_of_heads_and_tails(dtype, form, machine):
    sizes = (1, 3, 15, 16, 17, 40, TILE_BYTES // dtype.itemsize + 3)
    check([parameter(shifted(size, dtype, by)) for by in range(16 // dtype.itemsize + 1) for size in sizes])


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
def test_dtypes_and_components_mixed(norm_type, form, machine):
    params = [
        parameter(random_grad((size,), dtype)) for size in (5, 0, 3000, 40000) for dtype in DTYPES for _ in range(2)
    ]
    cap = 0.7 if norm_type != 1.0 else 900.0
    check(params, cap, norm_type, components=lambda name, p: int(name) % 5)


@pytest.mark.parametrize("nonfinite", ["propagate", "zero", "skip"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_bad_value_anywhere_stays_in_its_component(value, nonfinite, form, machine):
    params = [parameter(random_grad((size,))) for size in (100, 9000, 20000, 33)]
    params[2].grad[random.Random(SEED).randrange(20000)] = value
    check(params, nonfinite=nonfinite)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1e-38, 1e-30, 1e-20, 1e19, 1e38])
def test_squares_beyond_float32(dtype, magnitude, form, gpu):
    """What is added up in float32 first is done again in float64 where that isn't enough."""
    params = [parameter((random_grad((size,)) * magnitude).to(dtype)) for size in (40, 4096, 20000)]
    params += [parameter(p.grad.clone()) for p in params]
    params[3].grad[::2] = 0.0
    params[4].grad[-1] = 1.0
    check(params, 0.01)
    check([parameter(p.grad.clone()) for p in params], 1e30, 1.0)


def test_gaps_and_dense_layouts(form, machine):
    grid = random_grad((60, 50))
    params = [
        parameter(grid[:, ::2]),
        parameter(random_grad((50, 40)).t()),
        parameter(random_grad((3, 4, 5, 6)).to(memory_format=torch.channels_last)),
        parameter(random_grad((9, 400), torch.bfloat16)[:, 3:390]),
        parameter(random_grad((2, 3, 30, 500), torch.float64)[:, 1:, ::3, 7::2].transpose(1, 3)),
        parameter(random_grad((7,))),
    ]
    check(params)


def in_pairs(name, p):
    return int(name) // 2


# Components of one tile are clipped launch by launch; three launches have one in the middle, for those that aren't.
@pytest.mark.parametrize(
    ("components", "count"),
    [
        *((components, count) for components in (None, in_pairs) for count in (FEW, FEW + 1, MANY, MANY + 1)),
        (in_pairs, 2 * MANY + 300),
    ],
)
def test_as_many_gradients_as_one_launch_can_address_and_more(components, count, form, gpu):
    sizes = torch.randint(0, 9, (count,)).tolist()
    flat = random_grad((sum(sizes),))
    params = [parameter(grad) for grad in flat.split(sizes)]
    before = gpu.launches()
    check(params, 1.5, components=components)
    tables = math.ceil(sum(size > 0 for size in sizes) / MANY)
    # What is one tile is scaled where it is measured.
    once = components is None or (form == 2 and tables == 1)
    assert gpu.launches() - before == (tables if once else 2 * tables)


def test_the_form_is_chosen_by_size(gpu, monkeypatch):
    """One launch for what may still be in L2 when its norms are known; CWCLIP_CUDA_FORM decides otherwise."""
    monkeypatch.delenv("CWCLIP_CUDA_FORM", raising=False)

    def launches(nbytes, l2_bytes):
        gpu.set_l2_bytes(l2_bytes)
        params = [parameter(random_grad((nbytes // 8,))) for _ in range(2)]
        before = gpu.launches()
        check(params, 0.1)
        return gpu.launches() - before

    assert launches(4 * TILE_BYTES, 10 * TILE_BYTES) == 1
    assert launches(4 * TILE_BYTES + 8, 10 * TILE_BYTES) == 2
    monkeypatch.setenv("CWCLIP_CUDA_FORM", "2")
    assert launches(4 * TILE_BYTES + 8, 10 * TILE_BYTES) == 1


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
def test_large_components_are_added_up_by_all_workers(norm_type, form, machine):
    """Of more tiles than cuda_on_host.FLAGS lets a warp add up, beside some that it may."""
    params = [parameter(random_grad((tiles * TILE_BYTES // 4 - 3,))) for tiles in (9, 1, 2, 300, 6, 7)]
    check(params, 0.7, norm_type)


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_components_beside_others(dtype, form, machine):
    """One warp each, as many as a block has warps, one more, and the sizes at which they are small no longer."""
    small = 4096 // dtype.itemsize
    sizes = [small - 1, small, small + 1, 3 * small, 5, 0, 1] + [2 * TILE_BYTES] + [37] * 9 + [40_000] + [3] * 20
    params = [parameter(shifted(size, dtype, i % 5)) for i, size in enumerate(sizes)]
    check(params)
    check([parameter(p.grad.clone()) for p in params], error_if_nonfinite=True)
    check([parameter(p.grad.clone()) for p in params], components=lambda name, p: int(name) // 3)


def test_two_steps(machine):
    """Norms first, then scaling by coefficients that are already there."""
    params = [parameter(random_grad((size,), dtype)) for size in (3, 0, 30000, 9000) for dtype in DTYPES]
    check(params, error_if_nonfinite=True)


def test_two_steps_over_several_tables(gpu):
    params = [parameter(grad) for grad in random_grad((2 * MANY + 2,)).split(2)]
    grads = grads_of(params)
    assert_norms(component_norms(params, backend="cuda"), component_norms(params, backend="reference"), torch.float32)
    fused_component_clip_(params, 0.1, error_if_nonfinite=True, components="all", backend="cuda")
    expected = [parameter(grad) for grad in grads]
    fused_component_clip_(expected, 0.1, components="all", backend="reference")
    assert_grads(params, expected, torch.float32)


def test_no_gradient_and_no_element(form, gpu):
    check([parameter(random_grad((0,)))])
    check([parameter(random_grad((0, 3))), parameter(None), parameter(random_grad((5,)))])
    assert fused_component_clip_([parameter(random_grad((0,)))], 0.1, backend="cuda").tolist() == [0.0]


def test_the_order_of_blocks_changes_no_bit(form, gpu):
    """Other machines, other seeds: whoever measures a tile, whatever the order of the list."""
    params = [parameter(random_grad((size,), dtype)) for size in (3, 30000, 9000) for dtype in DTYPES]
    results = []
    for processors, resident, seed in ((1, 1, 0), (2, 4, 1), (2, 4, 2), (5, 3, 3), (7, 14, 4)):
        gpu.set_machine(processors, resident, seed)
        copies = copy_of(params)
        result = ComponentClipper(copies, 0.3, backend="cuda", components="all").clip_()
        results.append([result.norms, result.coefs, *grads_of(copies)])
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


def test_one_workspace_serves_call_after_call(gpu, monkeypatch):
    """Forms in turn, two-step calls between them, other gradients at other addresses."""
    params = [parameter(random_grad((size,))) for size in (10, 20000, 0, 8192, 3)]
    clipper = ComponentClipper(params, 0.5, backend="cuda")
    for step in range(12):
        monkeypatch.setenv("CWCLIP_CUDA_FORM", str(1 + step % 2))
        gpu.set_machine(1 + step % 3, 1 + step % 5, step)
        for p in params:
            p.grad = random_grad(p.shape, scale=10.0 ** (step % 3 - 1))
        expected = copy_of(params)
        if step % 4 == 3:
            assert_norms(clipper.norms(), component_norms(params, backend="reference"), torch.float32)
        clipper.clip_()
        fused_component_clip_(expected, 0.5, backend="reference")
        assert_grads(params, expected, torch.float32)
        assert_zeroed(clipper)
    ((plan,),) = clipper._session.plans._kept.values()
    assert len(plan.buckets[0].state.workspaces) == 1


def test_gradients_other_than_planned_are_never_touched(gpu):
    """Swapped behind the plan's back: looked at once more, and served or refused by name."""
    params = [parameter(random_grad((40,))), parameter(random_grad((4, 5)))]
    clipper = ComponentClipper(params, 0.1, backend="cuda")
    clipper.clip_()
    params[1].data = torch.zeros(7, 3)
    params[1].grad = random_grad((7, 3))
    expected = copy_of(params)
    clipper.clip_()
    fused_component_clip_(expected, 0.1, backend="reference")
    assert_grads(params, expected)
    shared = random_grad((50,))
    params[0].grad, params[1].grad = shared[:40], shared[29:].view(7, 3)
    before = shared.clone()
    with pytest.raises(ValueError, match="the gradients of '0' and '1' share memory"):
        clipper.clip_()
    assert same_bits(shared, before)


def test_refusals_say_what_to_do(monkeypatch):
    unavailable = cuda.unavailable.__wrapped__
    assert native.unavailable() is None  # is loaded now, and not behind the stand-ins' backs
    gpu = torch.device("cuda", 0)
    assert "serves NVIDIA GPUs, not cpu" in cuda.refuses(torch.device("cpu"), torch.float32, 2.0)
    monkeypatch.setattr(torch.version, "hip", "6.3")
    assert "not AMD GPUs" in cuda.refuses(gpu, torch.float32, 2.0)
    monkeypatch.setattr(torch.version, "hip", None)
    assert "norm_type 1, 2 and inf, not 3" in cuda.refuses(gpu, torch.float32, 3.0)
    monkeypatch.setattr(native, "_C", object(), raising=False)
    assert "CWCLIP_BUILD=cuda pip install" in unavailable(gpu)
    monkeypatch.setattr(native, "_C", Mock(cuda_obstacle=lambda device: "no kernel image; reinstall"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU of the future")
    assert unavailable(gpu) == "can't run on a GPU of the future: no kernel image; reinstall"
    monkeypatch.setattr(native, "unavailable", lambda: "is missing")
    assert unavailable(gpu) == "is missing"


def test_a_driver_that_cannot_launch_the_kernels_is_refused(gpu):
    """Kernels with 32 KB of parameters would load there, and fail when they are launched."""
    assert gpu.cuda_obstacle(0) is None
    gpu.set_driver(12000)
    assert gpu.cuda_obstacle(0) == "its driver knows CUDA 12.0, and 12.1 is needed; update the driver"
    gpu.set_driver(12010)
    assert gpu.cuda_obstacle(0) is None


class Subclass(torch.Tensor):
    pass


class TestCalls:
    """What Python hands over, checked before anything is launched."""

    def test_signatures(self, gpu):
        grads = [random_grad((3, 4)), random_grad((5,), torch.bfloat16), random_grad(()), random_grad((2, 0))]
        signature = gpu.signature_of(grads)
        addresses = gpu.addresses_of(grads, signature, None, True)
        assert struct.unpack("4Q", addresses) == tuple(g.data_ptr() for g in grads)
        assert gpu.addresses_of(grads, signature, addresses, True) is addresses
        moved = [grads[0].clone(), *grads[1:]]
        assert gpu.addresses_of(moved, signature, addresses, True) != addresses
        for other in (
            grads[:-1],
            [*grads, grads[0]],
            [grads[0].t(), *grads[1:]],
            [grads[0].double(), *grads[1:]],
            [grads[0].to("meta"), *grads[1:]],
            [torch.nn.Parameter(grads[0]), *grads[1:]],
            [None, *grads[1:]],
            [grads[0].to_sparse(), *grads[1:]],
        ):
            assert gpu.addresses_of(other, signature, addresses, True) is None
        twice = [grads[0], grads[0]]
        assert gpu.addresses_of(twice, gpu.signature_of(twice), None, True) is None

    def test_errors(self, gpu):
        signature = gpu.signature_of([random_grad((3,))])
        for other in (random_grad((3,)).to_sparse(), random_grad((3,)).as_subclass(Subclass), 7):
            assert gpu.signature_of([other]) is None
            with pytest.raises(TypeError, match="not another subclass"):
                native.Addresses([other])
        with pytest.raises(TypeError, match="a list"):
            gpu.signature_of((torch.zeros(1),))
        with pytest.raises(TypeError, match="expected bytes"):
            gpu.addresses_of([], "signature", None, True)
        with pytest.raises(RuntimeError, match=r"outside \[0, 1\)"):
            gpu.cuda_program(signature, struct.pack("q", 1), None, 1, False)
        with pytest.raises(RuntimeError, match="too short"):
            gpu.cuda_program(signature[:-1], struct.pack("q", 0), None, 1, False)
        with pytest.raises(RuntimeError, match="one for each of the 2 gradients"):
            gpu.cuda_program(signature + signature, struct.pack("q", 0), None, 1, False)
        with pytest.raises(RuntimeError, match="expected float32, bfloat16, float16 or float64"):
            gpu.cuda_program(
                gpu.signature_of([torch.zeros(3, dtype=torch.int32)]), struct.pack("q", 0), None, 1, False
            )
        program, _, _ = gpu.cuda_program(signature, struct.pack("q", 0), None, 1, False)
        with pytest.raises(ValueError, match="one for each gradient"):
            gpu.cuda_power_sums(program, b"", 0, 0, 2.0, 0)
        with pytest.raises(ValueError, match="call cuda_place"):
            gpu.cuda_power_sums(program, bytes(8), 0, 0, 2.0, 0)
        with pytest.raises(ValueError, match="expected 1, 2 or inf"):
            gpu.rule(3.0, 1e-6, 0)
        with pytest.raises(ValueError, match="expected 0, 1 or 2"):
            gpu.rule(2.0, 1e-6, 3)
        with pytest.raises(TypeError, match=r"expected cuda_clip\(program"):
            gpu.cuda_clip(program)
