"""Lightning modules for the tests, Trainers that say little, and the loop that they are compared with."""

import itertools

import pytest
import torch
from torch import nn

pytest.importorskip("lightning")

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision

from cwclip_kernels.integrations.lightning import configure_gradient_clipping
from helpers import same_bits
from small_transformer import Model

# What Lightning itself has warnings about, here and now.
THEIRS = (r".*isinstance\(treespec, LeafSpec\)", ".*does not have many workers", ".*`training_step` returned `None`")


def trainer(*callbacks, **options):
    settings = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(callbacks=list(callbacks), **{**settings, **options})


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.3, momentum=0.9)


class Lit(LightningModule):
    """A model and its optimizer; ``loss`` may be None where it says so."""

    def __init__(self, model=None, optimizer=sgd, nothing_at=()):
        super().__init__()
        self.model = Model() if model is None else model
        self._optimizer = optimizer
        self._nothing_at = nothing_at

    def training_step(self, batch, batch_idx):
        if batch_idx in self._nothing_at:
            return None
        return self.model(batch).square().sum()

    def configure_optimizers(self):
        return self._optimizer(self.parameters())


class Manual(Lit):
    """The same by hand, with accumulation."""

    def __init__(self, *arguments, every=1, **options):
        super().__init__(*arguments, **options)
        self.automatic_optimization = False
        self._every = every

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.model(batch).square().sum() / self._every)
        if (batch_idx + 1) % self._every == 0:
            optimizer = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()


class Gan(LightningModule):
    """Two optimizers that take turns: the generator steps at every other batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
        self.critic = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()

    def losses(self, batch):
        yield 1, lambda: self.critic(self.generator(batch).detach()).square().sum()
        yield 0, lambda: -self.critic(self.generator(batch)).sum()

    def training_step(self, batch, batch_idx):
        for which, loss in itertools.islice(self.losses(batch), 1 + batch_idx % 2):
            optimizer = self.optimizers()[which]
            self.toggle_optimizer(optimizer)
            self.manual_backward(loss())
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        return sgd(self.generator.parameters()), torch.optim.Adam(self.critic.parameters(), lr=0.01)


def same_parameters(a, b):
    return all(map(same_bits, a.state_dict().values(), b.state_dict().values()))


def plain_steps(model, data, clip, every=1, optimizer=None, total=None):
    """The loop that a Trainer is compared with."""
    optimizer = optimizer or sgd(model.parameters())
    total = total or len(data)
    for i, tokens in enumerate(data):
        (model(tokens).square().sum() / every).backward()
        if (i + 1) % every == 0 or i + 1 == total:
            clip(model)
            optimizer.step()
            optimizer.zero_grad()


class ByHook(Lit):
    """Without the callback, where Lightning asks how to clip."""

    def __init__(self, cap, **options):
        super().__init__()
        self.clipped, self.cap, self.options = [], cap, options

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        cap = gradient_clip_val if self.cap is None else self.cap
        self.clipped.append(configure_gradient_clipping(self, optimizer, cap, **self.options))


def half_precision(scale=2.0**10):
    """Lightning has float16 on accelerators alone, but for who brings the plugin."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2))


def adamw(parameters, fused=False):
    return torch.optim.AdamW(parameters, lr=0.01, fused=fused)


def fused(parameters):
    return adamw(parameters, fused=True)
