"""A model and its sharded copy, trained side by side."""

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from collectives import counted
from cwclip_kernels import ComponentClipper
from sharded_tensors import full
from small_transformer import Model


def wrap_fsdp2(model, mesh):
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def wrap_tensor_parallel(model, mesh):
    plan = {"qkv": ColwiseParallel(output_layouts=Replicate()), "up": ColwiseParallel(), "down": RowwiseParallel()}
    for layer in model.layers:
        parallelize_module(layer, mesh, plan)


def pair(shard):
    """The same model twice, the second sharded."""
    plain, sharded = Model(), Model()
    sharded.load_state_dict(plain.state_dict())
    return plain, shard(sharded) or sharded


def same_gradients(plain, sharded):
    for (name, a), b in zip(sharded.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(full(a.grad), b.grad, rtol=1e-8, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


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


def check(shard, components, buckets, **options):
    plain, sharded = pair(shard)
    ours = ComponentClipper(sharded, 0.1, components=components, **options)
    theirs = ComponentClipper(plain, 0.1, components=components, backend="reference")
    steps_agree(plain, sharded, lambda: theirs.clip_().norms, lambda: ours.clip_().norms, buckets)
