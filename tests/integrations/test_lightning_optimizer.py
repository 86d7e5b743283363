"""``ComponentClipAdamW`` as a Lightning module's optimizer: a plain loop, checkpoints, loss scales, other clips."""

from copy import deepcopy

import pytest
import torch

from cwclip_kernels import fused_component_clip_, thresholds
from cwclip_kernels.optim import ComponentClipAdamW
from cwclip_kernels.result import ClipStatistics
from helpers import same_bits

pytest.importorskip("lightning")

from lightning.pytorch.callbacks import ModelCheckpoint

from cwclip_kernels.integrations.lightning import ComponentClip
from lightning_models import (
    THEIRS,
    ByHook,
    Lit,
    Manual,
    adamw,
    half_precision,
    plain_steps,
    same_parameters,
    trainer,
)
from small_transformer import Model, batches

MOVED = "The dirpath has changed from"
pytestmark = [pytest.mark.filterwarnings(f"ignore:{text}") for text in (*THEIRS, MOVED)]
LR, CAP = 0.01, 0.05


def clipping(max_norm=CAP, **options):
    """A module's ``configure_optimizers``, given its parameters."""

    def make(module):
        return ComponentClipAdamW(module.named_parameters(), lr=LR, max_norm=max_norm, **options)

    return make


class OwnClip(Lit):
    """Names come from the module, as in ``ComponentClipAdamW(self.named_parameters(), ...)``."""

    def __init__(self, model=None, optimizer=None, **options):
        super().__init__(model, optimizer or clipping(), **options)
        self.found = []

    def configure_optimizers(self):
        return self._optimizer(self)

    def on_before_zero_grad(self, optimizer):
        if optimizer.last is not None:
            self.found.append(optimizer.last)


class OwnClipByHand(Manual):
    def configure_optimizers(self):
        return clipping()(self)


class BesideHook(ByHook):
    def configure_optimizers(self):
        return clipping()(self)


