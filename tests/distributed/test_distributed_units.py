"""FullyShardedDataParallel (FSDP1): what each unit says of its parameters, beside the whole model."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from collectives import counted
from cwclip_kernels import (
    ComponentClipGradScaler,
    ComponentClipper,
    clip_in_backward,
    component_norms,
    fused_component_clip_,
    thresholds,
)
from cwclip_kernels.optim import ComponentClipAdamW
from ranks import on_ranks
from side_by_side import pair
from stepping import assert_stepped_alike

FULL, GRADS, NONE, HYBRID, HYBRID2 = (
    ShardingStrategy.FULL_SHARD,
    ShardingStrategy.SHARD_GRAD_OP,
    ShardingStrategy.NO_SHARD,
    ShardingStrategy.HYBRID_SHARD,
    ShardingStrategy._HYBRID_SHARD_ZERO2,
)


def unit(module, strategy, use_orig_params, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*NO_SHARD.*", FutureWarning)  # torch advises to use DDP
        return FullyShardedDataParallel(
            module,
            sharding_strategy=strategy,
            use_orig_params=use_orig_params,
            device_id=torch.device("cpu"),
            **options,
        )


def all_alike(strategy, **options):
    def shard(model, use_orig_params):
        for i, layer in enumerate(model.layers):
            model.layers[i] = unit(layer, strategy, use_orig_params, **options)
        return unit(model, strategy, use_orig_params, **options)

    return shard


def hybrid(strategy):
    return all_alike(strategy, device_mesh=init_device_mesh("cpu", (2, dist.get_world_size() // 2)))


def mixed(model, use_orig_params):
    """A layer that is whole on each rank, one of gradients alone, a norm by itself, and an embedding in no unit."""
    model.layers[0] = unit(model.layers[0], NONE, use_orig_params)
    model.layers[1] = unit(model.layers[1], GRADS, use_orig_params)
    model.head = unit(model.head, NONE, use_orig_params)
    return unit(model, FULL, use_orig_params, ignored_modules=[model.embedding])


def root_in_no_unit(model, use_orig_params):
    for i, layer in enumerate(model.layers):
        model.layers[i] = unit(layer, FULL, use_orig_params)
    return model


def several_groups(model, use_orig_params):
    """One layer over neighbours, one over all; replicas of the first see the same data here."""
    group, _ = dist.new_subgroups(2)
    model.layers[0] = unit(model.layers[0], FULL, use_orig_params, process_group=group)
    model.layers[1] = unit(model.layers[1], FULL, use_orig_params)
    return model


# What shards, on how many ranks, and the all-reduces of a call.
KINDS = {
    "NO_SHARD": (2, lambda: all_alike(NONE), 0),
    "SHARD_GRAD_OP": (2, lambda: all_alike(GRADS), 1),
    "HYBRID_SHARD": (4, lambda: hybrid(HYBRID), 1),
    "HYBRID_SHARD_ZERO2": (4, lambda: hybrid(HYBRID2), 1),
    "mixed": (2, lambda: mixed, 1),
    "root in no unit": (2, lambda: root_in_no_unit, 1),
    "several groups": (4, lambda: several_groups, 2),
}


def made(kind, use_orig_params):
    return pair(lambda model: KINDS[kind][1]()(model, use_orig_params))


def backward(*models):
    for m in models:
        m(torch.arange(7)[None]).square().sum().backward()


def assert_same_parameters(model, whole):
    with FullyShardedDataParallel.summon_full_params(model):
        for (name, a), b in zip(model.named_parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(
                a.detach(), b.detach(), rtol=1e-8, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
            )


def in_order_of(names, result):
    where = {name: i for i, name in enumerate(result.names)}
    assert where.keys() == set(names)
    return [where[name] for name in names]


CAPS = {
    "number": lambda: 0.1,
    "ParamRelative": lambda: thresholds.ParamRelative(0.02),
    "FromGlobal": lambda: thresholds.FromGlobal(0.3, "numel"),
}


def assert_same_results(ours, theirs, where=""):
    """The same components, in the first one's order: a flat parameter holds what its module owns elsewhere."""
    place = {name: i for i, name in enumerate(theirs.names)}
    assert place.keys() == set(ours.names), where
    order = [place[name] for name in ours.names]
    torch.testing.assert_close(ours.norms, theirs.norms[order], rtol=1e-9, atol=0.0)
    caps = theirs.caps.expand(len(order))[order]
    torch.testing.assert_close(ours.caps.expand(len(order)), caps, check_dtype=False)
    torch.testing.assert_close(ours.coefs, theirs.coefs[order])
    assert theirs.clipped.any(), where


