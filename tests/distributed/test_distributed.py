"""Sharded models against the unsharded one, clipped by the reference: same norms, gradients and parameters."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from collectives import counted
from cwclip_kernels import ComponentClipper
from ranks import on_ranks


class Block(nn.Module):
    """Widths that no number of ranks divides, a fused projection, a scalar, a buffer-like frozen parameter."""

    def __init__(self, width=10, hidden=24):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return 2.0 * self.norm(x + self.down(torch.relu(self.up(q * k + v))))


class Model(nn.Module):
    def __init__(self, width=10, hidden=24):
        super().__init__()
        self.embedding = nn.Embedding(7, width)
        self.layers = nn.ModuleList([Block(width, hidden) for _ in range(2)])
        self.head = nn.Linear(width, 3)
        self.double()  # so that a forward pass in another order of additions is no difference

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return torch.tanh(self.head(x))


def steps_agree(plain, sharded, clip_plain, clip_sharded, reductions):
    """Five optimizer steps of both models, each clipped its way; so many all-reduces a call, and nothing else."""
    data = torch.randint(7, (5, 2, 4))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.3, momentum=0.9) for m in (plain, sharded)]
    for step in range(5):
        tokens = data[step]
        for model, clip, optimizer in ((plain, clip_plain, optimizers[0]), (sharded, clip_sharded, optimizers[1])):
            model(tokens).square().sum().backward()
            with counted() as counts:
                norms = clip()
            if model is sharded:
                assert counts == ({"allreduce_": reductions} if reductions else {}), (step, counts)
            else:
                expected = norms
            optimizer.step()
        torch.testing.assert_close(norms, expected, rtol=1e-9, atol=0.0)
        same_gradients(plain, sharded)
        for optimizer in optimizers:
            optimizer.zero_grad()
    for a, b in zip(sharded.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(full(a), b.detach(), rtol=1e-8, atol=1e-12)


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def same_gradients(plain, sharded):
    for (name, a), b in zip(sharded.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(full(a.grad), b.grad, rtol=1e-8, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def pair(shard):
    """The same model twice, the second sharded."""
    plain, sharded = Model(), Model()
    sharded.load_state_dict(plain.state_dict())
    return plain, shard(sharded) or sharded


def wrap_fsdp2(model, mesh):
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def wrap_tensor_parallel(model, mesh):
    plan = {"qkv": ColwiseParallel(output_layouts=Replicate()), "up": ColwiseParallel(), "down": RowwiseParallel()}
    for layer in model.layers:
        parallelize_module(layer, mesh, plan)


def check(shard, components, buckets, **options):
    plain, sharded = pair(shard)
    ours = ComponentClipper(sharded, 0.1, components=components, **options)
    theirs = ComponentClipper(plain, 0.1, components=components, backend="reference")
    steps_agree(plain, sharded, lambda: theirs.clip_().norms, lambda: ours.clip_().norms, buckets)


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
