"""Lightning's strategies of several processes, on the CPU: DDP, its FSDP, FSDP 2; beside the whole model."""

import contextlib
import tempfile
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from cwclip_kernels import fused_component_clip_, thresholds
from cwclip_kernels.components.naming import without_wrappers
from helpers import same_bits
from ranks import on_ranks, told_by_launcher

pytest.importorskip("lightning")

from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from cwclip_kernels.integrations.lightning import ComponentClip, configure_gradient_clipping
from lightning_models import THEIRS, Lit, sgd, trainer
from sharded_tensors import full
from small_transformer import Block, Model, batches


@contextlib.contextmanager
def launched():
    """What ``torchrun`` tells each rank."""
    with told_by_launcher(GROUP_RANK="0"), warnings.catch_warnings():
        for text in THEIRS:
            warnings.filterwarnings("ignore", text)
        yield


def fit(lit, strategy, *callbacks, data, ckpt_path=None, **options):
    plugins = [TorchElasticEnvironment()]
    runner = trainer(*callbacks, strategy=strategy, devices=dist.get_world_size(), plugins=plugins, **options)
    runner.fit(lit, data, ckpt_path=ckpt_path)
    return runner


def plain_steps(plain, data, clip):
    optimizer = sgd(plain.parameters())
    for tokens in data:
        plain(tokens).square().sum().backward()
        norms = clip(plain)
        optimizer.step()
        optimizer.zero_grad()
    return norms


class OnCpu(FullyShardedDataParallel):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **{**options, "device_id": torch.device("cpu")})


class CpuFSDPStrategy(FSDPStrategy):
    """Lightning's, which wants a GPU, with this one argument of torch's FSDP changed."""

    def _setup_model(self, model):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.distributed.fsdp, "FullyShardedDataParallel", OnCpu)
            return super()._setup_model(model)


def freeze(model):
    for p in (*model.embedding.parameters(), *model.head.parameters()):
        p.requires_grad_(False)


class WrappedByHand(Lit):
    """Blocks are sharded each by itself, which leaves several roots; the rest has no parameters that learn."""

    def configure_model(self):
        freeze(self.model)
        self.model.layers = nn.ModuleList([OnCpu(block, use_orig_params=True) for block in self.model.layers])


class Flat(Lit):
    def configure_optimizers(self):
        return sgd(self.trainer.model.parameters())


class Sharded(Lit):
    """Shards itself, as ``ModelParallelStrategy`` wants it."""

    def configure_model(self):
        for layer in self.model.layers:
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])


class ByHook:
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.last = configure_gradient_clipping(self, optimizer, 0.1)


KINDS = {
    "ddp": (Lit, lambda: DDPStrategy(process_group_backend="gloo")),
    "fsdp": (Lit, lambda: fsdp()),
    "fsdp, flat": (Flat, lambda: fsdp(use_orig_params=False)),
    "fsdp, by hand": (WrappedByHand, lambda: CpuFSDPStrategy(process_group_backend="gloo")),
    "model parallel": (Sharded, lambda: ModelParallelStrategy(process_group_backend="gloo")),
}


def fsdp(**options):
    return CpuFSDPStrategy(auto_wrap_policy=ModuleWrapPolicy({Block}), process_group_backend="gloo", **options)


@on_ranks(2)
@pytest.mark.parametrize("way", ["callback", "hook"])
@pytest.mark.parametrize("kind", KINDS)
def test_several_processes(kind, way):
    base, strategy = KINDS[kind]
    model = Model()
    is_float = kind.startswith("fsdp")  # whatever the model is, Lightning's FSDP makes float32 of it
    model, plain = model.float() if is_float else model, Model().float() if is_float else Model()
    lit, data = (base if way == "callback" else type("WithHook", (ByHook, base), {}))(model), batches()
    plain.load_state_dict(model.state_dict())
    if kind == "fsdp, by hand":
        freeze(plain)
    clip = ComponentClip(0.1, log="components")
    with launched():
        runner = fit(lit, strategy(), *([clip] if way == "callback" else []), data=data, log_every_n_steps=2)
    norms = plain_steps(plain, data, lambda m: fused_component_clip_(m, 0.1))
    norms = {f"model.{name}": norm for (name, _), norm in zip(plain.named_parameters(), norms, strict=True)}
    last = clip.last if way == "callback" else lit.last
    close = {"rtol": 2e-4, "atol": 1e-6} if is_float else {"rtol": 1e-8, "atol": 1e-12}
    assert set(last.names) == set(norms)
    torch.testing.assert_close(last.norms, torch.stack([norms[name] for name in last.names]), **close)
    assert last.clipped.any()
    if way == "callback":
        total = torch.stack(list(norms.values())).square().sum().sqrt()
        torch.testing.assert_close(
            runner.logged_metrics["grad_2.0_norm_total"].float(), total.float(), rtol=2e-4, atol=0.0
        )
    with FullyShardedDataParallel.summon_full_params(runner.strategy.model):
        found = {without_wrappers(name): full(p.detach()) for name, p in lit.model.named_parameters()}
        for name, p in plain.named_parameters():
            torch.testing.assert_close(found[name], p.detach(), **close)


class Thawing(WrappedByHand):
    """Lets learn, half of the way through, what FSDP has left whole."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.model.head.requires_grad_(batch_idx >= 1)


@on_ranks(2)
def test_what_fsdp_leaves_whole_does_not_begin_to_learn_unclipped():
    clip = ComponentClip(1e-3)
    with launched():
        fit(Thawing(Model().float()), CpuFSDPStrategy(process_group_backend="gloo"), clip, data=batches())
    norm, coef = clip.last.as_dict()["model.head.weight"]
    assert norm * coef == pytest.approx(1e-3, rel=1e-2)


@on_ranks(2)
def test_lightnings_own_fsdp_refuses_to_clip_by_norm():
    with launched(), pytest.raises(MisconfigurationException, match="gradient_clip_algorithm='norm'"):
        fit(Lit(Model().float()), fsdp(), data=batches(1), gradient_clip_val=1.0)


@on_ranks(2)
@pytest.mark.parametrize("kind", ["ddp", "model parallel"])
def test_a_threshold_goes_on_from_a_checkpoint(kind):
    """On all ranks alike, also where Lightning loads callbacks after the fit has started."""
    base, strategy = KINDS[kind]
    first, data = Model(), batches()
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)

    def run(steps, **options):
        model = Model()
        model.load_state_dict(first.state_dict())
        lit, clip = base(model), ComponentClip(thresholds.EMA(warmup_steps=2, warmup_norm=0.5))
        with launched():
            runner = fit(lit, strategy(), clip, data=data, max_epochs=steps, **options)
            if steps == 1:
                runner.save_checkpoint(f"{folder[0]}/saved.ckpt")
        return lit, clip.state_dict()["max_norm"]

    whole, theirs = run(2)
    run(1)
    resumed, ours = run(2, ckpt_path=f"{folder[0]}/saved.ckpt")
    assert ours["host"] == theirs["host"] == {"steps": 8}
    assert all(same_bits(ours["tensors"][name], theirs["tensors"][name]) for name in theirs["tensors"])
    for a, b in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert same_bits(full(a.detach()), full(b.detach()))
