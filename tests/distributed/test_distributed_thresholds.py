"""Thresholds by pattern, sizes and units on several ranks: those of the whole gradient."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from collectives import counted
from cwclip_kernels import ComponentClipper, ComponentSpec, fused_component_clip_
from cwclip_kernels.thresholds import EMA, RMS, Bounded, ByPattern, ParamRelative, ZScore
from helpers import assert_norms, parameter, random_grad, same_bits
from ranks import on_ranks
from sharded_tensors import assert_same, both_ways, full, plain


@on_ranks(2)
def test_shards():
    """Three steps of each kind of threshold; a rank without elements of a parameter among them."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    wholes = [random_grad(shape) for shape in ((5, 3), (4, 3), (1, 6), (3,), (7, 2))]
    placements = [[Shard(0)], [Replicate()], [Shard(0)], None, [Shard(1)]]
    ours, theirs = both_ways(wholes, mesh, placements)

    def caps():
        bounded = Bounded(ZScore(warmup_steps=1), high=0.5)
        return {"p0": EMA(warmup_steps=1), "p[12]": RMS(0.1), "p3": bounded, "p4": 0.2}

    clippers = [
        ComponentClipper(ours, caps(), eps=0.25),
        ComponentClipper(theirs, caps(), eps=0.25, backend="reference"),
    ]
    for _ in range(3):
        for (_, a), (_, b), p in zip(ours, theirs, placements, strict=True):
            grad = random_grad(b.shape)
            b.grad = grad.clone()
            a.grad = grad if p is None else distribute_tensor(grad, mesh, p, src_data_rank=None)
        with counted() as counts:
            result = clippers[0].clip_()
        assert counts == {"allreduce_": 1}
        expected = clippers[1].clip_()
        assert_norms(result.norms, expected.norms, torch.float32)
        torch.testing.assert_close(result.caps, expected.caps, rtol=1e-6, atol=0)
        assert_same(ours, theirs, torch.float32)


@on_ranks(2)
def test_patterns_about_another_stage():
    """A threshold that has no component here isn't asked; its state is saved and loaded all the same."""
    rank = dist.get_rank()
    name = "head.weight" if rank == 1 else "embedding.weight"
    parameters = [(name, plain(random_grad((4, 2)))), (f"{name}.bias", plain(random_grad((4,))))]
    caps = {"head.weight": ZScore(warmup_steps=1), "embedding.weight": RMS(0.1), "*": 0.25}
    clipper = ComponentClipper(parameters, caps, pp_mesh=dist.group.WORLD)
    result = clipper.clip_()
    assert result.caps[1] == 0.25
    own = clipper.max_norm.by_pattern[name]
    assert own.setting.names == (name,)
    assert own.setting.everywhere == (name,)
    twin = ComponentClipper(
        [(n, plain(p.grad)) for n, p in parameters],
        {"head.weight": ZScore(warmup_steps=1), "embedding.weight": RMS(0.1), "*": 0.25},
        pp_mesh=dist.group.WORLD,
    )
    twin.load_state_dict(clipper.state_dict())
    for (_, p), q in zip(parameters, twin.parameters, strict=True):
        p.grad = random_grad(p.shape)
        q.grad = p.grad.clone()
    assert same_bits(clipper.clip_().caps, twin.clip_().caps)
    with pytest.raises(ValueError, match="the pattern 'tail' matches none of the 4 components"):
        ComponentClipper(parameters, {"tail": RMS(1.0), "*": 1.0}, pp_mesh=dist.group.WORLD)
    with pytest.raises(ValueError, match=r"max_norm: \{'\*bias': 0.1, '\*': EMA\} looks at all components together"):
        ComponentClipper(parameters, {"*bias": 0.1, "*": EMA()}, pp_mesh=dist.group.WORLD)


