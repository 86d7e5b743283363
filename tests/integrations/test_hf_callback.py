"""The callback for transformers' Trainer: the plain loop's bits, scales, checkpoints, and who else clips."""

import shutil

import pytest
import torch

from cwclip_kernels import fused_component_clip_, thresholds
from cwclip_kernels.integrations import _common
from helpers import same_bits

pytest.importorskip("transformers")

from accelerate.state import AcceleratorState
from transformers import Trainer, TrainerCallback

from cwclip_kernels.integrations.transformers import ComponentClipCallback
from hf import arguments, encoder, examples, logged, on_one_thread, plain_loop, total_norm, weights_of

_on_one_thread = pytest.fixture(autouse=True)(on_one_thread)


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch):
    monkeypatch.setattr(_common, "_warned", set())


def trained(folder, callback, model=None, resume=None, **changed):
    args = arguments(folder, **{"max_grad_norm": 0.0, **changed})
    trainer = Trainer(encoder() if model is None else model, args, train_dataset=examples(), callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_is_the_plain_loop(tmp_path, accumulate):
    totals = []

    def clip(model):
        totals.append(total_norm(model).item())
        fused_component_clip_(model, 0.05, components="layer")

    expected = plain_loop(encoder(), clip, accumulate=accumulate)
    callback = ComponentClipCallback(0.05, components="layer")
    trainer = trained(tmp_path, callback, gradient_accumulation_steps=accumulate)
    torch.testing.assert_close(weights_of(trainer.model), weights_of(expected))
    assert logged(trainer, "grad_norm") == pytest.approx(totals, rel=1e-5)
    assert {"bert.encoder.layer.0", "classifier"} < set(callback.last.names)
    assert callback.last_clip is callback.last  # its older name


def test_the_log_has_the_numbers_and_later_callbacks_too(tmp_path):
    seen = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    callback = ComponentClipCallback(0.05, log_norms="classifier.*")
    trainer = Trainer(
        encoder(),
        arguments(tmp_path, max_grad_norm=0.0, logging_steps=3),
        train_dataset=examples(),
        callbacks=[callback, Reporter],
    )
    trainer.train()
    for key in ("clip_rate", "clip_ratio_max", "component_norm_max", "component_norm/classifier.bias"):
        assert len(logged(trainer, key)) == 2
        assert [entry[key] for entry in seen if "loss" in entry] == logged(trainer, key)
    assert "clip_rate" not in seen[-1]  # the summary


def test_a_trainer_that_clips_by_itself_is_named_once(tmp_path):
    setting = r"max_grad_norm of TrainingArguments \(1.0 by default\) is 1.0"
    with pytest.warns(UserWarning, match=f"{setting}, so .*; set max_grad_norm=0"):
        trained(tmp_path, ComponentClipCallback(0.05), max_grad_norm=1.0, max_steps=1)
    trained(tmp_path, ComponentClipCallback(0.05), max_grad_norm=1.0, max_steps=1)  # warnings are errors


@pytest.mark.parametrize("value", [None, 0, 0.0, -1.0, False, torch.inf])
def test_what_clips_nothing_is_not_warned_of(value):
    _common.warn_already_clipped("gradient_clip_val of Trainer", value, "clips too; leave it out")


@pytest.mark.parametrize("value", [0.5, 1, "auto", True])
def test_what_clips_is_warned_of_once(value):
    with pytest.warns(UserWarning, match="gradient_clip_val of Trainer clips too; leave it out"):
        _common.warn_already_clipped("gradient_clip_val of Trainer", value, "clips too; leave it out")
    _common.warn_already_clipped("gradient_clip_val of Trainer", value, "clips too; leave it out")


def scaled(monkeypatch, trainer):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    monkeypatch.setattr(trainer.accelerator, "scaler", scaler)
    monkeypatch.setattr(trainer.accelerator, "native_amp", True)
    monkeypatch.setattr(AcceleratorState, "mixed_precision", "fp16")
    return trainer


# Trainer's own pass unscales; one that left it out would leave it to the callback.
@pytest.mark.parametrize("measured_before", [True, False])
def test_a_scaled_loss_is_unscaled_once(tmp_path, monkeypatch, measured_before):
    class Unmeasured(Trainer):
        def _get_grad_norm(self, model, grad_norm=None):
            return None

    expected = plain_loop(encoder(), lambda model: fused_component_clip_(model, 0.05))
    trainer = (Trainer if measured_before else Unmeasured)(
        encoder(),
        arguments(tmp_path, max_grad_norm=0.0),
        train_dataset=examples(),
        callbacks=[ComponentClipCallback(0.05)],
    )
    scaled(monkeypatch, trainer).train()
    torch.testing.assert_close(weights_of(trainer.model), weights_of(expected))


def learning():
    return ComponentClipCallback(thresholds.EMA(warmup_steps=2))


def test_a_resumed_run_is_the_whole_one_to_the_bit(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = trained(tmp_path / "a", learning(), **saving)
    trained(tmp_path / "b", learning(), max_steps=3, **saving)
    resumed = trained(tmp_path / "b", learning(), resume=True, **saving)
    assert all(map(same_bits, resumed.model.parameters(), whole.model.parameters()))
    assert logged(resumed, "clip_rate") == logged(whole, "clip_rate")
    # From where only the arguments say so.
    shutil.move(tmp_path / "a" / "checkpoint-3", tmp_path / "moved")
    told = str(tmp_path / "moved")
    again = trained(tmp_path / "c", learning(), resume=told, resume_from_checkpoint=told, **saving)
    assert all(map(same_bits, again.model.parameters(), whole.model.parameters()))


def test_the_checkpoint_of_another_run_is_not_taken(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    trained(tmp_path / "a", learning(), **saving)
    trained(tmp_path / "b", learning(), learning_rate=0.01, **saving)
    told = str(tmp_path / "a" / "checkpoint-3")
    with pytest.warns(UserWarning, match=r"checkpoint-3: no component_clipping.pt of this run"):
        trained(tmp_path / "b", learning(), resume=told, max_steps=4)


def test_a_checkpoint_without_the_optimizer_has_nothing_of_ours(tmp_path):
    trained(tmp_path, learning(), save_strategy="steps", save_steps=3, save_only_model=True)
    assert not list(tmp_path.rglob("component_clipping.pt"))


def test_wrong_arguments_are_named_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match="nonfinite: expected one of"):
        ComponentClipCallback(0.05, nonfinite="ignore")
    with pytest.raises(TypeError, match="unexpected keyword argument 'pp_mesh'; the options are components, eps"):
        ComponentClipCallback(0.05, pp_mesh=None)
    with pytest.raises(ValueError, match="max_norm"):
        trained(tmp_path, ComponentClipCallback({"encoder.*": 0.1}))
    with pytest.raises(TypeError, match="max_norm"):
        trained(tmp_path, ComponentClipCallback("low"))
