"""Whatever the mesh and the placements: norms, clipped gradients and slices are those of the whole tensors."""

import math
import random
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from collectives import counted
from cwclip_kernels import ComponentClipper, ComponentSpec, component_norms, fused_component_clip_, thresholds
from cwclip_kernels.distributed.groups import RankGroup
from helpers import assert_norms, random_grad, same_bits
from ranks import on_ranks
from seed import LONGER
from sharded_tensors import assert_same, both_ways, full, plain, sharded

BACKENDS = ("cpu", "triton", "foreach", "reference")


def random_placements(generator, mesh, shape):
    """Any that DTensor takes; strided ones as FSDP2 makes them, over a shard of a later dimension of the mesh."""
    found = [generator.choice([Replicate(), *map(Shard, range(len(shape)))]) for _ in range(mesh.ndim)]
    if mesh.ndim == 2 and generator.random() < 0.4:
        dim = generator.randrange(len(shape))
        found = [_StridedShard(dim, split_factor=mesh.size(1)), Shard(dim)]
    return found


@contextmanager
def sent():
    """Lengths of what is reduced."""
    lengths = []
    reduce = RankGroup.reduce
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RankGroup, "reduce", lambda self, p, op: (lengths.append(p.numel()), reduce(self, p, op))[1])
        yield lengths


