"""Parameters with gradients, as DTensors of some placement and as plain tensors."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from helpers import GRAD_TOLERANCE, random_grad


def plain(whole):
    parameter = nn.Parameter(torch.zeros_like(whole))
    parameter.grad = whole.clone()
    return parameter


def sharded(whole, mesh, placements):
    """A parameter and its gradient, distributed alike."""
    parameter = nn.Parameter(distribute_tensor(torch.zeros_like(whole), mesh, placements, src_data_rank=None))
    parameter.grad = distribute_tensor(whole, mesh, placements, src_data_rank=None)
    return parameter


def full(grad):
    return grad.full_tensor() if isinstance(grad, DTensor) else grad


def both_ways(wholes, mesh, placements, names=None):
    names = names or [f"p{i}" for i in range(len(wholes))]
    ours = [
        (n, plain(w) if p is None else sharded(w, mesh, p)) for n, w, p in zip(names, wholes, placements, strict=True)
    ]
    return ours, [(n, plain(w)) for n, w in zip(names, wholes, strict=True)]


def assert_same(ours, theirs, dtype):
    rtol, atol = GRAD_TOLERANCE[dtype]
    for (name, a), (_, b) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            full(a.grad), b.grad, rtol=max(rtol, 1e-6), atol=atol, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


def model_with_gradients(mesh, placements=None):
    wholes = [random_grad((n, 3)) for n in (2, 5, 8)]
    ours, _ = both_ways(wholes, mesh, placements or [[Shard(0)]] * 3, ["a", "b", "c"])
    return ours, wholes
