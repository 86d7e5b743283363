"""transformers' Trainer with DeepSpeed, beside the same Trainer without; and whose clipping it is."""

import contextlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cwclip_kernels import thresholds
from helpers import same_bits
from ranks import on_ranks

pytest.importorskip("transformers")
pytest.importorskip("deepspeed")

from accelerate.state import AcceleratorState
from transformers import Trainer, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from cwclip_kernels.integrations.deepspeed.clipping import attached_to
from cwclip_kernels.integrations.deepspeed.internals.checkpoints import KEY
from cwclip_kernels.integrations.deepspeed.internals.engine import engine_around
from cwclip_kernels.integrations.transformers import ComponentClipCallback, ComponentClipLogCallback
from cwclip_kernels.integrations.transformers.clipping import FILE
from cwclip_kernels.integrations.transformers.engine import check_configuration
from deepspeed_trainers import assert_same, launched, one_folder, whole
from hf import ClippingTrainer, arguments, encoder, examples

CAP = 0.02


@contextlib.contextmanager
def with_trainer():
    """Of Accelerate there is one state in a process."""
    with launched():
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            unset_hf_deepspeed_config()


def configured(stage, **more):
    """Of DeepSpeed; None for a stage of None."""
    if stage is None:
        return None
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage},
        **more,
    }


AUTO = {"gradient_clipping": "auto"}


def trainer_of(way, folder, deepspeed, caps=None, model=None, callbacks=(), **changed):
    """With a number as the cap, or ``caps``; the mixin's number is ``max_grad_norm``."""
    model = encoder() if model is None else model
    log_norms = {"log_norms": "classifier.*"}
    if way == "mixin":
        args = arguments(folder, deepspeed=deepspeed, max_grad_norm=CAP, **changed)
        given = {**log_norms, **({} if caps is None else {"max_norm": caps})}
        options = {"callbacks": list(callbacks), "component_clipping": given}
        return ClippingTrainer(model, args, train_dataset=examples(), **options)
    args = arguments(folder, deepspeed=deepspeed, max_grad_norm=0.0, **changed)
    ours = ComponentClipCallback(CAP if caps is None else caps, **log_norms)
    return Trainer(model, args, train_dataset=examples(), callbacks=[*callbacks, ours])


def trained(way, folder, deepspeed, resume=None, **more):
    """What a run comes to: parameters, its log, its steps."""
    with with_trainer():
        trainer = trainer_of(way, folder, deepspeed, **more)
        trainer.train(resume_from_checkpoint=resume)
        is_engine = type(trainer.model_wrapped).__name__ == "DeepSpeedEngine"
        assert is_engine == (deepspeed is not None)
        return whole(trainer.model), [entry for entry in trainer.state.log_history if "loss" in entry]


