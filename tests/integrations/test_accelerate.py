"""Accelerate's call: a plain loop, accumulation, loss scales, both kinds of FSDP, and what clips for itself."""

import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard

from cwclip_kernels import ComponentClipGradScaler, ComponentClipper, fused_component_clip_, thresholds
from cwclip_kernels.integrations.accelerate import clip_grad_norm_
from helpers import same_bits
from ranks import on_ranks

pytest.importorskip("accelerate")

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from accelerate_models import launched, steps_agree, with_fsdp1, wrapped
from sharded_tensors import full
from small_transformer import Model, batches


@pytest.fixture(autouse=True)
def _fresh_state():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_importing_the_package_leaves_accelerate_alone():
    code = "import sys, cwclip_kernels.integrations.accelerate; print('accelerate' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("components", [None, "layer", "all"])
def test_a_plain_loop(components):
    accelerator = Accelerator(cpu=True)
    model, plain = Model(), Model()
    plain.load_state_dict(model.state_dict())
    theirs = torch.optim.SGD(plain.parameters(), lr=0.3, momentum=0.9)
    model, ours = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9))
    for tokens in batches():
        accelerator.backward(model(tokens).square().sum())
        plain(tokens).square().sum().backward()
        expected = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()])
        fused_component_clip_(plain, 0.1, components=components)
        norm = clip_grad_norm_(accelerator, model, 0.1, components=components)
        assert norm.shape == ()
        torch.testing.assert_close(norm, expected)
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    assert all(map(same_bits, model.state_dict().values(), plain.state_dict().values()))


def test_one_norm_of_all_is_what_accelerate_does():
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(Model())
    accelerator.backward(model(batches()[0]).square().sum())
    before = [p.grad.clone() for p in model.parameters()]
    norm = clip_grad_norm_(accelerator, model.parameters(), 0.1, components="all")
    ours = [p.grad for p in model.parameters()]
    for p, grad in zip(model.parameters(), before, strict=True):
        p.grad = grad
    torch.testing.assert_close(norm, accelerator.clip_grad_norm_(model.parameters(), 0.1))
    torch.testing.assert_close(ours, [p.grad for p in model.parameters()])


def test_eps():
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(Model())
    accelerator.backward(model(batches()[0]).square().sum())
    before = [p.grad.clone() for p in model.parameters()]
    clip_grad_norm_(accelerator, model, 0.1, eps=0.1)
    ours = [p.grad for p in model.parameters()]
    for p, grad in zip(model.parameters(), before, strict=True):
        p.grad = grad
    fused_component_clip_(model, 0.1, eps=0.1)
    assert all(map(same_bits, ours, (p.grad for p in model.parameters())))
    with pytest.raises(TypeError, match="unexpected keyword argument 'pp_mesh'"):
        clip_grad_norm_(accelerator, model, 0.1, pp_mesh=None)


def test_accumulated_gradients_are_clipped_once_and_whole():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, plain = Model(), Model()
    plain.load_state_dict(model.state_dict())
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    for i, tokens in enumerate(batches(4)):
        with accelerator.accumulate(model):
            accelerator.backward(model(tokens).square().sum())
            (plain(tokens).square().sum() / 2).backward()
            assert accelerator.sync_gradients == (i % 2 == 1)
            if accelerator.sync_gradients:
                clip_grad_norm_(accelerator, model.parameters(), 0.1)
                fused_component_clip_(plain, 0.1)
                torch.testing.assert_close([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])
                plain.zero_grad()
            else:
                before = [p.grad.clone() for p in model.parameters()]
                with pytest.raises(RuntimeError, match="if accelerator.sync_gradients"):
                    clip_grad_norm_(accelerator, model.parameters(), 0.1)
                assert all(map(same_bits, before, (p.grad for p in model.parameters())))
            optimizer.step()
            optimizer.zero_grad()


def scaled(accelerator, monkeypatch, scaler):
    """Accelerate has float16 on accelerators alone: its optimizers' scaler is put there by hand."""
    monkeypatch.setattr(accelerator, "scaler", scaler)
    monkeypatch.setattr(accelerator, "native_amp", True)
    monkeypatch.setattr(AcceleratorState, "mixed_precision", "fp16")
    return scaler


