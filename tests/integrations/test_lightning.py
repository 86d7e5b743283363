"""In Lightning: the same bits as a plain loop, whoever steps, in whatever precision, on from a checkpoint."""

import itertools
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cwclip_kernels import ComponentClipper, fused_component_clip_, thresholds
from helpers import same_bits

pytest.importorskip("lightning")

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy

from cwclip_kernels.integrations.lightning import ComponentClip, configure_gradient_clipping
from lightning_models import THEIRS, ByHook, Gan, Lit, Manual, plain_steps, same_parameters, sgd, trainer
from small_transformer import Model, batches

MOVED = "The dirpath has changed from"
pytestmark = [pytest.mark.filterwarnings(f"ignore:{text}") for text in (*THEIRS, MOVED)]


class ManualByHook(Manual):
    """Without the callback, where Lightning doesn't ask."""

    def __init__(self, cap, **options):
        super().__init__()
        self.cap, self.options = cap, options

    def on_before_optimizer_step(self, optimizer):
        configure_gradient_clipping(self, optimizer, self.cap, **self.options)


# ------------------------------------------------------------------------------------------------------------
# A plain loop
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("components", [None, "layer", "all"])
@pytest.mark.parametrize("way", ["callback", "hook", "manual", "manual hook"])
def test_a_plain_loop(way, components):
    callbacks = [ComponentClip(0.1, components=components)] if way in ("callback", "manual") else []
    if callbacks:
        lit = Lit() if way == "callback" else Manual()
    else:
        lit = (ByHook if way == "hook" else ManualByHook)(0.1, components=components)
    plain, data = deepcopy(lit.model), batches()
    trainer(*callbacks).fit(lit, data)
    clips = []
    plain_steps(plain, data, lambda m: clips.append(fused_component_clip_(m, 0.1, components=components)))
    assert same_parameters(lit.model, plain)
    if way in ("callback", "hook"):
        last = callbacks[0].last if callbacks else lit.clipped[-1]
        assert same_bits(last.norms, clips[-1])
    if callbacks:
        assert callbacks[0].clipper.names == ComponentClipper(lit, 0.1, components=components).names
        assert callbacks[0].last.clipped.any()


def test_caps_by_name_are_those_of_the_module():
    lit, data = Lit(), batches()
    plain = deepcopy(lit.model)
    trainer(ComponentClip({"model.head.*": 0.05, "*.bias": 0.2})).fit(lit, data)
    plain_steps(plain, data, lambda m: fused_component_clip_(m, {"head.*": 0.05, "*.bias": 0.2}))
    assert same_parameters(lit.model, plain)


@pytest.mark.parametrize("way", ["automatic", "manual"])
def test_accumulated_gradients_are_clipped_once_and_whole(way):
    clip, data = ComponentClip(0.1), batches(5 if way == "automatic" else 6)
    lit = Lit() if way == "automatic" else Manual(every=2)
    plain, calls = deepcopy(lit.model), []
    # The last of five is stepped alone; Lightning divides its loss, too.
    trainer(clip, accumulate_grad_batches=2 if way == "automatic" else 1).fit(lit, data)

    def clip_plain(model):
        calls.append(fused_component_clip_(model, 0.1))

    plain_steps(plain, data, clip_plain, every=2)
    assert len(calls) == 3
    assert same_parameters(lit.model, plain)
    assert same_bits(clip.last.norms, calls[-1])


@pytest.mark.parametrize("cap", [0.02, "patterns"])
def test_several_optimizers_clip_what_each_owns(cap):
    gan, data = Gan(), torch.randn(6, 2, 3).double()
    plain = deepcopy(gan)
    results = []
    clip = ComponentClip(policy(cap), on_clip=results.append)
    trainer(clip).fit(gan, data)
    clipper = ComponentClipper(plain, policy(cap))
    optimizers = plain.configure_optimizers()
    parts = [clipper.part(p for g in o.param_groups for p in g["params"]) for o in optimizers]
    for i, batch in enumerate(data):
        for which, loss in itertools.islice(plain.losses(batch), 1 + i % 2):
            mine = {id(p) for g in optimizers[which].param_groups for p in g["params"]}
            for p in plain.parameters():
                p.requires_grad_(id(p) in mine)
            loss().backward()
            parts[which].clip_()
            optimizers[which].step()
            optimizers[which].zero_grad()
    assert same_parameters(gan, plain)
    assert clip.last.names[0] == "generator.0.weight"
    assert clip.last.norms.count_nonzero() == 4
    assert [result.norms.count_nonzero() for result in results] == 9 * [4]
    assert results[-1] is clip.last


def policy(cap):
    return {"*.bias": 0.1, "*": thresholds.EMA(warmup_steps=2, warmup_norm=0.05)} if cap == "patterns" else cap


# ------------------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------------------


