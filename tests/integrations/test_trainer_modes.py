"""Modes of transformers' Trainer and of Accelerate in which clipping happens elsewhere: each way refuses by name."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch.distributed as dist
from torch import nn

pytest.importorskip("transformers")

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import Trainer

from cwclip_kernels import ComponentClipper, clip_in_backward, fused_component_clip_
from cwclip_kernels.integrations.accelerate import clip_grad_norm_
from cwclip_kernels.integrations.transformers import ComponentClipCallback, ComponentClipLogCallback
from hf import ClippingTrainer, arguments, encoder, examples, on_one_thread

_on_one_thread = pytest.fixture(autouse=True)(on_one_thread)


def of_type(kind):
    def enter(monkeypatch):
        monkeypatch.setattr("accelerate.Accelerator.distributed_type", kind)
        state = SimpleNamespace(distributed_type=kind)
        for module in ("callback", "log"):
            name = f"cwclip_kernels.integrations.transformers.{module}.AcceleratorState"
            monkeypatch.setattr(name, lambda: state)

    return enter


def sagemaker(monkeypatch):
    """What transformers imports, and asks, where SageMaker's launcher has set its environment."""
    smp = ModuleType("smdistributed.modelparallel.torch")
    smp.rank = lambda: 0
    smp.state = SimpleNamespace(cfg=SimpleNamespace(fp16=False))
    monkeypatch.setitem(sys.modules, smp.__name__, smp)
    monkeypatch.setattr("transformers.trainer.is_sagemaker_mp_enabled", lambda: True)
    monkeypatch.setattr("transformers.trainer.smp", smp, raising=False)


MODES = {
    "Megatron-LM": (of_type(DistributedType.MEGATRON_LM), "Megatron-LM clips in its own step.* FSDP 2"),
    "XLA, its FSDP too": (of_type(DistributedType.XLA), "XLA's gradients are summed .* Accelerate's own"),
    "SageMaker": (sagemaker, r"SageMaker's model parallelism keeps parts .*clip_master_grads\(\).* FSDP 2"),
}


def by_mixin(folder):
    ClippingTrainer(encoder(), arguments(folder))


def by_callback(folder):
    Trainer(encoder(), arguments(folder), callbacks=[ComponentClipCallback(0.05)])


def by_late_callback(folder):
    optimizer = SimpleNamespace(accelerator_state=state_of(folder))
    ComponentClipCallback(0.05).on_train_begin(arguments(folder), None, None, model=None, optimizer=optimizer)


def by_log_callback(folder):
    Trainer(encoder(), arguments(folder), callbacks=[ComponentClipLogCallback()])


def by_function(folder):
    accelerator = SimpleNamespace(distributed_type=state_of(folder).distributed_type, sync_gradients=True)
    clip_grad_norm_(accelerator, encoder(), 0.05)


def state_of(folder):
    trainer = Trainer(encoder(), arguments(folder))  # without any of our parts
    return SimpleNamespace(distributed_type=trainer.accelerator.distributed_type)


WAYS = (by_mixin, by_callback, by_late_callback, by_log_callback, by_function)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", WAYS)
def test_who_clips_for_himself_is_named(way, mode, tmp_path, monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    enter, message = MODES[mode]
    enter(monkeypatch)
    with pytest.raises(RuntimeError, match=f"accelerator: {message}"):
        way(tmp_path)


class _Smp(nn.Linear):
    """As SageMaker's wrapper of a model: it is known by this name."""


_Smp.__name__, _Smp.__module__ = "DistributedModel", "smdistributed.modelparallel.torch.model"


def cut_by_plan(monkeypatch):
    """As some versions of transformers leave tensor parallelism: plain parts, and the plan on the module."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 2)
    model = encoder()
    model.bert.encoder.layer[0].intermediate.dense._hf_tp_plan = "colwise"
    model.classifier._hf_tp_plan = "replicated_with_grad_allreduce"  # whole
    return model


MODELS = {
    "SageMaker": (lambda _: nn.Sequential(_Smp(2, 2)), r"in '0', SageMaker's model parallelism .* fully_shard"),
    "tp_plan": (cut_by_plan, r"those of '.*intermediate.dense' are cut by a tp_plan .* into plain tensors"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_models_that_others_have_cut_are_named(kind, tmp_path, monkeypatch):
    make, message = MODELS[kind]
    model = make(monkeypatch)
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.NO, sync_gradients=True, unscale_gradients=lambda: None, _models=[model]
    )
    for attempt in (
        lambda: ComponentClipper(model, 0.1),
        lambda: fused_component_clip_(model, 0.1),
        lambda: clip_in_backward(model, 0.1),
        lambda: clip_grad_norm_(accelerator, model.parameters(), 0.1),
    ):
        with pytest.raises(ValueError, match=message):
            attempt()


def test_a_plan_that_cuts_nothing_here_is_none_of_ours(tmp_path, monkeypatch):
    """One process, or a mesh of one: parts are the whole."""
    model = encoder()
    model.classifier._hf_tp_plan = "colwise"
    ClippingTrainer(model, arguments(tmp_path, max_steps=1), train_dataset=examples()).train()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 2)
    model.classifier._hf_device_mesh = SimpleNamespace(size=lambda: 1)
    ComponentClipper(model, 0.1)
