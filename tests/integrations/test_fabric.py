"""``fabric.clip_gradients`` by component: one process, beside a plain loop; then strategies of several."""

import contextlib
import warnings
from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from cwclip_kernels import ComponentClipper, fused_component_clip_, thresholds
from cwclip_kernels.components.naming import without_wrappers
from cwclip_kernels.optim import ComponentClipAdamW
from helpers import same_bits
from ranks import on_ranks, told_by_launcher
from sharded_tensors import full
from small_transformer import Block, Model, batches

pytest.importorskip("lightning")

from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.fabric.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from cwclip_kernels.integrations.fabric import FabricClipping, apply, clip_gradients

THEIRS = r".*isinstance\(treespec, LeafSpec\)"
pytestmark = pytest.mark.filterwarnings(f"ignore:{THEIRS}")


def made(precision="32-true", scale=2.0**10, **options):
    plugins = {}
    if precision == "16-mixed":  # Fabric's own scaler is for GPUs
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
        plugins, precision = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}, None
    return Fabric(accelerator="cpu", devices=1, **plugins, **options, precision=precision)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.3, momentum=0.9)


def fused(parameters):
    return torch.optim.AdamW(parameters, lr=0.01, fused=True)


def plain_steps(plain, optimizer, data, precision, scale=2.0**10):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2, enabled=precision == "16-mixed")
    dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float16
    for tokens in data:
        with torch.autocast("cpu", dtype, enabled=precision != "32-true"):
            loss = plain(tokens).square().sum()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norms = fused_component_clip_(plain, 0.05)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return norms


# With a scale at which the first steps overflow.
@pytest.mark.parametrize(
    ("precision", "kind", "scale"),
    [
        ("32-true", sgd, 1.0),
        ("bf16-mixed", sgd, 1.0),
        ("16-mixed", sgd, 2.0**10),
        ("16-mixed", sgd, 2.0**18),
        ("16-mixed", fused, 2.0**18),
    ],
)
@pytest.mark.parametrize("way", ["function", "apply"])
def test_a_loop(way, precision, kind, scale):
    fabric, model, data, seen = made(precision, scale), Model().float(), batches(8), []
    plain = deepcopy(model)
    names = [name for name, _ in model.named_parameters()]
    model, optimizer = fabric.setup(model, kind(model.parameters()))
    handle = apply(fabric, on_clip=seen.append) if way == "apply" else None
    for tokens in data:
        fabric.backward(model(tokens).square().sum())
        if way == "apply":
            total = fabric.clip_gradients(model, optimizer, max_norm=0.05)
        else:
            total = clip_gradients(fabric, model, optimizer, 0.05, on_clip=seen.append)
        optimizer.step()
        optimizer.zero_grad()
    norms = plain_steps(plain, kind(plain.parameters()), data, precision, scale)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert same_bits(a.detach(), b.detach())
    assert len(seen) == 8
    assert list(seen[-1].names) == names
    assert seen[-1].clipped.any()
    assert same_bits(seen[-1].norms, norms)
    torch.testing.assert_close(total, norms.norm(), equal_nan=True)
    assert handle is None or handle.last is seen[-1]


def one_step(fabric, model, optimizer, factor=1.0):
    fabric.backward(model(torch.arange(7)[None]).square().sum() * factor)


def test_only_what_the_optimizer_owns():
    fabric, model = made(), Model()
    heads, rest = sgd(model.head.parameters()), sgd([*model.embedding.parameters(), *model.layers.parameters()])
    model, heads, rest = fabric.setup(model, heads, rest)
    one_step(fabric, model, heads)
    before = {name: p.grad.clone() for name, p in model.module.named_parameters()}
    seen = []
    total = clip_gradients(fabric, model, heads, 1e-3, on_clip=seen.append)
    torch.testing.assert_close(total, torch.stack([before[f"head.{n}"].norm() for n in ("weight", "bias")]).norm())
    for name, p in model.module.named_parameters():
        assert same_bits(p.grad, before[name]) != name.startswith("head.")
    clip_gradients(fabric, model, rest, 1e-3, on_clip=seen.append)
    assert all(p.grad.norm() <= 1e-3 for p in model.parameters())
    assert seen[0].names == seen[1].names


