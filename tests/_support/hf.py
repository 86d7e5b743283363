"""A tiny encoder, data and the Trainer's arguments; and the plain loop that a Trainer is held to."""

import tempfile

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from accelerate.state import AcceleratorState
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from transformers.utils import logging

from cwclip_kernels.integrations.transformers import ComponentClipTrainerMixin

logging.set_verbosity_error()
LR = 0.05


class ClippingTrainer(ComponentClipTrainerMixin, Trainer):
    pass


def encoder(seed=0):
    """5,000 weights, without dropout."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


def examples(number=24, seed=0):
    numbers = torch.Generator().manual_seed(seed)
    return [
        {
            "input_ids": torch.randint(20, (6,), generator=numbers),
            "labels": torch.randint(2, (), generator=numbers).item(),
        }
        for _ in range(number)
    ]


def batches(data, size=4):
    """As the Trainer makes them of the same data."""
    for start in range(0, len(data), size):
        part = data[start : start + size]
        yield {
            "input_ids": torch.stack([e["input_ids"] for e in part]),
            "labels": torch.tensor([e["labels"] for e in part]),
        }


def arguments(folder, **changed):
    told = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "log_level": "error",
        "report_to": [],
        "use_cpu": True,
        "seed": 3,
        "average_tokens_across_devices": False,  # which BERT takes for the sum of a loss that it gives as a mean
    }
    return TrainingArguments(str(folder), **{**told, **changed})


def plain_loop(model, clip, data=None, accumulate=1, size=4):
    """What the Trainer should come to; ``clip(model)`` is called before each step.

    Accumulated losses are added up: Trainer leaves their mean to models that take keyword arguments, as BERT does.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    divisor = losses_divided_by(accumulate)
    for i, batch in enumerate(batches(examples() if data is None else data, size)):
        (model(**batch).loss / divisor).backward()
        if (i + 1) % accumulate == 0:
            clip(model)
            optimizer.step()
            optimizer.zero_grad()
    return model


def losses_divided_by(accumulate):
    """What the Accelerator divides them by: older Trainers, such as 5.3.0, leave it on."""
    if accumulate == 1:
        return 1
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(encoder(), arguments(folder, gradient_accumulation_steps=accumulate))
    return trainer.accelerator.gradient_accumulation_steps


def logged(trainer, key):
    """What the training log has of it, step by step."""
    return [entry[key] for entry in trainer.state.log_history if "loss" in entry]


def total_norm(model):
    return nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


def weights_of(model):
    return [p.detach().clone() for p in model.parameters()]


def on_one_thread():
    """A fixture: the tensors are tiny, and the Accelerator's state is one for all of a process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(threads)


def with_scaler(trainer, monkeypatch, scale=1024.0):
    """Accelerate has float16 on accelerators alone: a scaler for the CPU is put there by hand."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    monkeypatch.setattr(trainer.accelerator, "scaler", scaler)
    monkeypatch.setattr(trainer.accelerator, "native_amp", True)
    monkeypatch.setattr(AcceleratorState, "mixed_precision", "fp16")
    return trainer
