"""Ranks that hold parts without being DTensors: FullyShardedDataParallel, ZeRO, pipelines, experts; and DDP."""

import math
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import Shard

from collectives import counted
from cwclip_kernels import (
    ComponentClipper,
    ComponentSpec,
    clip_in_backward,
    component_norms,
    fused_component_clip_,
    thresholds,
)
from cwclip_kernels.distributed import groups
from cwclip_kernels.distributed.shards import is_dtensor
from helpers import assert_norms, parameter, random_grad, same_bits
from ranks import on_ranks
from sharded_tensors import assert_same, both_ways, full, plain, sharded
from side_by_side import check, pair
from small_transformer import Block, Model


def by_name(result, expected):
    """Both norms in the first one's order: a flat parameter holds what its module owns, wherever that came before."""
    norms = dict(zip(expected.names, expected.norms, strict=True))
    return result.norms, torch.stack([norms[name] for name in result.names])


def wrapped(model, **options):
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        device_id=torch.device("cpu"),
        **options,
    )


@on_ranks(2, 4)
@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize("components", ["parameter", "layer", "all"])
def test_fully_sharded_data_parallel(use_orig_params, components):
    """Flat parameters, in which several of the model's lie, and a rank's part may begin within one."""
    whole, model = pair(lambda m: wrapped(m, use_orig_params=use_orig_params))
    ours = ComponentClipper(model, 0.1, components=components, process_group=model.process_group)
    theirs = ComponentClipper(whole, 0.1, components=components, backend="reference")
    assert set(ours.names) == set(theirs.names)
    data = torch.randint(7, (5, 2, 4))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.3) for m in (whole, model)]
    for step in range(5):
        for m in (whole, model):
            m(data[step]).square().sum().backward()
        with counted() as counts:
            result = ours.clip_()
        assert counts == {"allreduce_": 1}
        torch.testing.assert_close(*by_name(result, theirs.clip_()), rtol=1e-9, atol=0.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    with FullyShardedDataParallel.summon_full_params(model):
        for (name, a), b in zip(model.named_parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(
                a.detach(), b.detach(), rtol=1e-8, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
            )


@on_ranks(2, 4)
def test_slices_of_flat_parameters():
    whole, model = pair(lambda m: wrapped(m, use_orig_params=False))
    spec = (
        ComponentSpec("parameter").split("*.qkv.*", sizes=(10, 10, 10), names=("q", "k", "v")).unitwise("head.weight")
    )
    ours = ComponentClipper(model, 0.1, components=spec, process_group=model.process_group)
    theirs = ComponentClipper(whole, 0.1, components=spec, backend="reference")
    assert set(ours.names) == set(theirs.names)
    for m in (whole, model):
        m(torch.arange(7)[None]).square().sum().backward()
    torch.testing.assert_close(*by_name(ours.clip_(), theirs.clip_()), rtol=1e-9, atol=0.0)
    with pytest.raises(ValueError, match="'layers.0.up.weight' lies flat .* can be cut along dim 0 only"):
        ComponentClipper(model, 0.1, components=ComponentSpec().unitwise("*.up.weight", dim=1))


@on_ranks(2)
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_flattened_parameters_without_their_module_or_group_are_refused(use_orig_params):
    parameters = list(wrapped(Model(), use_orig_params=use_orig_params).parameters())
    with pytest.raises(
        ValueError, match=r"FullyShardedDataParallel keeps a part .* process_group=model.process_group"
    ):
        ComponentClipper(parameters, 0.1)
    with pytest.raises(ValueError, match="process_group=model.process_group"):
        component_norms(parameters)
    with pytest.raises(ValueError, match=r"keeps a part of '0' .* clip at the step instead"):
        clip_in_backward(parameters, 0.1)


@on_ranks(2)
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_flattened_parameters_that_are_whole_here_are_refused(use_orig_params):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch advises as we do
        model = wrapped(Model(), use_orig_params=use_orig_params, sharding_strategy=ShardingStrategy.NO_SHARD)
    with pytest.raises(ValueError, match=r"is whole here.* summon_full_params\(\) first; .* pass the module"):
        ComponentClipper(model.named_parameters(), 0.1, process_group=model.process_group)


@on_ranks(2)
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_what_a_flattened_model_ignores_is_not_added_up(use_orig_params):
    model = Model()
    model = wrapped(model, use_orig_params=use_orig_params, ignored_modules=[model.head])
    own = [(n, p) for n, p in model.named_parameters() if "head" not in n]
    with pytest.raises(
        ValueError, match=r"'head.weight' isn't sharded by Fully.* clip what it ignores in a call of its own"
    ):
        ComponentClipper(model, 0.1, process_group=model.process_group)
    ComponentClipper(own, 0.1, process_group=model.process_group).clip_()


@on_ranks(2)
def test_parts_whose_place_is_unknown_are_not_cut():
    parameters = [("w", plain(random_grad((4, 3))))]
    with pytest.raises(ValueError, match=r"components: 'w' can't be cut: where this rank's part \(process_group\)"):
        ComponentClipper(parameters, 0.1, components=ComponentSpec().unitwise("w"), process_group=dist.group.WORLD)


@on_ranks(4)
def test_hybrid_sharding_of_flat_parameters():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    options = {"sharding_strategy": ShardingStrategy.HYBRID_SHARD, "device_mesh": mesh}
    whole, model = pair(lambda m: wrapped(m, use_orig_params=True, **options))
    ours = ComponentClipper(model, 0.1, process_group=model.process_group)
    for m in (whole, model):
        m(torch.arange(7)[None]).square().sum().backward()
    assert_norms(ours.clip_().norms, ComponentClipper(whole, 0.1).clip_().norms, torch.float32)


@on_ranks(2, 4)
def test_partitions_of_plain_tensors():
    """As ZeRO has them: uneven, empty on the last rank, none here and there."""
    rank, size = dist.get_rank(), dist.get_world_size()
    wholes = {"a": random_grad((11,)), "b": random_grad((3,)), "c": random_grad((40,)), "unused": None}
    parts = []
    for name, whole in wholes.items():
        part = None if whole is None else whole.tensor_split(size - 1)[rank] if rank < size - 1 else whole[:0]
        parts.append((name, parameter(None if part is None else part.clone(), (2,))))
    clipper = ComponentClipper(parts, 0.5, process_group=dist.group.WORLD)
    with counted() as counts:
        norms = clipper.clip_().norms
    assert counts == {"allreduce_": 1}
    expected = [0.0 if w is None else w.double().norm().item() for w in wholes.values()]
    torch.testing.assert_close(norms.tolist(), expected, rtol=1e-6, atol=0.0)
    for (_, p), whole in zip(parts[:3], list(wholes.values())[:3], strict=True):
        part = whole.tensor_split(size - 1)[rank] if rank < size - 1 else whole[:0]
        torch.testing.assert_close(p.grad, part * min(1.0, 0.5 / (whole.norm().item() + 1e-6)), rtol=1e-5, atol=0.0)
    caps = ComponentClipper(parts, thresholds.FromGlobal(1.0, "numel"), process_group=dist.group.WORLD).clip_().caps
    torch.testing.assert_close(caps[:3] ** 2, torch.tensor([11, 3, 40]) / (54.0 + 2 * size), check_dtype=False)


@on_ranks(2, 4)
def test_data_parallel():
    check(lambda model: nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True), "parameter", 0)


@on_ranks(2)
def test_data_parallel_issues_no_collective_and_keeps_its_buckets():
    model = Model()
    parallel = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    clipper = ComponentClipper(parallel, 0.1)
    parallel(torch.arange(7)[None]).square().sum().backward()
    places = [p.grad.data_ptr() for p in model.parameters()]
    expected = [(n, plain(p.grad)) for n, p in parallel.named_parameters()]
    with counted() as counts:
        norms = clipper.clip_().norms
        component_norms(parallel)
    assert counts == {}
    for attempt in (
        lambda: ComponentClipper(parallel, 0.1, process_group=dist.group.WORLD),
        lambda: component_norms(parallel, process_group=dist.group.WORLD),
    ):
        with pytest.raises(
            ValueError, match="each rank has all gradients of a DistributedDataParallel.* leave it out"
        ):
            attempt()
    assert places == [p.grad.data_ptr() for p in model.parameters()]
    assert_norms(norms, fused_component_clip_(expected, 0.1, backend="reference"), torch.float32)
    assert_same(list(parallel.named_parameters()), expected, torch.float32)


class Expert(nn.Module):
    def __init__(self, experts, width):
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.up = nn.Parameter(torch.randn(experts, width, width) / 4)


@on_ranks(4)
@pytest.mark.parametrize("components", ["parameter", "all", "experts"])
def test_experts_on_a_mesh_of_their_own(components):
    """Dense parameters over all ranks, experts over two dimensions or one, plain tensors beside them: one call."""
    dense = init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))
    experts = init_device_mesh("cpu", (2, 2), mesh_dim_names=("efsdp", "ep"))
    wholes = [random_grad(s) for s in ((9, 6), (8, 3, 5), (8, 5, 3), (6,), (4, 4))]
    names = ["dense.weight", "experts.up", "experts.down", "norm.weight", "plain"]
    ours, theirs = both_ways(wholes, dense, [[Shard(0)], None, None, [Shard(0)], None], names)
    ours[1] = names[1], sharded(wholes[1], experts, [Shard(0), Shard(0)])  # expert by expert
    ours[2] = names[2], sharded(wholes[2], experts["ep"], [Shard(0)])  # replicated over efsdp
    spec = ComponentSpec("parameter").split("experts.*", sizes=1) if components == "experts" else components
    clipper = ComponentClipper(ours, 0.5, components=spec)
    optimizers = [
        torch.optim.SGD([p for _, p in both], lr=0.3, momentum=0.9, foreach=False) for both in (ours, theirs)
    ]
    for _ in range(5):
        with counted() as counts:
            norms = clipper.clip_().norms
        # All four ranks hold dense and experts.up between them, two hold experts.down.
        assert counts == {"allreduce_": 2}
        assert_norms(norms, fused_component_clip_(theirs, 0.5, components=spec, backend="reference"), torch.float32)
        assert_same(ours, theirs, torch.float32)
        for optimizer in optimizers:
            optimizer.step()
        for (_, a), (_, b) in zip(ours, theirs, strict=True):
            b.grad = random_grad(b.shape)
            a.grad = sharded(b.grad.clone(), a.device_mesh, a.placements).grad if is_dtensor(a) else b.grad.clone()
    for (_, a), (_, b) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(full(a.detach()), b.detach(), rtol=1e-5, atol=1e-6)


