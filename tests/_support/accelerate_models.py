"""Accelerate on several ranks: what its launcher sets, and models under FullyShardedDataParallel."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from cwclip_kernels import fused_component_clip_
from ranks import told_by_launcher
from sharded_tensors import full
from small_transformer import Block, Model, batches

pytest.importorskip("accelerate")

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType


@contextlib.contextmanager
def launched():
    """What ``accelerate launch`` tells each rank."""
    with told_by_launcher(OMP_NUM_THREADS="1"):
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


def with_fsdp1(*models):
    """What is asked of an Accelerator that prepared these: a real one has FSDP on accelerators alone."""
    return SimpleNamespace(
        distributed_type=DistributedType.FSDP,
        is_fsdp2=False,
        sync_gradients=True,
        unscale_gradients=lambda: None,
        _models=list(models),
    )


def wrapped(**options):
    policy = ModuleWrapPolicy({Block})
    return FullyShardedDataParallel(
        Model(), auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"), **options
    )


def steps_agree(backward, model, clip):
    """Three optimizer steps beside the same model in one piece, which is returned; each total is that of all."""
    plain = Model()
    with FullyShardedDataParallel.summon_full_params(model):
        plain.load_state_dict(
            {n: full(p.detach()) for n, p in zip(plain.state_dict(), model.parameters(), strict=True)}
        )
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.3) for m in (model, plain)]
    for tokens in batches(3):
        backward(model(tokens).square().sum())
        plain(tokens).square().sum().backward()
        expected = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()])
        fused_component_clip_(plain, 0.1)
        norm = clip(model)
        assert type(norm) is torch.Tensor
        torch.testing.assert_close(norm, expected, rtol=1e-9, atol=0.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    with FullyShardedDataParallel.summon_full_params(model):
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(full(a.detach()), b.detach(), rtol=1e-8, atol=1e-12)
