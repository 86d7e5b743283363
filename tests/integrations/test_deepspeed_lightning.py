"""Lightning's ``DeepSpeedStrategy``, beside one that is without DeepSpeed; and whose clipping it is."""

import contextlib
import warnings
from copy import deepcopy

import pytest
import torch
import torch.distributed as dist

from cwclip_kernels import fused_component_clip_, thresholds
from helpers import same_bits
from ranks import on_ranks

pytest.importorskip("lightning")
pytest.importorskip("deepspeed")

from lightning.fabric import Fabric
from lightning.fabric.strategies import DeepSpeedStrategy as FabricDeepSpeedStrategy
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy

from cwclip_kernels.integrations.deepspeed import attach
from cwclip_kernels.integrations.fabric import clip_gradients
from cwclip_kernels.integrations.lightning import ComponentClip, configure_gradient_clipping
from deepspeed_trainers import assert_same, launched, one_folder, whole
from lightning_models import THEIRS, Lit, Manual, trainer
from small_transformer import Model, batches

CAP = 0.1
# Also of Lightning: that its own clipping isn't that of the hook.
WARNED = (*THEIRS, "Since DeepSpeed handles gradient clipping internally", "When saving the DeepSpeed Stage 3")


class CpuDeepSpeedStrategy(DeepSpeedStrategy):
    """Lightning's, which wants a GPU."""

    root_device = torch.device("cpu", 0)  # DeepSpeed wants a number

    def setup_environment(self):
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self):
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.3)


def strategy_of(stage, **config):
    """Without DeepSpeed for a stage of None."""
    if stage is None:
        return DDPStrategy(process_group_backend="gloo")
    strategy = CpuDeepSpeedStrategy(stage=stage, process_group_backend="gloo")
    strategy.config.update(config)
    return strategy


@contextlib.contextmanager
def with_lightning():
    with launched():
        for text in WARNED:
            warnings.filterwarnings("ignore", text)
        yield


def fit(lit, strategy, *callbacks, data, ckpt_path=None, **options):
    with with_lightning():
        plugins = [TorchElasticEnvironment()]
        runner = trainer(*callbacks, strategy=strategy, devices=dist.get_world_size(), plugins=plugins, **options)
        runner.fit(lit, data, ckpt_path=ckpt_path)
        return runner


class Scaled(Lit):
    """Lightning (2.6) divides the loss by the accumulated batches, and DeepSpeed does again."""

    scale = 1

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * self.scale


class ByHook(Scaled):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        cap = CAP if gradient_clip_val is None else gradient_clip_val
        self.returned = configure_gradient_clipping(self, optimizer, cap)


def models(stages, kind=Lit, **options):
    first = kind(Model().float(), sgd, **options)
    return {stage: deepcopy(first) for stage in stages}