class Resumable(list):
    """A loader that goes on within an epoch."""

    at = 0

    def __iter__(self):
        while self.at < len(self):
            self.at += 1
            yield self[self.at - 1]
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


@pytest.mark.parametrize("steps", [3, 5])
def test_goes_on_from_a_checkpoint_to_the_same_bits(steps, tmp_path):
    """Saved in the warm-up of the threshold or after it, within an epoch or between two."""
    first = Model()
    data = batches(5)

    def run(max_steps, folder, **options):
        lit, clip = Lit(deepcopy(first)), ComponentClip(thresholds.EMA(warmup_steps=4, warmup_norm=0.5))
        saver = ModelCheckpoint(tmp_path / folder, filename="last", every_n_train_steps=1, save_top_k=1)
        trainer(clip, saver, max_steps=max_steps, max_epochs=-1, enable_checkpointing=True).fit(
            lit, Resumable(data), **options
        )
        return lit, clip

    whole, their_clip = run(10, "whole")
    run(steps, "first")
    resumed, our_clip = run(10, "second", ckpt_path=tmp_path / "first" / "last.ckpt")
    assert same_parameters(resumed, whole)
    ours, theirs = our_clip.state_dict()["max_norm"], their_clip.state_dict()["max_norm"]
    assert ours["host"] == theirs["host"] == {"steps": 10}
    assert len(ours["tensors"]) > 1
    assert all(same_bits(ours["tensors"][name], theirs["tensors"][name]) for name in theirs["tensors"])


def test_state_is_only_what_a_threshold_has_learnt():
    assert ComponentClip(0.1).state_dict() == {}
    clip = ComponentClip(0.1)
    clip.load_state_dict({"max_norm": thresholds.EMA().state_dict()})  # of a run that had another cap
    with pytest.raises(ValueError, match="of a EMA, not of a ZScore"):
        ComponentClip(thresholds.ZScore()).load_state_dict({"max_norm": thresholds.EMA().state_dict()})


# ------------------------------------------------------------------------------------------------------------
# Logging
# ------------------------------------------------------------------------------------------------------------


