"""Sharded models against the unsharded one, clipped by the reference: same norms, gradients and parameters."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from collectives import counted
from cwclip_kernels import ComponentClipper
from helpers import assert_norms
from ranks import on_ranks


class Block(nn.Module):
    """Widths that no number of ranks divides, a fused projection, a scalar, a buffer-like frozen parameter."""

    def __init__(self, width=10, hidden=14):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return 2.0 * self.norm(x + self.down(torch.relu(self.up(q * k + v))))


class Model(nn.Module):
    def __init__(self, width=10, hidden=14):
        super().__init__()
        self.embedding = nn.Embedding(7, width)
        self.layers = nn.ModuleList([Block(width, hidden) for _ in range(2)])
        self.head = nn.Linear(width, 3)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return torch.tanh(self.head(x))


def steps_agree(plain, sharded, mesh, clip_plain, clip_sharded, data, reductions):
    """Five optimizer steps of both models, each clipped its way."""
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
        assert_norms(norms, expected, torch.float32)
        same_gradients(plain, sharded)
        for optimizer in optimizers:
            optimizer.zero_grad()
    for a, b in zip(sharded.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(full(a), b.detach(), rtol=1e-4, atol=1e-6)


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def same_gradients(plain, sharded):
    for (name, a), b in zip(sharded.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(full(a.grad), b.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@on_ranks(2, 4)
@pytest.mark.parametrize("components", ["parameter", "layer", "all"])
def test_fsdp2(components):
    plain, sharded = Model(), Model()
    sharded.load_state_dict(plain.state_dict())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in sharded.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    ours = ComponentClipper(sharded, 0.1, components=components)
    theirs = ComponentClipper(plain, 0.1, components=components, backend="reference")
    data = torch.randint(7, (5, 2, 4))
    steps_agree(plain, sharded, mesh, lambda: theirs.clip_().norms, lambda: ours.clip_().norms, data, 1)
