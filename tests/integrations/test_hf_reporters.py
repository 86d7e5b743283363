"""Numbers about clipping in what a Trainer reports to: TensorBoard, and callbacks like those of W&B and MLflow."""

import sys
from types import SimpleNamespace

import pytest
import torch

from cwclip_kernels import ClipResult

pytest.importorskip("transformers")

from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback, integration_utils

from cwclip_kernels.integrations.transformers import ComponentClipCallback, ComponentClipLogCallback
from cwclip_kernels.integrations.transformers.reporters import begin_reporting, end_reporting
from cwclip_kernels.integrations.transformers.step_log import StepLog
from cwclip_kernels.optim import ComponentClipAdamW
from hf import LR, ClippingTrainer, arguments, encoder, examples, logged, on_one_thread

_on_one_thread = pytest.fixture(autouse=True)(on_one_thread)
KEYS = ("clip_rate", "clip_ratio_max", "component_norm_max", "component_norm/classifier.bias")


class Reporter(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        # PrinterCallback, which comes last but for what is added later, takes total_flos away.
        self.logs.append((state.global_step, {key: value for key, value in logs.items() if key != "total_flos"}))


class Later(Reporter):
    """Another class, since a Trainer warns of two callbacks of one."""


class Events:
    """In place of a SummaryWriter."""

    def __init__(self, log_dir=None):
        self.scalars = {}
        self.flushes = 0

    def add_text(self, *_):
        pass

    def add_scalar(self, tag, value, step):
        assert tag == "train/epoch" or (tag, step) not in self.scalars, "logged twice"  # evaluations log it, too
        self.scalars[tag, step] = value

    def flush(self):
        self.flushes += 1

    def close(self):
        pass


@pytest.fixture
def tensorboard(monkeypatch):
    """The class behind ``report_to="tensorboard"``, whether TensorBoard is installed or not."""
    module = type(sys)("tensorboard")
    module.SummaryWriter = Events
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    return TensorBoardCallback


def trainer_of(way, args, before, after):
    """A Trainer that clips in this way, whose other callbacks come before and after ours."""
    data = {"train_dataset": examples(), "eval_dataset": examples(4)}
    pattern = {"log_norms": "classifier.*"}
    if way == "mixin":
        clipping = {"max_norm": 0.05, **pattern}
        return ClippingTrainer(encoder(), args, callbacks=[before, after], component_clipping=clipping, **data)
    model, optimizer, ours = encoder(), None, ComponentClipCallback(0.05, **pattern)
    if way == "optimizer":
        optimizer = ComponentClipAdamW, {"lr": LR, "max_norm": 0.05, "named_parameters": model}
        ours = ComponentClipLogCallback(**pattern)
    if way != "added":
        return Trainer(model, args, callbacks=[before, ours, after], optimizer_cls_and_kwargs=optimizer, **data)
    trainer = Trainer(model, args, callbacks=[before], **data)
    trainer.add_callback(ours)
    trainer.add_callback(after)
    return trainer


@pytest.mark.parametrize("way", ["mixin", "callback", "added", "optimizer"])
def test_each_reporter_gets_the_numbers_once(tmp_path, tensorboard, way):
    args = arguments(
        tmp_path, max_grad_norm=0.0, logging_steps=2, eval_strategy="steps", eval_steps=3, report_to="tensorboard"
    )
    before, after, events = Reporter(), Later(), Events()
    trainer = trainer_of(way, args, before, after)
    (theirs,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, tensorboard))
    assert trainer.callback_handler.callbacks.index(theirs) < trainer.callback_handler.callbacks.index(before)
    theirs.tb_writer = events
    callbacks = list(trainer.callback_handler.callbacks)
    trainer.train()
    assert trainer.callback_handler.callbacks == callbacks
    assert before.logs == after.logs
    assert events.flushes == len(before.logs)
    history = [
        {key: value for key, value in entry.items() if key != "total_flos"} for entry in trainer.state.log_history
    ]
    assert history == [{**logs, "step": step} for step, logs in before.logs]
    steps = [step for step, logs in before.logs if "loss" in logs]
    assert steps == [2, 4, 6]
    for key in KEYS:
        found = [events.scalars[f"train/{key}", step] for step in steps]
        assert found == logged(trainer, key)
        # Neither evaluations nor the summary.
        assert [key in logs for _, logs in before.logs] == ["loss" in logs for _, logs in before.logs]
    assert sum("eval_loss" in logs for _, logs in before.logs) == 2


def test_the_numbers_are_those_of_the_mixin(tmp_path):
    reporters = []
    for way in ("mixin", "callback"):
        before = Reporter()
        args = arguments(tmp_path / way, max_grad_norm=0.0, logging_steps=4)
        trainer_of(way, args, before, Later()).train()
        reporters.append(before)
    # Trainer's own grad_norm apart, which it measures by clipping to inf.
    for key in KEYS:
        mixin, callback = ([logs[key] for _, logs in r.logs if "loss" in logs] for r in reporters)
        assert mixin == pytest.approx(callback)
        assert mixin


def test_again_after_a_run_that_failed(tmp_path):
    """Nothing is left of the first run that would log twice, or into another Trainer's log."""

    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if failing and state.global_step == 2:
                raise RuntimeError("made up")

    failing, before, ours = [True], Reporter(), ComponentClipCallback(0.05)
    trainer = Trainer(
        encoder(),
        arguments(tmp_path, max_grad_norm=0.0),
        train_dataset=examples(),
        callbacks=[before, ours, Fails],
    )
    callbacks = list(trainer.callback_handler.callbacks)
    with pytest.raises(RuntimeError, match="made up"):
        trainer.train()
    failing.clear()
    before.logs.clear()
    trainer.train()
    assert trainer.callback_handler.callbacks == callbacks
    assert [logs["clip_rate"] for _, logs in before.logs if "loss" in logs] == logged(trainer, "clip_rate")
    assert len(logged(trainer, "clip_rate")) == 6


def test_events_that_no_trainer_calls():
    """The callback's own on_log adds the numbers where no CallbackHandler is in the call stack."""
    log = StepLog(None, None)
    begin_reporting(log)
    log.add(ClipResult(("a",), torch.tensor([4.0]), torch.tensor([0.25]), torch.tensor(1.0)))
    state = SimpleNamespace(log_history=[{}])
    first, second = {"loss": 1.0, "learning_rate": 0.1}, {"loss": 1.0, "learning_rate": 0.1}
    log.add_to(first, state)
    log.add_to(second, state)
    assert first["clip_rate"] == 1
    assert "clip_rate" not in second
    end_reporting(log)
