"""``ComponentClipAdamW`` of sharded parameters equals the same optimizer of the whole model."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from cwclip_kernels import ComponentSpec, thresholds
from cwclip_kernels.optim import ComponentClipAdamW
from helpers import same_bits
from ranks import on_ranks
from stepping import assert_stepped_alike

LR, CAP, STEPS = 1e-2, 0.05, 4


def made():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3))


def sharded(kind):
    model = made()
    if kind == "FSDP1":
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    return fully_shard(model)


def train(model, optimizer, steps=STEPS):
    """The same batch on every rank, so that averaged gradients are everywhere those of one."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        x = torch.randn(4, 6, generator=generator)
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole_of(model):
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            return [p.detach().clone() for p in model.parameters()]
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in model.parameters()]


OPTIONS = {
    "number": {},
    "layer": {"components": "layer"},
    "rows": {"components": ComponentSpec().split("2.weight", (2, 5))},
    "amsgrad": {"amsgrad": True, "maximize": True, "correct_bias": False},
    "error": {"nonfinite": "error"},
    "biases alone": {"components": lambda name, p: None if p.ndim == 1 else name},
}


@pytest.mark.parametrize("name", OPTIONS)
@on_ranks(2)
def test_fully_shard(name):
    options = OPTIONS[name]
    model, plain = sharded("FSDP2"), made()
    optimizers = [ComponentClipAdamW(m.named_parameters(), lr=LR, max_norm=CAP, **options) for m in (model, plain)]
    for m, optimizer in zip((model, plain), optimizers, strict=True):
        train(m, optimizer)
    assert_stepped_alike(whole_of(model), plain.parameters(), 10 * STEPS, LR)
    ours, theirs = (optimizer.last for optimizer in optimizers)
    assert ours.names == theirs.names
    torch.testing.assert_close(ours.norms, theirs.norms, rtol=1e-4, atol=0)


@on_ranks(2)
def test_fsdp_1():
    for components in (None, "layer"):
        model, plain = sharded("FSDP1"), made()
        ours = ComponentClipAdamW(
            model.named_parameters(), lr=LR, max_norm=CAP, components=components, process_group=dist.group.WORLD
        )
        theirs = ComponentClipAdamW(plain.named_parameters(), lr=LR, max_norm=CAP, components=components)
        train(model, ours)
        train(plain, theirs)
        assert_stepped_alike(whole_of(model), plain.parameters(), 10 * STEPS, LR)
        assert ours.last.names == theirs.last.names


@on_ranks(2)
def test_flat_parameters():
    def left_alone(name, p):
        return None if name.endswith("bias") else name

    model = FullyShardedDataParallel(made(), use_orig_params=False, device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="leave out a part of the flat parameter"):
        ComponentClipAdamW(
            model.named_parameters(), max_norm=CAP, components=left_alone, process_group=dist.group.WORLD
        )
    plain = made()
    ours = ComponentClipAdamW(model.named_parameters(), lr=LR, max_norm=CAP, process_group=dist.group.WORLD)
    theirs = ComponentClipAdamW(plain.named_parameters(), lr=LR, max_norm=CAP)
    train(model, ours)
    train(plain, theirs)
    with FullyShardedDataParallel.summon_full_params(model):
        assert_stepped_alike(model.parameters(), plain.parameters(), 40, LR)


@on_ranks(2)
def test_thresholds_and_groups():
    for cap in (lambda: thresholds.EMA(warmup_steps=2, warmup_norm=0.1), thresholds.ParamRelative):
        model, plain = sharded("FSDP2"), made()
        optimizers = []
        for m in (model, plain):
            named = list(m.named_parameters())
            groups = [{"params": named[:4], "max_norm": cap()}, {"params": named[4:], "weight_decay": 0.0}]
            optimizers.append(ComponentClipAdamW(groups, lr=LR, max_norm=CAP))
            train(m, optimizers[-1])
        assert_stepped_alike(whole_of(model), plain.parameters(), 10 * STEPS, LR)


@on_ranks(2)
def test_an_inf_on_one_rank_steps_no_rank():
    model = sharded("FSDP2")
    optimizer = ComponentClipAdamW(model.named_parameters(), lr=LR, max_norm=CAP, nonfinite="error")
    train(model, optimizer, 1)
    before = whole_of(model)
    model(torch.ones(2, 6)).sum().backward()
    if dist.get_rank() == 1:
        next(model.parameters()).grad._local_tensor[0, 0] = math.inf
    with pytest.raises(RuntimeError, match="non-finite for 1 of 6 components: '0.weight'"):
        optimizer.step()
    assert all(map(same_bits, whole_of(model), before))
    assert {state["step"].item() for state in optimizer.state.values()} == {1}


@on_ranks(2)
def test_distributed_checkpoints():
    model, other = sharded("FSDP2"), sharded("FSDP2")
    first = ComponentClipAdamW(model.named_parameters(), lr=LR, max_norm=CAP)
    train(model, first)
    state = get_optimizer_state_dict(model, first)
    second = ComponentClipAdamW(other.named_parameters(), lr=LR, max_norm=CAP)
    set_optimizer_state_dict(other, second, state)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            assert same_bits(first.state[p][name]._local_tensor, second.state[q][name]._local_tensor)
        assert first.state[p]["step"] == second.state[q]["step"] == STEPS


@on_ranks(2)
def test_pipeline_stages():
    """Each rank has other layers; norms of a component that spans both come from both."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("pp",))
    whole = made()
    params = dict(whole.named_parameters())
    for p in params.values():
        p.grad = torch.randn_like(p)
    mine = [(n, p) for n, p in params.items() if (n < "2") == (dist.get_rank() == 0)]
    before = {n: p.detach().clone() for n, p in params.items()}
    ours = ComponentClipAdamW(mine, lr=LR, max_norm=CAP, components="all", pp_mesh=mesh)
    ours.step()
    stepped = {n: p.detach().clone() for n, p in mine}
    with torch.no_grad():
        for n, p in params.items():
            p.copy_(before[n])
    ComponentClipAdamW(params.items(), lr=LR, max_norm=CAP, components="all").step()
    assert_stepped_alike(stepped.values(), [params[n] for n in stepped], 1, LR)