def close(a, b):
    """In float64; AdamW's update is computed in another order."""
    torch.testing.assert_close(list(a.state_dict().values()), list(b.state_dict().values()), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("components", [None, "layer", "all"])
@pytest.mark.parametrize("every", [1, 2])
def test_a_plain_loop(components, every):
    lit, data = OwnClip(optimizer=clipping(components=components)), batches()
    plain = deepcopy(lit.model)
    fit = trainer(accumulate_grad_batches=every)
    fit.fit(lit, data)
    clips = []
    optimizer = adamw(plain.parameters())
    plain_steps(
        plain, data, lambda m: clips.append(fused_component_clip_(m, CAP, components=components)), every, optimizer
    )
    close(lit.model, plain)
    last = fit.optimizers[0].last
    assert last.clipped.any()
    torch.testing.assert_close(last.norms, clips[-1])
    if components is None:
        assert last.names == tuple(name for name, _ in lit.named_parameters())


def test_manual_optimization():
    lit, other, data = OwnClipByHand(), OwnClip(), batches()
    other.load_state_dict(lit.state_dict())
    for module in (lit, other):
        trainer().fit(module, data)
    assert same_parameters(lit, other)


def test_caps_by_name_are_those_of_the_module():
    lit, data = OwnClip(optimizer=clipping({"model.head.*": 0.01, "*.bias": 0.2})), batches()
    plain = deepcopy(lit.model)
    trainer().fit(lit, data)
    caps = {"head.*": 0.01, "*.bias": 0.2}
    plain_steps(plain, data, lambda m: fused_component_clip_(m, caps), optimizer=adamw(plain.parameters()))
    close(lit.model, plain)


@pytest.mark.parametrize("steps", [3, 5])
def test_goes_on_from_a_checkpoint_to_the_same_bits(steps, tmp_path):
    """Saved in the warm-up of the threshold or after it."""
    first, data = Model(), batches(1)

    def run(max_steps, folder, **options):
        caps = thresholds.EMA(warmup_steps=4, warmup_norm=0.5)
        lit = OwnClip(deepcopy(first), clipping(caps))
        saver = ModelCheckpoint(tmp_path / folder, filename="last", every_n_train_steps=1, save_top_k=1)
        trainer(saver, max_steps=max_steps, max_epochs=-1, enable_checkpointing=True).fit(lit, data, **options)
        return lit, caps.state_dict()

    whole, theirs = run(8, "whole")
    run(steps, "first")
    resumed, ours = run(8, "second", ckpt_path=tmp_path / "first" / "last.ckpt")
    assert same_parameters(resumed, whole)
    assert ours["host"] == theirs["host"] == {"steps": 8}
    assert all(same_bits(ours["tensors"][name], value) for name, value in theirs["tensors"].items())


def test_the_clip_rate_can_be_logged():
    class Logging(OwnClip):
        def __init__(self):
            super().__init__()
            self.statistics, self.logged = ClipStatistics(), []

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.statistics.add(self.optimizers().last)
            self.log("clip_rate", self.statistics.clip_rate)
            self.logged.append(self.trainer.callback_metrics["clip_rate"].item())

    lit = Logging()
    trainer().fit(lit, batches())
    # The result of a step is seen before the next one's gradients are set to zero, and at the batch's end.
    rates = [result.clipped.double().mean().item() for result in lit.found]
    assert len(rates) == 3
    assert lit.logged[:3] == pytest.approx([sum(rates[: i + 1]) / (i + 1) for i in range(3)])
    assert 0 < lit.logged[-1] <= 1


# ------------------------------------------------------------------------------------------------------------
# A loss scale
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overflows", [None, 2])
def test_a_scaled_loss_is_unscaled_in_the_step(overflows):
    """Autocast leaves a model in float64 alone."""
    lit, data = OwnClip(), batches(5)
    plain, plugin, passes = deepcopy(lit.model), half_precision(), []

    def overflow(grad):
        passes.append(0)
        return torch.full_like(grad, torch.inf) if len(passes) - 1 == overflows else grad

    lit.model.head.bias.register_hook(overflow)
    trainer(plugins=[plugin]).fit(lit, data)
    norms, optimizer = [], adamw(plain.parameters())
    for i, tokens in enumerate(data):
        plain(tokens).square().sum().backward()
        norms.append(fused_component_clip_(plain, CAP))
        if i != overflows:
            optimizer.step()
        optimizer.zero_grad()
    close(lit.model, plain)
    for i, (result, expected) in enumerate(zip(lit.found, norms, strict=False)):  # the last step's isn't seen
        assert result.norms.isfinite().all() == (i != overflows)
        if i != overflows:
            torch.testing.assert_close(result.norms, expected)
    # Twice as large after each two steps, half as large after an overflow.
    assert plugin.scaler.get_scale() == 2.0 ** (12 if overflows is None else 11)


# ------------------------------------------------------------------------------------------------------------
# Clipped by two
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["callback", "hook", "manual"])
def test_clipping_beside_it_is_refused(way):
    lit = BesideHook(0.1) if way == "hook" else OwnClip() if way == "callback" else OwnClipByHand()
    before = deepcopy(lit.model)
    ours = "configure_gradient_clipping" if way == "hook" else "ComponentClip"
    with pytest.raises(
        RuntimeError, match=f"optimizer: ComponentClipAdamW clips in its own step, .*leave out {ours}, or use"
    ):
        trainer(*([] if way == "hook" else [ComponentClip(0.1)])).fit(lit, batches())
    assert same_parameters(lit.model, before)


def test_lightnings_own_clipping_is_refused_by_lightning_under_a_loss_scale():
    """Without one it clips before the optimizer, and nothing of this package runs that could say so."""
    with pytest.raises(RuntimeError, match="ComponentClipAdamW, does not allow for gradient clipping"):
        trainer(plugins=[half_precision()], gradient_clip_val=1.0).fit(OwnClip(Model().float()), batches())
    lit = OwnClip()
    fit = trainer(gradient_clip_val=1e-3)
    fit.fit(lit, batches())
    assert all(result.norms.norm() < 1.01e-3 for result in lit.found)