def test_a_scaled_loss_is_unscaled_first(monkeypatch):
    accelerator = Accelerator(cpu=True)
    model, plain = Model(), Model()
    plain.load_state_dict(model.state_dict())
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    scaler = scaled(accelerator, monkeypatch, torch.amp.GradScaler("cpu", init_scale=1024.0))
    tokens = batches()[0]
    scaler.scale(model(tokens).square().sum()).backward()
    plain(tokens).square().sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(TypeError, match="max_norm"):
        clip_grad_norm_(accelerator, model.parameters(), "low")
    assert all(map(same_bits, before, (p.grad for p in model.parameters())))
    expected = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()])
    torch.testing.assert_close(clip_grad_norm_(accelerator, model.parameters(), 0.1), expected)
    fused_component_clip_(plain, 0.1)
    torch.testing.assert_close([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])


POLICIES = {
    "Schedule": lambda: thresholds.Schedule(lambda step: 0.5 / (1 + step)),
    "EMA": lambda: thresholds.EMA(warmup_steps=2),
    "ZScore": lambda: thresholds.ZScore(warmup_steps=2, threshold=0.5),
    "Percentile": lambda: thresholds.Percentile(50.0),
}


@pytest.mark.parametrize("skipped", [0, 4])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_skipped_step_teaches_nothing(monkeypatch, policy, skipped):
    """As for a clipper that isn't called where no step is taken; what is returned tells of it."""
    accelerator = Accelerator(cpu=True)
    model, plain = Model(), Model()
    plain.load_state_dict(model.state_dict())
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    model, _ = accelerator.prepare(model, inner)
    other = accelerator.prepare(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))
    scaler = scaled(accelerator, monkeypatch, torch.amp.GradScaler("cpu", init_scale=1024.0))
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    ours, theirs = POLICIES[policy](), POLICIES[policy]()
    for i, tokens in enumerate(batches(6)):
        scaler.scale(model(tokens).square().sum()).backward()
        plain(tokens).square().sum().backward()
        bad = 1 if i == skipped else 0
        if bad:
            model.head.bias.grad.fill_(torch.inf)
        else:
            fused_component_clip_(plain, theirs)
            plain_optimizer.step()
        # An optimizer of something else may well overflow.
        scaler.scale(torch.ones(()))
        other.param_groups[0]["params"][0].grad = torch.full((1,), torch.inf if i == 3 else 1.0)
        assert clip_grad_norm_(accelerator, model, ours).isfinite() == (not bad)
        scaler.step(inner)
        scaler.step(other.optimizer)
        scaler.update(1024.0)
        for o in (inner, plain_optimizer):
            o.zero_grad()
    one, other = ours.state_dict(), theirs.state_dict()
    assert one["host"] == other["host"]
    assert set(one["tensors"]) == set(other["tensors"])
    assert all(same_bits(one["tensors"][name], other["tensors"][name]) for name in other["tensors"])
    assert all(map(same_bits, model.parameters(), plain.parameters()))


def test_an_attached_clipper_is_refused(monkeypatch):
    accelerator = Accelerator(cpu=True)
    model, another = Model(), Model()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, another)]
    handle = ComponentClipper(another, 0.1).attach(optimizers[1])
    model, *_ = accelerator.prepare(model, *optimizers)
    for m in (model, another):
        m(batches()[0]).square().sum().backward()
    clip_grad_norm_(accelerator, model, 0.1)  # that is clipped by nobody else
    before = [p.grad.clone() for p in another.parameters()]
    with pytest.raises(RuntimeError, match=r"optimizer: a clipper is attached to .*call remove\(\)"):
        clip_grad_norm_(accelerator, another, 0.1)
    scaler = ComponentClipGradScaler(ComponentClipper(model, 0.1), "cpu")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="scaler: a ComponentClipGradScaler"):
        clip_grad_norm_(accelerator, another, scaled(accelerator, patch, scaler) and 0.1)
    assert all(map(same_bits, before, (p.grad for p in another.parameters())))
    handle.remove()
    clip_grad_norm_(accelerator, another, 0.1)


