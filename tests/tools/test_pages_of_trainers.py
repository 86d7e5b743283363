"""The pieces of Python in docs/trainers.md: they clip."""

import functools

import pytest
import torch
from torch import nn

from cwclip_kernels import component_norms
from cwclip_kernels.optim import ComponentClipAdamW
from pages import DOCS, blocks_of
from ranks import on_ranks

BLOCKS = blocks_of(DOCS / "trainers.md")


def block(word):
    """The one piece in which it is."""
    (found,) = [text for text in BLOCKS if word in text]
    return compile(found, f"docs/trainers.md, {word}", "exec")


@pytest.fixture
def hf():
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    import hf
    from cwclip_kernels.integrations import _common

    _common._warned.clear()
    for _ in hf.on_one_thread():
        yield hf


@pytest.mark.parametrize(
    ("word", "cap"),
    [
        *(("ComponentClipTrainerMixin", 0.05), ("ComponentClipCallback", 0), ("ComponentClipLogCallback", 0)),
    ],
)
def test_hugging_face(hf, word, cap, tmp_path):
    names = {
        "Trainer": hf.Trainer,
        "model": hf.encoder(),
        "args": hf.arguments(tmp_path, max_grad_norm=cap, max_steps=2),
        "data": hf.examples(),
    }
    exec(block(word), names)
    names["trainer"].train()
    assert all(rate > 0 for rate in hf.logged(names["trainer"], "clip_rate"))


@pytest.fixture
def lightning():
    """Names of the page's blocks, and the norms that an optimizer's steps found."""
    pl = pytest.importorskip("lightning.pytorch")

    class Model(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 2)
            self.found = []

        def training_step(self, batch, batch_idx):
            return 100 * self.head(batch).square().mean()

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            step = optimizer.step

            def seen(closure):
                def closure_and_look():  # Lightning's closure ends with clipping
                    loss = closure()
                    self.found.append(component_norms(self))
                    return loss

                return step(closure=closure_and_look)

            optimizer.step = functools.wraps(step)(seen)
            return optimizer

    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = functools.partial(pl.Trainer, accelerator="cpu", max_epochs=1, **dict.fromkeys(quiet, False))
    return {"Trainer": trainer, "LightningModule": Model, "model": Model(), "loader": torch.randn(3, 5, 4)}


@pytest.mark.filterwarnings(r"ignore:.*isinstance\(treespec, LeafSpec\)")  # of Lightning itself
def test_lightning_callback(lightning):
    exec(block("ComponentClip("), lightning)
    assert len(lightning["model"].found) == 3
    assert all((norms <= 0.0501).all() for norms in lightning["model"].found)


@pytest.mark.filterwarnings(r"ignore:.*isinstance\(treespec, LeafSpec\)")
def test_lightning_helper(lightning):
    exec(block("gradient_clip_algorithm"), lightning)
    model = lightning["Model"]()
    lightning["Trainer"](gradient_clip_val=0.05).fit(model, lightning["loader"])
    assert len(model.found) == 3
    assert all((norms <= 0.0501).all() for norms in model.found)


@pytest.mark.filterwarnings(r"ignore:.*isinstance\(treespec, LeafSpec\)")
def test_lightning_with_an_optimizer_that_clips(lightning):
    exec(block("def configure_optimizers"), {**lightning, "ComponentClipAdamW": ComponentClipAdamW}, lightning)
    trainer = lightning["Trainer"](accumulate_grad_batches=2)
    trainer.fit(lightning["Model"](), lightning["loader"])
    assert trainer.optimizers[0].last.names == ("head.weight", "head.bias")
    assert trainer.callback_metrics["clip_rate"] == trainer.optimizers[0].last.clipped.float().mean() > 0


@pytest.mark.filterwarnings(r"ignore:.*isinstance\(treespec, LeafSpec\)")
def test_fabric():
    pytest.importorskip("lightning")
    from lightning.fabric import Fabric

    fabric, model = Fabric(accelerator="cpu", devices=1), nn.Linear(4, 2)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    names = {"fabric": fabric, "model": model, "optimizer": optimizer, "batch": torch.ones(3, 4)}
    exec(block("fabric.backward"), names)
    assert all(p.grad.norm() <= 0.05 for p in model.parameters())
    assert names["total_norm"] > 1.0


def test_accelerate_with_an_optimizer_that_clips():
    accelerate = pytest.importorskip("accelerate")
    state = accelerate.state.AcceleratorState
    state._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True)
    names = {"ComponentClipAdamW": ComponentClipAdamW, "model": nn.Linear(4, 2), "accelerator": accelerator}
    exec(block("accelerator.prepare"), names)
    accelerator.backward(100 * names["model"](torch.ones(1, 4)).sum())
    names["optimizer"].step()
    state._reset_state(reset_partial_state=True)
    assert names["optimizer"].optimizer.last.names == ("weight", "bias")
    assert names["optimizer"].optimizer.last.clipped.all()


@on_ranks(1)
def test_deepspeed():
    pytest.importorskip("deepspeed")
    import types

    from deepspeed_engines import Model, loss_of, quiet, started

    class WithLoss(Model):
        def forward(self, tokens):
            return types.SimpleNamespace(loss=loss_of(super().forward, tokens))

    (page,) = blocks_of(DOCS / "deepspeed.md")
    (short,) = [text for text in BLOCKS if "deepspeed" in text]
    assert "engine.step()" in page
    assert "engine.step()" not in short
    for block in (page, short):
        model = WithLoss()
        names = {
            "deepspeed": started(),
            "model": model,
            "optimizer": torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]),
            "loader": [torch.randint(11, (8, 4)) for _ in range(2)],
        }
        with quiet():
            exec(compile(block, "deepspeed", "exec"), names)
            if block is short:
                names["engine"].backward(names["engine"](names["loader"][0]).loss)
                names["engine"].step()
        found = names["engine"]._cwclip_clipping.last
        assert found.clipped.any()