def test_options_and_what_is_left_to_fabric():
    fabric, model = made(), Model()
    model, optimizer = fabric.setup(model, sgd(model.parameters()))
    with apply(fabric, components="layer") as handle:
        assert isinstance(handle, FabricClipping)
        one_step(fabric, model, optimizer)
        fabric.clip_gradients(model, optimizer, max_norm=0.1)
        assert handle.last.names == ("embedding", "layers.0", "layers.1", "head")
        fabric.clip_gradients(model, optimizer, max_norm=0.1, components="all")
        assert len(handle.last.names) == 1
        assert fabric.clip_gradients(model, optimizer, clip_val=1e-5) is None
        assert max(p.grad.abs().max() for p in model.parameters()) <= 1e-5
        with pytest.raises(ValueError, match="either `clip_val` or `max_norm`"):
            fabric.clip_gradients(model, optimizer)
        with pytest.raises(RuntimeError, match=r"apply\(\) was called for it already"):
            apply(fabric)
        with pytest.raises(TypeError, match="'block'|unexpected keyword argument 'component'"):
            fabric.clip_gradients(model, optimizer, max_norm=0.1, component="block")
    assert "clip_gradients" not in vars(fabric)
    with pytest.raises(ValueError, match="nonfinite: expected one of"):
        apply(fabric, nonfinite="ignore")
    fabric.clip_gradients = lambda module, optimizer, max_norm: None
    with pytest.raises(
        RuntimeError, match="isn't made for this Fabric: .* here it takes module, optimizer, max_norm"
    ):
        apply(fabric)


def test_inf_and_nan():
    """An error, as in Fabric; or what ``nonfinite`` says; and a step that a scaler skips teaches nothing."""
    fabric, model = made(), Model()
    model, optimizer = fabric.setup(model, sgd(model.parameters()))
    one_step(fabric, model, optimizer)
    model.head.bias.grad[0] = torch.inf
    grad = model.head.bias.grad.clone()
    with pytest.raises(RuntimeError, match=r"head.bias"):
        clip_gradients(fabric, model, optimizer, 0.1)
    assert same_bits(model.head.bias.grad, grad)
    clip_gradients(fabric, model, optimizer, 0.1, nonfinite="zero")
    assert model.head.bias.grad.count_nonzero() == 0
    clip_gradients(fabric, model, optimizer, 0.1, error_if_nonfinite=False)

    fabric, model, caps = made("16-mixed"), Model().float(), thresholds.EMA()
    model, optimizer = fabric.setup(model, sgd(model.parameters()))
    one_step(fabric, model, optimizer)
    with pytest.raises(ValueError, match="nonfinite: 'error' .* can't be used with a scaled loss"):
        clip_gradients(fabric, model, optimizer, caps, error_if_nonfinite=True)
    clip_gradients(fabric, model, optimizer, caps)
    optimizer.step()
    optimizer.zero_grad()
    before = caps.state_dict()
    one_step(fabric, model, optimizer, torch.inf)
    clip_gradients(fabric, model, optimizer, caps)
    assert caps.state_dict()["host"] == before["host"] == {"steps": 1}


def test_what_a_threshold_learns_is_saved_by_fabric(tmp_path):
    fabric, model, caps = made(), Model(), thresholds.EMA()
    model, optimizer = fabric.setup(model, sgd(model.parameters()))
    one_step(fabric, model, optimizer)
    clip_gradients(fabric, model, optimizer, caps)
    fabric.save(tmp_path / "saved", {"caps": caps})
    other = thresholds.EMA()
    fabric.load(tmp_path / "saved", {"caps": other})
    theirs = caps.state_dict()["tensors"]
    assert all(same_bits(value, theirs[name]) for name, value in other.state_dict()["tensors"].items())


