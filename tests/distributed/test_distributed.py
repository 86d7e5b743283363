"""Sharded models against the unsharded one, clipped by the reference: same norms, gradients and parameters."""

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ranks import on_ranks
from side_by_side import check, wrap_fsdp2, wrap_tensor_parallel


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