@on_ranks(4)
@pytest.mark.parametrize("components", ["parameter", "type", "all"])
def test_pipeline_stages(components):
    """Two stages, each sharded over two ranks; only what spans stages is sent between them."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stage = mesh["pp"].get_local_rank()
    whole, model = Model(), Model()
    model.load_state_dict(whole.state_dict())
    for m in (whole, model):
        m(torch.arange(7)[None]).square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    own = [n for n in grads if (n.startswith(("embedding", "layers.0"))) == (stage == 0)]
    parameters = [(n, sharded(grads[n], mesh["dp"], [Shard(0)])) for n in own]
    clipper = ComponentClipper(parameters, 0.1, components=components, pp_mesh=mesh["pp"])
    with counted() as counts:
        result = clipper.clip_()
    assert counts == {"allreduce_": 1 if components == "parameter" else 2}
    theirs = ComponentClipper(whole, 0.1, components=components, backend="reference")
    expected = theirs.clip_()
    by_name = dict(zip(expected.names, expected.norms, strict=True))
    assert_norms(result.norms, torch.stack([by_name[n] for n in result.names]), torch.float32)
    assert_same(parameters, [(n, p) for n, p in whole.named_parameters() if n in own], torch.float32)
    total = clipper.total_norm(result.norms)
    torch.testing.assert_close(total, expected.norms.norm(), rtol=1e-6, atol=0.0)


@on_ranks(2)
def test_patterns_may_be_about_another_stage():
    """One mapping and one spec for all stages; what matches nothing anywhere is an error on all."""
    name = "head.weight" if dist.get_rank() == 1 else "embedding.weight"
    parameters = [(name, plain(torch.ones(4, 2)))]
    spec = ComponentSpec().split("head.*", sizes=2)
    caps = {"head*": 0.5, "*": 1.0}
    result = ComponentClipper(parameters, caps, components=spec, pp_mesh=dist.group.WORLD).clip_()
    assert result.caps.tolist() == ([0.5, 0.5] if dist.get_rank() == 1 else [1.0])
    with pytest.raises(ValueError, match=r"split\('tail.\*'\) matches none of the 2 parameters"):
        ComponentClipper(parameters, 1.0, components=spec.split("tail.*", sizes=2), pp_mesh=dist.group.WORLD)
    with pytest.raises(ValueError, match="the pattern 'tail' matches none of the 3 components"):
        ComponentClipper(parameters, {"tail": 1.0}, components=spec, pp_mesh=dist.group.WORLD)


@on_ranks(4)
def test_several_dimensions_where_no_group_can_be_made():
    """As with NCCL bound to a device: one dimension after the other, to the same sums."""
    mesh = init_device_mesh("cpu", (2, 2))
    whole = random_grad((8, 6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "_existing", lambda *_: None)
        patch.setattr(groups, "_may_make_groups", lambda: False)
        clipper = ComponentClipper([("w", sharded(whole, mesh, [Shard(0), Shard(1)]))], 0.5, error_if_nonfinite=True)
    with counted() as counts:
        norms = clipper.clip_().norms
    assert counts == {"allreduce_": 2}
    torch.testing.assert_close(norms[0], whole.norm(), rtol=1e-6, atol=0.0)


@on_ranks(2)
def test_stages_that_number_their_parameters_alike():
    """As ``pipelining`` does: each its own where a component is one parameter; refused where it isn't."""
    grad = random_grad((5,)) * (1 + dist.get_rank())
    parameters = [("0.weight", plain(grad)), ("1.weight", plain(grad))]
    with counted() as counts:
        norms = fused_component_clip_(parameters, 0.1, pp_mesh=dist.group.WORLD)
    assert "allreduce_" not in counts
    torch.testing.assert_close(norms, grad.norm().expand(2), rtol=1e-6, atol=0.0)
    with pytest.raises(
        ValueError, match=r"pp_mesh: ranks 0 and 1 both have a parameter '0.weight' in component 'all'"
    ):
        fused_component_clip_(parameters, 0.1, components="all", pp_mesh=dist.group.WORLD)