class NoSync(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        assert not any(name in str(operator) for name in ("_local_scalar_dense", "nonzero", "equal")), operator
        return operator(*args, **(kwargs or {}))


class Watched(ComponentClip):
    """Neither clipping nor handing over to ``self.log`` reads a value."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.logged = []

    def on_before_optimizer_step(self, *arguments):
        with NoSync():
            super().on_before_optimizer_step(*arguments)

    def on_train_batch_end(self, trainer, *arguments):
        with NoSync():
            super().on_train_batch_end(trainer, *arguments)
        self.logged.append(dict(trainer.callback_metrics))


def slow(parameters):
    return torch.optim.SGD(parameters, lr=1e-9)  # so that all gradients stay


def now_and_then(step):
    return 1e-6 if step % 2 else 1e6


@pytest.mark.parametrize("log", [True, "components"])
@pytest.mark.parametrize("every", [1, 2])
def test_norms_and_clip_rate_are_logged_when_due(log, every):
    lit, data = Lit(optimizer=slow), batches(8)
    plain, results = deepcopy(lit.model), []
    clip = Watched(thresholds.Schedule(now_and_then), log=log)
    fit = trainer(clip, log_every_n_steps=2, accumulate_grad_batches=every)
    fit.fit(lit, data)
    clipper = ComponentClipper(plain, thresholds.Schedule(now_and_then))
    plain_steps(plain, data, lambda m: results.append(clipper.clip_()), every, slow(plain.parameters()))
    logged = fit.logged_metrics
    last = results[-2:]
    torch.testing.assert_close(
        logged["grad_2.0_norm_total"].double(), clipper.total_norm(last[1].norms), rtol=1e-6, atol=0
    )
    rates = torch.stack([r.clipped.float() for r in last]).mean(0)
    assert rates.mean() == 0.5
    torch.testing.assert_close(logged["clip_rate"], rates.mean())
    assert len(logged) == (2 if log is True else 2 + 2 * len(clipper.names))
    if log == "components":
        for name, norm, rate in zip(clipper.names, last[1].norms, rates, strict=True):
            torch.testing.assert_close(logged[f"grad_2.0_norm/model.{name}"].double(), norm, rtol=1e-6, atol=0)
            torch.testing.assert_close(logged[f"clip_rate/model.{name}"], rate)
    assert [bool(values) for values in clip.logged][: 2 * every - 1] == [False] * (2 * every - 1)


def test_nothing_is_logged_unasked():
    fit = trainer(ComponentClip(0.3), log_every_n_steps=1)
    fit.fit(Lit(), batches())
    assert fit.logged_metrics == {}


# ------------------------------------------------------------------------------------------------------------
# Who else clips, and what can't be clipped
# ------------------------------------------------------------------------------------------------------------


def test_lightnings_own_clipping_is_named_once():
    clip, lit = ComponentClip(0.1), Lit()
    with pytest.warns(UserWarning, match=r"Trainer\(gradient_clip_val=1.0\) clips as well"):
        trainer(clip, gradient_clip_val=1.0).fit(lit, batches())
    trainer(clip, gradient_clip_val=1.0).fit(lit, batches())
    with pytest.warns(UserWarning, match="gradient_clip_val=0.5, gradient_clip_algorithm='value'"):
        trainer(ComponentClip(0.1), gradient_clip_val=0.5, gradient_clip_algorithm="value").fit(lit, batches())
    trainer(ComponentClip(0.1), gradient_clip_val=0).fit(lit, batches())  # which is off


def test_gradient_clip_val_as_the_cap():
    lit, data = ByHook(None), batches()
    plain = deepcopy(lit.model)
    trainer(gradient_clip_val=0.1).fit(lit, data)
    plain_steps(plain, data, lambda m: fused_component_clip_(m, 0.1))
    assert same_parameters(lit.model, plain)
    with pytest.warns(UserWarning, match=r"Trainer\(gradient_clip_val=1.0\) has no effect where") as caught:
        trainer(gradient_clip_val=1.0).fit(ByHook(0.1), data)
    assert len([w for w in caught if "gradient_clip_val" in str(w.message)]) == 1


def strategy_named(name):
    return type(name, (SingleDeviceStrategy,), {})(device="cpu")


@pytest.mark.parametrize("name", ["XLAFSDPStrategy", "XLAStrategy"])
def test_who_clips_for_himself_is_named(name):
    with pytest.raises(RuntimeError, match=r"Trainer\(strategy=...\): XLA"):
        trainer(ComponentClip(0.1), strategy=strategy_named(name)).fit(Lit(), batches())


class AroundLightning(Manual):
    def optimizers(self, use_pl_optimizer=False):
        return super().optimizers(use_pl_optimizer)


def test_what_would_go_unclipped_is_named():
    with pytest.warns(UserWarning, match=r"hasn't seen a single optimizer step.*use_pl_optimizer=False"):
        trainer(ComponentClip(0.1)).fit(AroundLightning(), batches())
    stray = nn.Parameter(torch.ones(3, 2))
    lit = Lit(optimizer=lambda parameters: sgd([*parameters, stray]))
    with pytest.raises(ValueError, match=r"SGD owns a parameter of shape \[3, 2\] that the module doesn't have"):
        trainer(ComponentClip(0.1)).fit(lit, batches())


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="log: expected a bool or 'components', not 'all'"):
        ComponentClip(0.1, log="all")
    with pytest.raises(ValueError, match="nonfinite: expected one of"):
        ComponentClip(0.1, nonfinite="ignore")
    with pytest.raises(TypeError, match="unexpected keyword argument 'pp_mesh'; the options are components, eps"):
        ComponentClip(0.1, pp_mesh=None)
    with pytest.raises(TypeError, match="max_norm: expected a number"):
        trainer(ComponentClip("low")).fit(Lit(), batches())
    with pytest.raises(RuntimeError, match="not attached to a `Trainer`"):
        configure_gradient_clipping(Lit(), sgd([nn.Parameter(torch.ones(1))]), 0.1)


class Changing(Lit):
    caps = (0.1, 0.1, {"*.bias": 0.2}, 0.3)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        configure_gradient_clipping(self, optimizer, self.caps[self.global_step])


def test_changed_arguments_of_the_hook_count():
    lit, data = Changing(), batches()
    plain, caps = deepcopy(lit.model), iter(Changing.caps)
    trainer().fit(lit, data)
    plain_steps(plain, data, lambda m: fused_component_clip_(m, next(caps)))
    assert same_parameters(lit.model, plain)


# ------------------------------------------------------------------------------------------------------------
# Imports
# ------------------------------------------------------------------------------------------------------------


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_either_name_of_lightning():
    done = run("""
import sys, warnings
import pytorch_lightning as pl, torch
from cwclip_kernels.integrations.lightning import ComponentClip
assert issubclass(ComponentClip, pl.Callback) and "lightning.pytorch" not in sys.modules
class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(2, 1)
    def training_step(self, batch, batch_idx):
        return self.head(batch).sum()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
clip = ComponentClip(0.05)
off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[clip], **off).fit(Model(), torch.tensor([[3.0, 4.0]]))
print(clip.last.norms.tolist())
""")
    assert done.stdout.strip() == "[5.0, 1.0]", done.stderr


def test_without_lightning():
    done = run("""
import sys
sys.modules["lightning"] = sys.modules["pytorch_lightning"] = None
import cwclip_kernels.integrations.lightning
""")
    assert 'pip install "cwclip_kernels[lightning]"' in done.stderr