def kinds_of(ranks):
    return [kind for kind, (size, _, _) in KINDS.items() if size == ranks]


@on_ranks(2, 4)
@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize("components", ["parameter", "layer", "all"])
def test_each_strategy(use_orig_params, components):
    """Attached, and by the function, in one call each, without a process group."""
    for kind in kinds_of(dist.get_world_size()):
        whole, model = made(kind, use_orig_params)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.3) for m in (whole, model)]
        ours = ComponentClipper(model, 0.1, components=components).attach(optimizers[1])
        theirs = ComponentClipper(whole, 0.1, components=components, backend="reference")
        backward(whole, model)
        expected = theirs.clip_()
        with counted() as counts:
            optimizers[1].step()
        assert counts == ({"allreduce_": KINDS[kind][2]} if KINDS[kind][2] else {}), kind
        assert_same_results(ours.last, expected, kind)
        ours.remove()
        for step in range(2):
            optimizers[0].step()
            if step:
                optimizers[1].step()
            else:
                for optimizer in optimizers:
                    optimizer.zero_grad()
                backward(whole, model)
                theirs.clip_()
                fused_component_clip_(model, 0.1, components=components)
        assert_same_parameters(model, whole)


@on_ranks(2, 4)
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_thresholds_that_read_parameters_and_their_sizes(use_orig_params):
    for kind in kinds_of(dist.get_world_size()):
        for cap in ("ParamRelative", "FromGlobal"):
            whole, model = made(kind, use_orig_params)
            ours, theirs = (ComponentClipper(m, CAPS[cap]()) for m in (model, whole))
            backward(whole, model)
            assert_same_results(ours.clip_(), theirs.clip_(), f"{kind} {cap}")


@on_ranks(2)
@pytest.mark.parametrize("kind", ["NO_SHARD", "mixed"])
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_in_an_optimizers_step(kind, use_orig_params):
    whole, model = made(kind, use_orig_params)
    ours = ComponentClipAdamW(model.named_parameters(), lr=1e-2, max_norm=0.1, named_parameters=model)
    theirs = ComponentClipAdamW(whole.named_parameters(), lr=1e-2, max_norm=0.1)
    for _ in range(2):
        backward(whole, model)
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
        assert_same_results(ours.last, theirs.last)
    with FullyShardedDataParallel.summon_full_params(model):
        assert_stepped_alike(model.parameters(), whole.parameters(), 40, 1e-2)


@on_ranks(2)
@pytest.mark.parametrize("kind", ["SHARD_GRAD_OP", "mixed"])
def test_parameters_of_no_component_are_stepped(kind):
    whole, model = made(kind, True)
    ours, theirs = (
        ComponentClipAdamW(
            m.named_parameters(),
            lr=1e-2,
            max_norm=0.1,
            components=lambda name, _: name if name.endswith("weight") else None,
            named_parameters=m,
        )
        for m in (model, whole)
    )
    backward(whole, model)
    ours.step()
    theirs.step()
    assert_same_results(ours.last, theirs.last)
    with FullyShardedDataParallel.summon_full_params(model):
        assert_stepped_alike(model.parameters(), whole.parameters(), 20, 1e-2)


@on_ranks(4)
def test_tensor_parallelism_beneath_is_refused():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = nn.Sequential(nn.Linear(4, 6))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel()})
    model = unit(model, FULL, True, device_mesh=mesh["dp"])
    with pytest.raises(ValueError, match="'0.weight' lies in a unit .* tensor-parallel .* fully_shard"):
        ComponentClipper(model, 0.1)


@on_ranks(2)
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_scaled_losses(use_orig_params):
    """One rank's inf, in a parameter of any unit or none, skips the step on all."""
    whole, model = made("mixed", use_orig_params)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.3) for m in (whole, model)]
    clipper = ComponentClipper(model, 0.1)
    scaler = ComponentClipGradScaler(clipper, device="cpu", init_scale=8.0)
    scaler.scale(model(torch.arange(7)[None]).square().sum()).backward()
    backward(whole)
    scaler.step(optimizers[1])
    scaler.update()
    fused_component_clip_(whole, 0.1)
    optimizers[0].step()
    assert_same_parameters(model, whole)
    optimizers[1].zero_grad()
    scaler.scale(model(torch.arange(7)[None]).square().sum()).backward()
    own = next(p for n, p in model.named_parameters() if "embedding" in n)
    if dist.get_rank() == 1:
        own.grad[0, 0] = torch.inf
    scaler.step(optimizers[1])
    scaler.update()
    assert scaler.get_scale() == 4.0
    assert_same_parameters(model, whole)