@on_ranks(2)
@pytest.mark.parametrize("norm_type", [2.0, 3.0, 0.0, math.inf, -math.inf, -1.0])
def test_a_stage_without_any_parameter_and_totals_of_every_order(norm_type):
    grads = [random_grad((5,)), random_grad((3,))]
    parameters = [("a", plain(grads[0])), ("b", plain(grads[1]))] if dist.get_rank() == 0 else []
    for components in ("parameter", "all"):
        clipper = ComponentClipper(
            parameters, math.inf, norm_type, components=components, nonfinite="error", pp_mesh=dist.group.WORLD
        )
        total = clipper.total_norm(clipper.clip_().norms)
        expected = torch.linalg.vector_norm(torch.cat(grads).double(), norm_type)
        torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=0.0)


@on_ranks(2)
def test_policies_that_look_at_all_components_are_refused_in_a_pipeline():
    parameters = [(f"layers.{dist.get_rank()}.weight", plain(random_grad((5,))))]
    for policy in (thresholds.EMA(), thresholds.FromGlobal(1.0)):
        with pytest.raises(
            ValueError, match="looks at all components together, of which each rank of pp_mesh has others"
        ):
            ComponentClipper(parameters, policy, pp_mesh=dist.group.WORLD)
    ComponentClipper(parameters, thresholds.ZScore(), pp_mesh=dist.group.WORLD).clip_()