def test_deepspeed_without_what_attach_returns():
    accelerator = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, sync_gradients=True)
    with pytest.raises(RuntimeError, match="accelerator: .*attach"):
        clip_grad_norm_(accelerator, Model(), 0.1)


# ------------------------------------------------------------------------------------------------------------
# Several ranks
# ------------------------------------------------------------------------------------------------------------


@on_ranks(2)
@pytest.mark.parametrize("kind", ["DistributedDataParallel", "fully_shard"])
def test_several_processes(kind):
    with launched():
        accelerator = Accelerator(cpu=True)
        assert accelerator.num_processes == 2
        model = Model()
        if kind == "fully_shard":  # which Accelerate does itself on accelerators alone
            mesh = init_device_mesh("cpu", (2,))
            for layer in model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        else:
            model = accelerator.prepare(model)
        assert type(model).__name__ in ("FSDPModel", "DistributedDataParallel")
        steps_agree(accelerator.backward, model, lambda m: clip_grad_norm_(accelerator, m.parameters(), 0.1))


@on_ranks(2)
def test_fsdp1_is_clipped_over_its_own_group():
    model = wrapped()
    accelerator = with_fsdp1(wrapped(), model)
    steps_agree(torch.Tensor.backward, model, lambda m: clip_grad_norm_(accelerator, m.parameters(), 0.1))
    model(batches()[0]).square().sum().backward()
    norm = clip_grad_norm_(with_fsdp1(), model, torch.inf, process_group=model.process_group)
    torch.testing.assert_close(norm, clip_grad_norm_(accelerator, model, torch.inf))


@on_ranks(2)
def test_parameters_may_be_whole_beside_shards_of_fsdp1():
    """A 4-bit base, say, that is frozen; and what learns in no unit, which counts once."""
    model, plain = wrapped(), Model()
    with FullyShardedDataParallel.summon_full_params(model):
        plain.load_state_dict(
            {n: full(p.detach()) for n, p in zip(plain.state_dict(), model.parameters(), strict=True)}
        )
    packed = nn.Parameter(torch.ones(5, dtype=torch.uint8), requires_grad=False)
    base = nn.Parameter(torch.ones(3, dtype=torch.float64), requires_grad=False)
    pairs = [("packed", packed), *model.named_parameters(), ("base", base)]
    tokens = batches()[0]
    for m in (model, plain):
        m(tokens).square().sum().backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()])
    torch.testing.assert_close(clip_grad_norm_(with_fsdp1(model), pairs, 0.1), expected, rtol=1e-9, atol=0.0)
    base.requires_grad_()
    base.grad = torch.full((3,), 2.0, dtype=torch.float64)
    norm = clip_grad_norm_(with_fsdp1(model), pairs, 0.1, components="all")
    assert norm**2 > 12.0
    torch.testing.assert_close(base.grad.norm(), 0.1 * 12.0**0.5 / norm, rtol=1e-4, atol=0.0)


@on_ranks(2)
def test_fsdp1_that_cannot_be_told_is_refused():
    one, other = wrapped(), wrapped()
    both = [*one.parameters(), *other.parameters()]
    with pytest.raises(ValueError, match="keeps a part of '0' on each rank; pass the module that it returned"):
        clip_grad_norm_(with_fsdp1(other), one.parameters(), 0.1)
    for model in (one, other):
        model(torch.arange(7)[None]).square().sum().backward()
    expected = [clip_grad_norm_(with_fsdp1(one, other), model, torch.inf) for model in (one, other)]
    norm = clip_grad_norm_(with_fsdp1(one, other), both, 0.1)
    torch.testing.assert_close(norm, torch.stack(expected).norm(), rtol=1e-9, atol=0.0)


@on_ranks(2)
@pytest.mark.parametrize("strategy", [ShardingStrategy.SHARD_GRAD_OP, ShardingStrategy.NO_SHARD])
def test_other_strategies_of_fsdp1(strategy):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*NO_SHARD.*", FutureWarning)
        model = wrapped(sharding_strategy=strategy)
    steps_agree(lambda loss: loss.backward(), model, lambda m: clip_grad_norm_(with_fsdp1(m), m.parameters(), 0.1))
