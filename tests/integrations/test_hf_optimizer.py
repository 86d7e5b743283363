"""``ComponentClipAdamW`` as the optimizer of transformers' Trainer, and the callback that logs what it clips."""

import pytest
import torch

from cwclip_kernels import ClipResult, fused_component_clip_, thresholds
from cwclip_kernels.integrations import _common
from cwclip_kernels.optim import ComponentClipAdamW
from helpers import same_bits

pytest.importorskip("transformers")

from transformers import Trainer

from cwclip_kernels.integrations.transformers import (
    ComponentClipCallback,
    ComponentClipLogCallback,
    ComponentClipTrainerMixin,
)
from cwclip_kernels.integrations.transformers.step_log import StepLog
from hf import (
    ClippingTrainer,
    arguments,
    batches,
    encoder,
    examples,
    logged,
    losses_divided_by,
    on_one_thread,
    total_norm,
    weights_of,
    with_scaler,
)

_on_one_thread = pytest.fixture(autouse=True)(on_one_thread)
LR, CAP, DECAY = 1e-3, 0.05, 0.1


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch):
    monkeypatch.setattr(_common, "_warned", set())


def model():
    # In float64: the gradients of some biases are rounding errors, which Adam makes as large as all others.
    return encoder().double()


def trainer_of(folder, *callbacks, kind=Trainer, on=None, caps=CAP, components=None, learning_rate=LR, **changed):
    on = model() if on is None else on
    told = {"max_grad_norm": 0.0, "weight_decay": DECAY, "learning_rate": learning_rate}
    options = {"lr": learning_rate, "max_norm": caps, "components": components, "named_parameters": on}
    return kind(
        on,
        arguments(folder, **{**told, **changed}),
        train_dataset=examples(),
        callbacks=list(callbacks),
        optimizer_cls_and_kwargs=(ComponentClipAdamW, options),
    )