@on_ranks(2)
def test_groups_are_checked():
    parameters = [("w", plain(random_grad((5,))))]
    alone = dist.new_group([0])
    two = init_device_mesh("cpu", (1, 2))
    for name in ("process_group", "pp_mesh"):
        with pytest.raises(TypeError, match=f"{name}: expected a ProcessGroup or a DeviceMesh or None, not int"):
            ComponentClipper(parameters, 1.0, **{name: 3})
        with pytest.raises(ValueError, match=f"{name}: expected a mesh of one dimension, not 2"):
            ComponentClipper(parameters, 1.0, **{name: two})
        if dist.get_rank() == 1:
            with pytest.raises(ValueError, match=f"{name}: rank 1 is not in this group"):
                ComponentClipper(parameters, 1.0, **{name: alone})
        else:
            grad = parameters[0][1].grad.clone()
            with counted() as counts:
                fused_component_clip_(parameters, 1e9, **{name: alone})
            assert counts == {}
            assert same_bits(parameters[0][1].grad, grad)


@on_ranks(2)
def test_a_mesh_looked_up_anew_at_every_call_is_the_same_one():
    """``mesh["pp"]`` is another object each time; ranks compare their components once all the same."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("pp", "dp"))
    parameters = [("w", plain(random_grad((5,))))]
    fused_component_clip_(parameters, 1.0, pp_mesh=mesh["pp"])
    with counted() as counts:
        fused_component_clip_(parameters, 1.0, pp_mesh=mesh["pp"])
    assert counts == {}
    component_norms(parameters, process_group=mesh["pp"])
    with counted() as counts:
        component_norms(parameters, process_group=mesh["pp"])
    assert counts == {"allreduce_": 1}


@on_ranks(2)
def test_replicas_of_a_sharded_model_are_not_summed_twice():
    """A process group is for plain tensors: DTensors in the same call know better."""
    mesh = init_device_mesh("cpu", (2,))
    model = Model()
    fully_shard(model, mesh=mesh)
    for p in model.parameters():
        p.grad = p.detach().clone()
    expected = component_norms(model)
    torch.testing.assert_close(component_norms(model, process_group=dist.group.WORLD), expected)


@on_ranks(4)
def test_a_dimension_of_a_mesh_is_recognised_each_time_it_is_asked_for():
    """``mesh["a"]`` is another object each time, and where it was the next one may come to lie."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    part = plain(torch.full((1,), float(10 ** dist.get_rank()), dtype=torch.float64))
    rank = dist.get_rank()
    others = {"a": rank ^ 2, "b": rank ^ 1}
    for step in range(6):
        for name, other in others.items():
            with counted() as counts:
                norm = component_norms([part], norm_type=1.0, process_group=mesh[name])
            assert norm.item() == 10**rank + 10**other, (step, name)
            assert not step or counts == {"allreduce_": 1}, counts