@on_ranks(2)
def test_torchs_scaler_of_shards():
    whole, model = made("SHARD_GRAD_OP", True)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.3) for m in (whole, model)]
    clipper, scaler = ComponentClipper(model, 0.1), ShardedGradScaler("cpu", init_scale=8.0)
    scaler.scale(model(torch.arange(7)[None]).square().sum()).backward()
    scaler.unscale_(optimizers[1])
    clipper.clip_()
    scaler.step(optimizers[1])
    backward(whole)
    fused_component_clip_(whole, 0.1)
    optimizers[0].step()
    assert_same_parameters(model, whole)


@on_ranks(2)
def test_a_process_group_that_is_given_has_to_be_the_units_own():
    _, model = made("SHARD_GRAD_OP", True)
    ComponentClipper(model, 0.1, process_group=model.process_group)
    alone = dist.new_subgroups(1)[0]
    with pytest.raises(
        ValueError, match=r"process_group: '[\w.]+' is sharded over ranks \[0, 1\], not over \[[01]\]"
    ):
        fused_component_clip_(model, 0.1, process_group=alone)
    _, model = made("NO_SHARD", True)
    with pytest.raises(
        ValueError, match=r"process_group: each rank has all of '[\w.]+', as with .*NO_SHARD.*leave it out"
    ):
        fused_component_clip_(model, 0.1, process_group=dist.group.WORLD)
    _, model = made("mixed", False)
    with pytest.raises(ValueError, match="would count several times in a sum over process_group"):
        ComponentClipper(model, 0.1, process_group=model.process_group)


@on_ranks(2)
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_tensors_alone_do_not_tell(use_orig_params):
    """Views of one dimension are parts, or the same on all ranks: refused where values don't tell either."""
    _, model = made("SHARD_GRAD_OP", use_orig_params)
    parameters, named = list(model.parameters()), list(model.named_parameters())
    with pytest.raises(ValueError, match=r"keeps a part of '0' on each rank; pass the module that it returned"):
        component_norms(parameters)
    with pytest.raises(ValueError, match=r"keeps a part of .* pass the module"):
        ComponentClipAdamW(named, max_norm=0.1)
    backward(model)
    expected = component_norms(model)
    torch.testing.assert_close(component_norms(named, process_group=model.process_group), expected)
    norms = nn.ModuleDict({"a": nn.LayerNorm(8), "b": unit(nn.LayerNorm(8, bias=False), NONE, use_orig_params)})
    norms["a"] = unit(norms["a"], NONE, use_orig_params)
    for name in ("a", "b"):
        with pytest.raises(ValueError, match=r"ranks 0 and 1 hold the same of '0'|is whole here"):
            component_norms(norms[name].parameters(), process_group=dist.group.WORLD)


@on_ranks(2)
def test_parts_that_look_alike_are_no_copies():
    """Nine ones, of which a rank has five and the other four."""
    model = unit(nn.LayerNorm(9, bias=False), FULL, True)
    model(torch.arange(9.0)).square().sum().backward()
    expected = component_norms(model)
    torch.testing.assert_close(component_norms(list(model.parameters()), process_group=dist.group.WORLD), expected)


@on_ranks(2)
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_gradients_that_are_still_accumulated(use_orig_params):
    """Under no_sync each rank has its own, whole."""
    _, model = made("SHARD_GRAD_OP", use_orig_params)
    clipper = ComponentClipper(model, 0.1)
    with model.no_sync():
        backward(model)
    with pytest.raises(ValueError, match=r"not that of this rank's shard .* outside of no_sync\(\)"):
        clipper.clip_()


@on_ranks(2)
def test_what_lies_in_no_unit_that_is_given():
    """A module inside of the one that FSDP returned, whose parameters the outer one shards."""
    _, model = made("SHARD_GRAD_OP", True)
    with pytest.raises(ValueError, match=r"keeps a part of 'embedding.weight' on each rank; pass the module that it"):
        ComponentClipper(model.module, 0.1)
    with (
        FullyShardedDataParallel.summon_full_params(model),
        pytest.raises(ValueError, match=r"summon_full_params\(\)"),
    ):
        ComponentClipper(model, 0.1)
    for kind in ("NO_SHARD", "SHARD_GRAD_OP"):
        with pytest.raises(ValueError, match=r"FullyShardedDataParallel the backward pass sees local gradients"):
            clip_in_backward(made(kind, True)[1], 0.1)
        with pytest.raises(TypeError, match="of sharded parameters can't be pickled or copied"):
            ComponentClipper(made(kind, True)[1], 0.1).__getstate__()