def plain(model, clip, accumulate=1):
    """What the Trainer should come to: ``clip(model)``, then torch's AdamW with weight decay as Trainer has it."""
    free = [p for n, p in model.named_parameters() if n.endswith("bias") or "LayerNorm" in n]
    rest = [p for p in model.parameters() if all(p is not other for other in free)]
    groups = [{"params": rest, "weight_decay": DECAY}, {"params": free, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR)
    divisor = losses_divided_by(accumulate)
    for i, batch in enumerate(batches(examples())):
        (model(**batch).loss / divisor).backward()
        if (i + 1) % accumulate == 0:
            clip(model)
            optimizer.step()
            optimizer.zero_grad()
    return model


# Layers have parameters of both of Trainer's groups, those with weight decay and those without.
@pytest.mark.parametrize("components", [None, "layer"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_is_clipping_and_then_adamw(tmp_path, accumulate, components):
    totals, rates = [], []

    def clip(model):
        totals.append(total_norm(model).item())
        norms = fused_component_clip_(model, CAP, components=components)
        rates.append((norms > CAP).double().mean().item())

    expected = plain(model(), clip, accumulate)
    log = ComponentClipLogCallback()
    trainer = trainer_of(tmp_path, log, components=components, gradient_accumulation_steps=accumulate)
    trainer.train()
    torch.testing.assert_close(weights_of(trainer.model), weights_of(expected), rtol=1e-9, atol=1e-10)
    assert [len(group["params"]) > 0 for group in trainer.optimizer.param_groups] == [True, True]
    assert logged(trainer, "grad_norm") == pytest.approx(totals, rel=1e-6)
    assert logged(trainer, "clip_rate") == pytest.approx(rates)
    assert 0 < rates[0] < 1
    assert {"bert.encoder.layer.0" if components else "classifier.weight"} < set(log.last.names)
    assert log.last is _common.innermost(trainer.optimizer).last


def test_the_log_has_what_the_callback_that_clips_logs(tmp_path):
    """But for the norms of components that AdamW's other rounding changes."""
    log, clip = (
        ComponentClipLogCallback(log_norms="classifier.*"),
        ComponentClipCallback(CAP, log_norms="classifier.*"),
    )
    ours = trainer_of(tmp_path, log, logging_steps=3)
    ours.train()
    theirs = Trainer(
        model(),
        arguments(
            tmp_path, max_grad_norm=0.0, weight_decay=DECAY, learning_rate=LR, logging_steps=3, optim="adamw_torch"
        ),
        train_dataset=examples(),
        callbacks=[clip],
    )
    theirs.train()
    names = "clip_rate", "clip_ratio_max", "component_norm_max", "component_norm_nonfinite"
    for name in (*names, "component_norm/classifier.bias", "component_norm/classifier.weight", "grad_norm"):
        assert len(logged(ours, name)) == 2
        assert logged(ours, name) == pytest.approx(logged(theirs, name), rel=1e-6), name
    assert ours.state.log_history[-1].keys() == theirs.state.log_history[-1].keys()  # the summary


def test_each_step_is_recorded(tmp_path):
    found = []
    trainer_of(tmp_path, ComponentClipLogCallback(on_clip=found.append)).train()
    assert len({id(result) for result in found}) == 6
    assert all(isinstance(result, ClipResult) for result in found)


def test_without_the_callback_it_clips_as_well(tmp_path):
    trainers = [trainer_of(tmp_path, *callbacks) for callbacks in ((), (ComponentClipLogCallback(),))]
    for trainer in trainers:
        trainer.train()
    assert all(map(same_bits, *(t.model.parameters() for t in trainers)))
    assert _common.innermost(trainers[0].optimizer).last.clipped.any()
    assert logged(trainers[1], "clip_rate")
    with pytest.raises(KeyError, match="clip_rate"):
        logged(trainers[0], "clip_rate")


@pytest.mark.parametrize("components", [None, "layer"])
def test_a_resumed_run_is_the_whole_one_to_the_bit(tmp_path, components):
    def trained(folder, resume=None, **changed):
        caps = thresholds.EMA(warmup_steps=2)
        saving = {"save_strategy": "steps", "save_steps": 3, **changed}
        trainer = trainer_of(folder, ComponentClipLogCallback(), caps=caps, components=components, **saving)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, caps.state_dict()

    whole, learnt = trained(tmp_path / "a")
    trained(tmp_path / "b", max_steps=3)
    resumed, again = trained(tmp_path / "b", resume=True)
    assert all(map(same_bits, resumed.model.parameters(), whole.model.parameters()))
    assert logged(resumed, "clip_rate") == logged(whole, "clip_rate")
    assert again["host"] == learnt["host"] == {"steps": 6}
    assert all(same_bits(again["tensors"][name], value) for name, value in learnt["tensors"].items())
    assert not list(tmp_path.rglob("component_clipping.pt"))  # the optimizer's own file has it


def test_a_trainer_that_clips_by_itself_is_named_once(tmp_path):
    trainer = trainer_of(tmp_path, ComponentClipLogCallback(), max_grad_norm=1.0, max_steps=1)
    with pytest.warns(UserWarning, match=r"max_grad_norm of .* is 1.0, so .*; set max_grad_norm=0"):
        trainer.train()
    trainer.train()  # warnings are errors


def test_an_optimizer_that_does_not_clip_has_nothing_to_log(tmp_path):
    args = arguments(tmp_path, max_grad_norm=0.0)
    trainer = Trainer(model(), args, train_dataset=examples(), callbacks=[ComponentClipLogCallback()])
    with pytest.raises(TypeError, match="optimizer: SGD doesn't clip by itself, .*ComponentClipAdamW"):
        trainer.train()


def test_wrong_arguments_are_named(tmp_path):
    with pytest.raises(TypeError, match="log_norms: expected a pattern"):
        ComponentClipLogCallback(log_norms=3)
    trainer = trainer_of(tmp_path, ComponentClipLogCallback(log_norms="head.*"))
    with pytest.raises(ValueError, match=r"log_norms: 'head.\*' matches none of the 41 components"):
        trainer.train()


@pytest.mark.parametrize(
    ("kind", "ours"), [(ClippingTrainer, ComponentClipTrainerMixin), (Trainer, ComponentClipCallback)]
)
def test_clipping_beside_it_is_refused(tmp_path, kind, ours):
    callbacks = [] if kind is ClippingTrainer else [ComponentClipCallback(CAP)]
    trainer = trainer_of(tmp_path, *callbacks, kind=kind)
    before = weights_of(trainer.model)
    message = f"optimizer: ComponentClipAdamW clips in its own step, .*leave out {ours.__name__}, or use"
    with pytest.raises(RuntimeError, match=message):
        trainer.train()
    assert all(map(same_bits, trainer.model.parameters(), before))


def test_a_scaled_loss(tmp_path, monkeypatch):
    scaled, unscaled = (trainer_of(tmp_path, ComponentClipLogCallback()) for _ in range(2))
    with_scaler(scaled, monkeypatch).train()
    monkeypatch.undo()
    unscaled.train()
    torch.testing.assert_close(weights_of(scaled.model), weights_of(unscaled.model), rtol=1e-9, atol=1e-10)
    assert logged(scaled, "component_norm_max") == pytest.approx(logged(unscaled, "component_norm_max"))


def test_an_overflow_skips_the_step(tmp_path, monkeypatch):
    trainer = with_scaler(trainer_of(tmp_path, ComponentClipLogCallback()), monkeypatch)
    passes = []

    def overflow(grad):
        passes.append(0)
        return torch.full_like(grad, torch.inf) if len(passes) == 3 else grad

    trainer.model.classifier.bias.register_hook(overflow)
    trainer.train()
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert [number > 0 for number in logged(trainer, "component_norm_nonfinite")] == [i == 2 for i in range(6)]
    assert {state["step"].item() for state in _common.innermost(trainer.optimizer).state.values()} == {5}


def test_components_that_come_or_go_begin_a_new_window():
    log = StepLog(None, None)
    for names in (("a",), ("a", "b")):
        ones = torch.ones(len(names))
        log.add(ClipResult(names, 3 * ones, ones if len(names) == 2 else ones / 3, torch.tensor(1.0)))
    assert log.numbers()["clip_rate"] == 0.0
    assert log.steps == 2