@on_ranks(2)
def test_a_component_that_spans_stages():
    """Parameters' norms are added up over ranks: by all of them, though one alone has a component that needs them."""
    rank = dist.get_rank()
    parameters = [(f"own.{rank}", plain(random_grad((4,)))), (f"shared.{rank}", plain(random_grad((3,))))]
    clipper = ComponentClipper(
        parameters,
        {"own.0": ParamRelative(0.5), "*": 0.25},
        components=lambda name, p: "shared" if name.startswith("shared") else name,
        pp_mesh=dist.group.WORLD,
    )
    for _, p in parameters:
        p.data.fill_(1.0)
    assert clipper.clip_().caps.tolist() == ([1.0, 0.25] if rank == 0 else [0.25, 0.25])
    assert clipper.clip_().norms[1] <= 0.25 * (1 + 1e-6)


@on_ranks(2)
def test_ranks_with_other_mappings_are_refused():
    mesh = init_device_mesh("cpu", (2,))
    ours, _ = both_ways([random_grad((4, 3))], mesh, [[Shard(0)]])
    other = EMA() if dist.get_rank() else RMS(1.0)
    with pytest.raises(ValueError, match="max_norm=.*'p0': (EMA|RMS)"):
        ComponentClipper(ours, {"p0": other})
    ComponentClipper(ours, {"p0": EMA()})  # another object on each rank


@on_ranks(2)
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_units_along_several_dims_of_shards(dim):
    mesh = init_device_mesh("cpu", (2,))
    whole = random_grad((3, 5, 4))
    ours, theirs = both_ways([whole], mesh, [[Shard(dim)]])
    for _, p in theirs:
        p.data.copy_(random_grad(p.shape))
    spec = ComponentSpec().unitwise("*", dim=(0, 1))
    for caps in (RMS(0.1), 0.5):
        norms = fused_component_clip_(ours, caps, components=spec)
        expected = fused_component_clip_(theirs, caps, components=spec, backend="reference")
        assert_norms(norms, expected, torch.float32)
        assert_same(ours, theirs, torch.float32)
    clipper = ComponentClipper(ours, ByPattern({"*": ParamRelative()}), components=spec)
    assert clipper.names[6] == "p0[1,1]"
    sizes = full(ours[0][1].detach()).norm(dim=2).flatten().clamp(min=1e-3) * 0.01
    torch.testing.assert_close(clipper.clip_().caps.float(), sizes)


@on_ranks(2)
def test_sizes_of_components_that_span_stages_are_not_known():
    """Each rank made its own cap from the elements that it has."""
    rank = dist.get_rank()
    parameters = [(f"h.{rank}.weight", plain(torch.ones(100 + 200 * rank))), (f"h.{rank}.bias", plain(torch.ones(3)))]
    common = {"components": "type", "pp_mesh": dist.group.WORLD}
    for caps in (RMS(0.5), Bounded(RMS(0.5), high=1.0), {"*weight": RMS(0.5)}, {"*": Bounded(RMS(0.5), low=0.1)}):
        with pytest.raises(ValueError, match="RMS needs the size of each component, but several ranks of pp_mesh"):
            ComponentClipper(parameters, caps, **common)
    ComponentClipper(parameters, ParamRelative(0.5), **common).clip_()
    # One that lies within a stage has a size.
    own = [(f"stage{rank}.weight", plain(torch.ones(100 + 200 * rank)))]
    result = ComponentClipper(own, RMS(0.5), pp_mesh=dist.group.WORLD).clip_()
    assert result.caps.item() == pytest.approx(0.5 * (100 + 200 * rank) ** 0.5)


@on_ranks(2)
def test_a_frozen_parameter_that_still_has_its_gradient():
    """torch's optimizers step it; ParamRelative's cap is by its own norm, sharded or not."""
    mesh = init_device_mesh("cpu", (2,))
    whole, values = torch.ones(5, 3), torch.full((5, 3), 2.0)
    alone = parameter(whole.clone())
    alone.data.copy_(values)
    sharded = torch.nn.Parameter(distribute_tensor(values, mesh, [Shard(0)], src_data_rank=None))
    sharded.grad = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
    caps = []
    for p in (alone, sharded):
        p.requires_grad_(False)
        caps.append(ComponentClipper([("weight", p)], ParamRelative(0.1)).clip_().caps)
    torch.testing.assert_close(caps[1], caps[0], rtol=1e-6, atol=0.0)
    assert caps[0].item() == pytest.approx(0.1 * values.norm().item())