# Whichever way, each stage; both kinds of configuration that clip nothing by themselves; accumulation.
@pytest.mark.parametrize(
    ("way", "stage", "config", "accumulate"),
    [
        ("mixin", 0, {}, 1),
        ("mixin", 2, AUTO, 2),
        ("mixin", 3, {}, 1),
        ("callback", 2, {}, 1),
        ("callback", 3, AUTO, 2),
    ],
)
@on_ranks(2)
def test_a_run_is_that_without_deepspeed(tmp_path, way, stage, config, accumulate):
    more = {"gradient_accumulation_steps": accumulate, "logging_steps": 2 // accumulate}
    ours, log = trained(way, tmp_path, configured(stage, **config), **more)
    theirs, expected = trained(way, tmp_path, None, **more)
    assert_same(ours, theirs)
    assert len(log) == len(expected) > 0
    for entry, other in zip(log, expected, strict=True):
        assert {"grad_norm", "clip_rate", "clip_ratio_max", "component_norm/classifier.bias"} < set(other)
        assert entry == pytest.approx(other, rel=1e-5)
    assert 0 < expected[0]["clip_rate"] < 1
    assert expected[0]["grad_norm"] > CAP


@pytest.mark.parametrize(("way", "stage"), [("mixin", 3), ("callback", 2)])
@on_ranks(2)
def test_a_resumed_run_is_the_whole_one(way, stage):
    """Caps are saved once, in the file that there is without DeepSpeed."""
    folder, saving = one_folder(), {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}

    def run(name, **more):
        caps = thresholds.EMA(warmup_steps=1)
        found, _ = trained(way, f"{folder}/{name}", configured(stage), caps=caps, **{**saving, **more})
        return found, caps.state_dict()

    ours, learnt = run("a")
    run("b", max_steps=2)
    resumed, again = run("b", resume=True)
    assert_same(resumed, ours)
    assert again["host"] == learnt["host"] == {"steps": 3}
    assert same_bits(again["tensors"]["gamma"], learnt["tensors"]["gamma"])
    saved = torch.load(f"{folder}/a/checkpoint-2/{FILE}")
    assert saved["max_norm"]["host"] == {"steps": 2}
    (path, *_) = Path(f"{folder}/a/checkpoint-2/global_step2").glob("*mp_rank_00_model_states.pt")
    assert KEY not in torch.load(path, weights_only=False)  # the client's states are between DeepSpeed's own


class Engines(TrainerCallback):
    """The engines of a run, and what is attached to each."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        engine = engine_around(model, optimizer.optimizer)
        if engine not in self.seen:
            self.seen.append(engine)


@pytest.mark.parametrize("way", ["mixin", "callback"])
@on_ranks(2)
def test_a_run_that_begins_again_with_smaller_batches(tmp_path, way):
    """In an engine of its own; caps forget the first try."""
    model, caps, engines, sizes = encoder(), thresholds.EMA(warmup_steps=2), Engines(), []

    def look(module, args, batch):
        sizes.append(len(batch["labels"]))
        if sizes[-1] == 4 and len(sizes) == 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model.register_forward_pre_hook(look, with_kwargs=True)
    _, log = trained(
        way, tmp_path, configured(2, **AUTO), caps=caps, model=model, callbacks=[engines], auto_find_batch_size=True
    )
    assert sizes == [4, 4, 3, 3, 3, 3]
    assert len(log) == 4
    assert caps.state_dict()["host"] == {"steps": 4}
    first, second = engines.seen
    assert attached_to(second) is not None
    assert first.gradient_clipping() == second.gradient_clipping() == 0


@on_ranks(2)
def test_a_cap_that_changes_is_followed(tmp_path):
    class Lower(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            args.max_grad_norm = CAP if state.global_step < 1 else 0.01

    with with_trainer():
        trainer = trainer_of("mixin", tmp_path, configured(2, **AUTO), callbacks=[Lower()])
        trainer.train()
        assert trainer.last.caps == 0.01


def with_mixin(args, **given):
    return ClippingTrainer(encoder(), args, train_dataset=examples(), component_clipping=given)


def with_callback(args, callback=None):
    return Trainer(encoder(), args, train_dataset=examples(), callbacks=[callback or ComponentClipCallback(CAP)])


@on_ranks(2)
def test_who_clips_as_well_is_named(tmp_path):
    written = r'configuration has "gradient_clipping": 0.5, by one norm; set it to "auto"'
    ones = r'max_grad_norm of TrainingArguments .* is 1.0, to which DeepSpeed .* "auto"; set max_grad_norm=0'
    refused = [
        ({"gradient_clipping": 0.5}, 0.0, with_callback, written),
        ({"gradient_clipping": 0.5}, 0.5, with_mixin, written),
        (AUTO, 1.0, with_callback, ones),
        (
            AUTO,
            0.0,
            lambda args: with_callback(args, ComponentClipLogCallback()),
            "ComponentClipAdamW can't clip there",
        ),
        (AUTO, 1.0, lambda args: with_mixin(args, log_norms="head.*"), "log_norms: 'head.*' matches none of the 41"),
    ]
    for config, max_grad_norm, make, message in refused:
        with with_trainer():
            args = arguments(tmp_path, deepspeed=configured(2, **config), max_grad_norm=max_grad_norm)
            with pytest.raises((RuntimeError, ValueError), match=message):
                make(args)


@on_ranks(2)
def test_what_the_engine_refuses_is_refused_before_the_first_step(tmp_path):
    with with_trainer():
        args = arguments(tmp_path, deepspeed=configured(2, **AUTO))
        trainer = with_mixin(args, process_group=torch.distributed.group.WORLD)
        with pytest.raises(ValueError, match="process_group: DeepSpeed knows which ranks"):
            trainer.train()
        assert trainer.state.global_step == 0


@pytest.mark.parametrize(("written", "is_refused"), [("auto", False), (0.0, False), (1.0, True)])
def test_the_setting_of_accelerates_launcher(tmp_path, written, is_refused):
    accelerator = SimpleNamespace(deepspeed_plugin=SimpleNamespace(gradient_clipping=written))
    context = pytest.raises(RuntimeError, match="1.0, by one norm") if is_refused else contextlib.nullcontext()
    with context:
        check_configuration(arguments(tmp_path), accelerator, clips_max_grad_norm=True)
