"""Sharded models against the unsharded one, clipped by the reference: same norms, gradients and parameters."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from collectives import counted
from cwclip_kernels import (
    ComponentClipper,
    clip_gradients,
    clip_gradients_,
    component_clip_with_norms_,
    component_norms,
    fused_component_clip_,
)
from ranks import on_ranks
from sharded_tensors import full
from side_by_side import check, pair, same_gradients, wrap_fsdp2, wrap_tensor_parallel


@on_ranks(2, 4)
@pytest.mark.parametrize("components", ["parameter", "layer", "all"])
def test_fsdp2(components):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    check(lambda model: wrap_fsdp2(model, mesh), components, 1)


@on_ranks(4)
def test_hybrid_sharding_sums_over_shards_only():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    check(lambda model: wrap_fsdp2(model, mesh), "parameter", 1)


@on_ranks(2, 4)
@pytest.mark.parametrize("components", ["parameter", "module"])
def test_tensor_parallel_beside_plain_tensors(components):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    check(lambda model: wrap_tensor_parallel(model, mesh), components, 1)


@on_ranks(4)
@pytest.mark.parametrize("components", ["parameter", "layer"])
def test_fsdp2_over_tensor_parallel(components):
    """Three buckets: sharded both ways, by FSDP alone. Strided shards, uneven ones among them."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))

    def shard(model):
        wrap_tensor_parallel(model, mesh["tp"])
        wrap_fsdp2(model, mesh["dp"])

    check(shard, components, 2)


@on_ranks(2)
def test_norms_and_scaling_apart_send_what_one_call_sends():
    mesh = init_device_mesh("cpu", (2,))
    plain, sharded = pair(lambda model: wrap_fsdp2(model, mesh))
    for model in (plain, sharded):
        (model(torch.arange(8).reshape(2, 4) % 7).square().sum() * 64).backward()
    found, clipper = torch.zeros(()), ComponentClipper(sharded, 1.0, components="layer")
    with counted() as counts:
        norms = clipper.norms(inv_scale=2.0**-6, found_inf=found)
    assert counts == {"allreduce_": 1}
    torch.testing.assert_close(norms, component_norms(plain, components="layer") / 64, rtol=1e-9, atol=0.0)
    caps = norms / 2
    component_clip_with_norms_(sharded, caps, norms, components="layer", inv_scale=2.0**-6)
    with counted() as counts:
        clipper.scale_(torch.arange(1.0, 1.0 + len(clipper.names)))
        clipper.clip_with_norms_(torch.zeros(len(clipper.names)))
    assert counts == {}
    fused_component_clip_(plain, caps, components="layer", inv_scale=2.0**-6)
    ComponentClipper(plain, 1.0, components="layer").scale_(torch.arange(1.0, 1.0 + len(clipper.names)))
    same_gradients(plain, sharded)
    # An inf on one rank is known on both; a second all-reduce says so.
    bad = next(sharded.parameters()).grad.to_local()
    if dist.get_rank() == 1:
        bad.view(-1)[0] = torch.inf
    component_norms(sharded, found_inf=found)
    assert found == 1


@on_ranks(2)
def test_sharded_gradients_without_parameters():
    mesh = init_device_mesh("cpu", (2,))
    plain, sharded = pair(lambda model: wrap_fsdp2(model, mesh))
    for step in range(2):
        for model in (plain, sharded):
            model(torch.arange(8).reshape(2, 4) % 7).square().sum().backward()
        grads = {name: p.grad for name, p in sharded.named_parameters()}
        with counted() as counts:
            new, norms = clip_gradients(grads, 0.1, components="layer")
        assert step == 0 or counts == {"allreduce_": 1}
        torch.testing.assert_close(norms, fused_component_clip_(plain, 0.1, components="layer"), rtol=1e-9, atol=0.0)
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(full(new[name]), parameter.grad, rtol=1e-8, atol=1e-12)
        clip_gradients_(grads, 0.1, components="layer")
        same_gradients(plain, sharded)
        plain.zero_grad()
        sharded.zero_grad()