@on_ranks(2, 4)
@pytest.mark.parametrize("round", range(max(1, int(3 * LONGER))))
def test_any_placement(round):
    generator = random.Random(torch.initial_seed())
    size = dist.get_world_size()
    shapes = [(size,), *((n, size // n) for n in range(1, size + 1) if size % n == 0)]
    for _ in range(10):
        mesh = init_device_mesh("cpu", generator.choice(shapes))
        wholes, placements = [], []
        for _ in range(generator.randint(1, 6)):
            shape = [generator.choice([1, 2, 3, 5, 9, 16]) for _ in range(generator.randint(1, 3))]
            wholes.append(random_grad(shape))
            placements.append(None if generator.random() < 0.2 else random_placements(generator, mesh, shape))
        ours, theirs = both_ways(wholes, mesh, placements)
        components = generator.choice(["parameter", "all", lambda name, _: int(name[1:]) % 2])
        order = generator.choice([1.0, 2.0, 2.0, 3.0, 0.0, math.inf, -math.inf, -1.0])
        cap = generator.choice([0.01, 1.0, 100.0])
        expected = fused_component_clip_(theirs, cap, order, components=components, backend="reference")
        with counted() as counts:
            clipper = ComponentClipper(ours, cap, order, components=components)
        assert "allreduce_" not in counts
        with counted() as counts, sent() as payloads:
            result = clipper.clip_()
        assert_norms(result.norms, expected, torch.float32)
        assert_same(ours, theirs, torch.float32)
        buckets = {
            tuple(i for i, q in enumerate(p) if not q.is_replicate() and mesh.size(i) > 1)
            for p in placements
            if p is not None
        } - {()}
        assert counts == ({"allreduce_": len(buckets)} if buckets else {}), (placements, mesh)
        assert all(numel <= 2 * len(result.names) for numel in payloads), (payloads, placements)


@on_ranks(4)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64])
def test_backends_and_dtypes(backend, dtype):
    mesh = init_device_mesh("cpu", (2, 2))
    placements = [[Shard(0), Shard(0)], [Shard(0), Replicate()], [Replicate(), Shard(1)], [Replicate()] * 2, None]
    ours, theirs = both_ways([random_grad((9, 7), dtype) for _ in placements], mesh, placements)
    norms = fused_component_clip_(ours, 1.0, backend=backend)
    expected = fused_component_clip_(theirs, 1.0, backend="reference")
    assert_norms(norms, expected, dtype)
    assert_same(ours, theirs, dtype)
    # Of ours, whole: one element rounded the other way moves the norm of a float16 gradient by more than the table's.
    clipped = [(name, plain(full(p.grad))) for name, p in ours]
    assert_norms(component_norms(ours, backend=backend), component_norms(clipped, backend="reference"), dtype)


def cut_everywhere(names):
    return (
        ComponentSpec("parameter")
        .split(names[0], sizes=(3, 4, 2), names=("q", "k", "v"))
        .split(names[1], sizes=1)
        .split(names[2], sizes=(5, 2), dim=1)
        .split(names[3], sizes=3)
        .split(names[3], sizes=(1, 6), dim=1)
        .unitwise(names[4], dim=1)
    )


@on_ranks(2, 4)
@pytest.mark.parametrize("backend", ["cpu", "foreach", "reference"])
@pytest.mark.parametrize("dim", [0, 1])
def test_slices_are_logical_rows_even_where_a_shard_ends_within_one(backend, dim):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    names = ["qkv", "rows", "columns", "both", "units"]
    wholes = [random_grad((9, 7)) for _ in names]
    ours, theirs = both_ways(wholes, mesh, [[Shard(dim)]] * len(names), names)
    spec = cut_everywhere(names)
    norms = fused_component_clip_(ours, 0.5, components=spec, backend=backend)
    expected = fused_component_clip_(theirs, 0.5, components=spec, backend="reference")
    assert_norms(norms, expected, torch.float32)
    assert_same(ours, theirs, torch.float32)


@on_ranks(4)
@pytest.mark.parametrize("shape", [(2, 2), (4, 1), (1, 4)])
def test_slices_of_strided_shards(shape):
    mesh = init_device_mesh("cpu", shape)
    names = ["qkv", "rows", "columns", "both", "units"]
    for dim in (0, 1):
        strided = [_StridedShard(dim, split_factor=mesh.size(1)), Shard(dim)]
        ours, theirs = both_ways([random_grad((9, 7)) for _ in names], mesh, [strided] * len(names), names)
        spec = cut_everywhere(names)
        norms = fused_component_clip_(ours, 0.5, components=spec)
        assert_norms(norms, fused_component_clip_(theirs, 0.5, components=spec, backend="reference"), torch.float32)
        assert_same(ours, theirs, torch.float32)


@on_ranks(4)
def test_below_the_cap_bits_are_kept_and_nothing_but_the_sums_is_sent():
    mesh = init_device_mesh("cpu", (4,))
    ours, theirs = both_ways([random_grad((n, 3)) for n in (1, 5, 8)], mesh, [[Shard(0)]] * 3)
    fused_component_clip_(ours, 1e9)
    for (_, a), (_, b) in zip(ours, theirs, strict=True):
        assert same_bits(full(a.grad), b.grad)


@on_ranks(2, 4)
def test_several_dimensions_of_a_mesh_at_once_are_one_sum():
    """On eight ranks over a group of their own, made for it."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", {2: (1, 1, 2), 4: (1, 2, 2), 8: (2, 2, 2)}[size])
    for placements in (
        [Replicate(), Shard(0), Shard(0)],
        [Shard(0), Replicate(), Shard(1)],
        [Shard(1), Shard(0)] * 2,
    ):
        ours, theirs = both_ways([random_grad((9, 7))], mesh, [placements[:3]])
        clipper = ComponentClipper(ours, 0.5)
        with counted() as counts:
            norms = clipper.clip_().norms
        assert counts == {"allreduce_": 1}
        assert_norms(norms, fused_component_clip_(theirs, 0.5, backend="reference"), torch.float32)
        assert_same(ours, theirs, torch.float32)


@on_ranks(4)
def test_whether_any_is_infinite_is_asked_only_where_norms_do_not_tell():
    mesh = init_device_mesh("cpu", (2, 2))
    for placements, asked in (([Shard(0), Shard(0)], 0), ([Replicate(), Shard(0)], 2)):
        ours, _ = both_ways([random_grad((9, 7))], mesh, [placements])
        clipper = ComponentClipper(ours, 0.5)
        found = torch.zeros(())
        with counted() as counts:
            clipper.clip_(found_inf=found)
        assert counts == {"allreduce_": 1 + asked}


@on_ranks(2)
def test_gradients_of_other_placements_are_refused_by_name_on_all_ranks():
    mesh = init_device_mesh("cpu", (2,))
    for theirs, grad_is in ((Replicate(), Partial()), (Replicate(), Shard(0)), (Shard(0), Shard(1))):
        parameter = sharded(random_grad((4, 4)), mesh, [theirs])
        clipper = ComponentClipper([("norm.weight", parameter)], 1.0)
        other = DTensor.from_local(torch.ones(2, 4) if grad_is == Shard(0) else torch.ones(4, 4), mesh, [grad_is])
        if grad_is == Shard(1):
            other = DTensor.from_local(torch.ones(4, 2), mesh, [grad_is])
        parameter.grad = other
        with pytest.raises(ValueError, match=r"gradient of 'norm.weight' has placements .*redistribute"):
            clipper.clip_()
        # The way out that the message names.
        parameter.grad = parameter.grad.redistribute(parameter.device_mesh, parameter.placements)
        clipper.clip_()


@on_ranks(2)
def test_a_gradient_that_is_still_on_its_way_is_waited_for():
    """Redistributed without waiting, as the way out above may be written."""
    mesh = init_device_mesh("cpu", (2,))
    parameter = sharded(random_grad((4, 4)), mesh, [Replicate()])
    partial = DTensor.from_local(torch.ones(4, 4), mesh, [Partial()])
    parameter.grad = partial.redistribute(mesh, [Replicate()], async_op=True)
    assert fused_component_clip_([parameter], 1.0).item() == 8.0
    torch.testing.assert_close(parameter.grad.to_local(), torch.full((4, 4), 0.25))


@on_ranks(2)
def test_partial_parameters_are_refused():
    mesh = init_device_mesh("cpu", (2,))
    parameter = nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Partial()]))
    with pytest.raises(ValueError, match=r"'w' has placements .*Partial.*redistribute"):
        ComponentClipper([("w", parameter)], 1.0)


@on_ranks(4)
def test_a_rank_outside_of_a_mesh_takes_no_part():
    inner = init_device_mesh("cpu", (4,))
    half = torch.distributed.device_mesh.DeviceMesh("cpu", [0, 1])
    wholes = [random_grad((6,)), random_grad((6,))]
    parameters = [("outer", sharded(wholes[0], inner, [Shard(0)]))]
    if dist.get_rank() < 2:
        parameters.append(("inner", sharded(wholes[1], half, [Shard(0)])))
    norms = fused_component_clip_(parameters, 0.1, pp_mesh=dist.group.WORLD)
    expected = [w.double().norm().float() for w in wholes[: len(parameters)]]
    torch.testing.assert_close(norms, torch.stack(expected), rtol=1e-6, atol=0.0)


@on_ranks(2, 4)
def test_caps_that_adapt_stay_equal_on_all_ranks():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policies = {
        "ema": lambda: thresholds.EMA(warmup_steps=2),
        "z": lambda: thresholds.ZScore(warmup_steps=2),
        "percentile": lambda: thresholds.Percentile(50.0),
        "relative": lambda: thresholds.ParamRelative(),
        "numel": lambda: thresholds.FromGlobal(1.0, "numel"),
    }
    for name, make in policies.items():
        ours, theirs = both_ways(
            [random_grad((n, 3)) for n in (1, 5, 8)], mesh, [[Shard(0)], [Replicate()], [Shard(0)]]
        )
        for (_, a), (_, b) in zip(ours, theirs, strict=True):
            values = random_grad(b.shape)
            b.data.copy_(values)
            a.data.copy_(distribute_tensor(values, mesh, a.placements, src_data_rank=None))
        one, two = ComponentClipper(ours, make()), ComponentClipper(theirs, make(), backend="reference")
        for step in range(6):
            for (_, a), (_, b) in zip(ours, theirs, strict=True):
                b.grad = random_grad(b.shape, scale=1.0 + step)
                a.grad = distribute_tensor(b.grad.clone(), mesh, a.placements, src_data_rank=None)
            caps, expected = one.clip_().caps, two.clip_().caps
            torch.testing.assert_close(caps, expected, rtol=1e-5, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
            everywhere = [None] * dist.get_world_size()
            dist.all_gather_object(everywhere, caps.tolist())
            assert all(c == everywhere[0] for c in everywhere), name
            assert_same(ours, theirs, torch.float32)


@on_ranks(2)
def test_norms_and_totals_of_the_whole():
    mesh = init_device_mesh("cpu", (2,))
    wholes = [random_grad((n,)) for n in (1, 5, 8)]
    ours, _ = both_ways(wholes, mesh, [[Shard(0)]] * 3)
    for order in (1.0, 2.0, 3.0, math.inf, 0.0):
        clipper = ComponentClipper(ours, math.inf, order)
        total = clipper.total_norm(clipper.norms())
        expected = torch.linalg.vector_norm(torch.cat(wholes).double(), order)
        torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=0.0)


@on_ranks(2)
def test_explain_says_who_is_asked():
    mesh = init_device_mesh("cpu", (2,))
    ours, _ = both_ways([random_grad((5,)), random_grad((4,))], mesh, [[Shard(0)], [Replicate()]])
    assert "one all-reduce of 1 sums over 2 ranks (0, 1)" in ComponentClipper(ours, 1.0).explain()
    assert "no communication between ranks" in ComponentClipper(ours[1:], 1.0).explain()