@pytest.mark.parametrize(
    ("stage", "kind", "accumulate"), [(2, Scaled, 1), (3, Scaled, 2), (2, Manual, 1), (3, ByHook, 2), (2, ByHook, 1)]
)
@on_ranks(2)
def test_a_fit_is_that_without_deepspeed(stage, kind, accumulate):
    data, logged, found = batches(4), {}, {}
    for which, lit in models((stage, None), kind).items():
        lit.scale = 1 if which is None else accumulate
        clip = ComponentClip(CAP, log="components")
        callbacks = [] if kind is ByHook else [clip]
        options = {"accumulate_grad_batches": accumulate, "log_every_n_steps": 2 // accumulate}
        runner = fit(lit, strategy_of(which), *callbacks, data=data, **options)
        logged[which] = runner.logged_metrics
        found[which] = whole(lit)
        if callbacks:
            assert clip.last.clipped.any()
            assert (clip.clipper is None) == (which is not None)
        elif which is not None:
            assert lit.returned is None
    assert_same(found[stage], found[None], rtol=1e-5)
    assert set(logged[stage]) == set(logged[None])
    assert kind is ByHook or "clip_rate/model.head.bias" in logged[stage]
    for name, value in logged[None].items():
        torch.testing.assert_close(logged[stage][name].cpu(), value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("stage", [2, 3])
@on_ranks(2)
def test_a_threshold_goes_on_from_a_checkpoint(stage):
    """It is saved once, as the callback's."""
    folder, data, first = one_folder(), batches(2), Model().float()

    def run(epochs, **options):
        lit, clip = Lit(deepcopy(first), sgd), ComponentClip(thresholds.EMA(warmup_steps=1, warmup_norm=0.5))
        runner = fit(lit, strategy_of(stage), clip, data=data, max_epochs=epochs, **options)
        if epochs == 1:
            with with_lightning():
                runner.save_checkpoint(f"{folder}/saved.ckpt")
        return whole(lit), clip.state_dict()["max_norm"]

    ours, learnt = run(2)
    run(1)
    resumed, again = run(2, ckpt_path=f"{folder}/saved.ckpt")
    assert_same(resumed, ours)
    assert again["host"] == learnt["host"] == {"steps": 4}
    assert all(same_bits(again["tensors"][name], learnt["tensors"][name]) for name in learnt["tensors"])


@on_ranks(2)
def test_gradient_clip_val_is_the_cap_or_refused():
    data, found = batches(3), {}
    for which, lit in models(("val", "hook"), ByHook).items():
        options = {"gradient_clip_val": CAP} if which == "val" else {}
        runner = fit(lit, strategy_of(2), data=data, **options)
        assert runner.strategy.deepspeed_engine.gradient_clipping() == 0
        found[which] = whole(lit)
    assert_same(found["val"], found["hook"], rtol=0.0)
    with pytest.raises(RuntimeError, match=r"Trainer\(gradient_clip_val=1.0\): DeepSpeed would clip all"):
        fit(Lit(Model().float()), strategy_of(2), ComponentClip(CAP), data=data, gradient_clip_val=1.0)
    with pytest.raises(RuntimeError, match='engine: its configuration has "gradient_clipping": 0.5'):
        fit(Lit(Model().float()), strategy_of(2, gradient_clipping=0.5), ComponentClip(CAP), data=data)


class Changing(Lit):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.trainer.callbacks[0].max_norm = 0.2


class Attached(Lit):
    def on_fit_start(self):
        attach(self.trainer.strategy.deepspeed_engine, CAP)


@on_ranks(2)
def test_other_caps_and_other_clipping():
    clip, lit = ComponentClip(CAP), Changing(Model().float(), sgd)
    fit(lit, strategy_of(2), clip, data=batches(3))
    assert clip.last.caps == 0.2
    fit(lit, strategy_of(2), clip, data=batches(1))  # another engine
    with pytest.raises(RuntimeError, match="engine: clipping is attached to it already"):
        fit(Attached(Model().float(), sgd), strategy_of(2), ComponentClip(CAP), data=batches(1))


class CpuFabricStrategy(FabricDeepSpeedStrategy):
    """The same of Fabric's."""

    root_device = torch.device("cpu", 0)

    def setup_environment(self):
        super(FabricDeepSpeedStrategy, self).setup_environment()

    def _setup_distributed(self):
        reset_seed()
        self._set_world_ranks()
        self._init_deepspeed_distributed()


@on_ranks(2)
def test_fabric():
    """Its call is refused, and says what to call instead."""
    plain, model, data = Model().float(), Model().float(), batches(2)
    model.load_state_dict(plain.state_dict())
    with with_lightning():
        strategy = CpuFabricStrategy(stage=2, process_group_backend="gloo")
        strategy.config.update(gradient_clipping=0, train_micro_batch_size_per_gpu=2)
        fabric = Fabric(
            accelerator="cpu", devices=dist.get_world_size(), strategy=strategy, plugins=[TorchElasticEnvironment()]
        )
        fabric.launch()
        model, optimizer = fabric.setup(model, sgd(model.parameters()))
        with pytest.raises(RuntimeError, match=r"deepspeed.attach\(fabric.strategy.model, max_norm\)"):
            clip_gradients(fabric, model, optimizer, CAP)
        clipping = attach(fabric.strategy.model, CAP)
        for tokens in data:
            fabric.backward(model(tokens).square().sum())
            optimizer.step()
            optimizer.zero_grad()
        found = whole(model.module)
    optimizer = sgd(plain.parameters())
    for tokens in data:
        plain(tokens).square().sum().backward()
        fused_component_clip_(plain, CAP)
        optimizer.step()
        optimizer.zero_grad()
    assert list(clipping.last.names) == list(found)
    assert clipping.last.clipped.any()
    assert_same(found, dict(plain.named_parameters()), 1e-4)