def test_who_else_clips_is_named():
    fabric, model = made(), Model()
    stray = nn.Parameter(torch.ones(3, 2))
    own, strays = ComponentClipAdamW(model.named_parameters(), max_norm=0.1), sgd([*model.parameters(), stray])
    attached = sgd(model.parameters())
    model, own, strays, attached = fabric.setup(model, own, strays, attached)
    one_step(fabric, model, own)
    with pytest.raises(RuntimeError, match="clips in its own step, and clip_gradients would clip"):
        clip_gradients(fabric, model, own, 0.1)
    with pytest.raises(
        ValueError, match=r"a parameter of shape \[3, 2\] that the module doesn't have.*has all of them"
    ):
        clip_gradients(fabric, model, strays, 0.1)
    attachment = ComponentClipper(model, 0.1).attach(attached.optimizer)
    with pytest.raises(RuntimeError, match="a clipper is attached to SGD"):
        clip_gradients(fabric, model, attached, 0.1)
    attached.step()
    assert attachment.last.clipped.any()


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("XLAStrategy", "XLA sums gradients over devices in the optimizer's step"),
        ("XLAFSDPStrategy", "only XLA knows their norms"),
        ("DeepSpeedStrategy", r"integrations.deepspeed.attach\(fabric.strategy.model, max_norm\)"),
    ],
)
def test_strategies_that_clip_elsewhere(strategy, message):
    kind = type(strategy, (SingleDeviceStrategy,), {})
    fabric, model = Fabric(strategy=kind(torch.device("cpu"))), Model()
    model, optimizer = fabric.setup(model, sgd(model.parameters()))
    one_step(fabric, model, optimizer)
    with pytest.raises(RuntimeError, match=message):
        clip_gradients(fabric, model, optimizer, 0.1)


class OnCpu(FullyShardedDataParallel):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **{**options, "device_id": torch.device("cpu")})


class CpuFSDPStrategy(FSDPStrategy):
    """Fabric's, which wants a GPU, with this one argument of torch's FSDP changed."""

    def setup_module(self, module):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.distributed.fsdp, "FullyShardedDataParallel", OnCpu)
            return super().setup_module(module)


def parallelize(model, mesh):
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["data_parallel"])
    return fully_shard(model, mesh=mesh["data_parallel"])


STRATEGIES = {
    "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
    "fsdp": lambda: fsdp(True),
    "fsdp, flat": lambda: fsdp(False),
    "model parallel": lambda: ModelParallelStrategy(parallelize, process_group_backend="gloo"),
}


def fsdp(use_orig_params):
    policy = ModuleWrapPolicy({Block})
    return CpuFSDPStrategy(auto_wrap_policy=policy, use_orig_params=use_orig_params, process_group_backend="gloo")


@contextlib.contextmanager
def launched():
    with told_by_launcher(GROUP_RANK="0"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", THEIRS)
        yield


@on_ranks(2)
@pytest.mark.parametrize("kind", STRATEGIES)
def test_several_processes(kind):
    plain, model, data, seen = Model(), Model(), batches(2), []
    model.load_state_dict(plain.state_dict())
    with launched():
        fabric = Fabric(
            accelerator="cpu",
            devices=dist.get_world_size(),
            strategy=STRATEGIES[kind](),
            plugins=[TorchElasticEnvironment()],
        )
        fabric.launch()
        model = fabric.setup_module(model)
        optimizer = fabric.setup_optimizers(sgd(model.parameters()))
        for tokens in data:
            fabric.backward(model(tokens).square().sum())
            total = clip_gradients(fabric, model, optimizer, 0.05, on_clip=seen.append)
            optimizer.step()
            optimizer.zero_grad()
    norms = plain_steps(plain, sgd(plain.parameters()), data, "32-true")
    expected = {name: norm for (name, _), norm in zip(plain.named_parameters(), norms, strict=True)}
    assert set(seen[-1].names) == set(expected)
    wanted = torch.stack([expected[name] for name in seen[-1].names])
    torch.testing.assert_close(seen[-1].norms, wanted, rtol=2e-4, atol=1e-6, check_dtype=False)
    torch.testing.assert_close(total, norms.norm(), rtol=2e-4, atol=0.0, check_dtype=False)
    with FullyShardedDataParallel.summon_full_params(model):
        found = {without_wrappers(name).removeprefix("module."): p for name, p in model.named_parameters()}
        for name, p in plain.named_parameters():
            torch.testing.assert_close(
                full(found[name].detach()), p.detach(), rtol=2e-4, atol=1e-6, check_dtype=False
            )


def test_caps_in_another_order_are_other_caps():
    """The first pattern that matches counts."""
    fabric, module = made(), nn.Linear(2, 1)
    model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    for caps, expected in (({"weight": 0.5, "*": 1.0}, 0.5), ({"*": 1.0, "weight": 0.5}, 1.0)):
        model.zero_grad()
        fabric.backward(model(torch.tensor([[3.0, 4.0]])).sum())
        clip_gradients(fabric, model, optimizer, caps)
        assert model.weight.grad.norm().item() == pytest.approx(expected, rel=1e-5)
