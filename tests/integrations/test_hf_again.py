"""A Trainer that begins again, skips steps, is copied, or has what it clips clipped by somebody else of ours."""

import copy
import pickle

import pytest
import torch

from cwclip_kernels import (
    ComponentClipGradScaler,
    ComponentClipper,
    clip_in_backward,
    fused_component_clip_,
    thresholds,
)
from helpers import same_bits

pytest.importorskip("transformers")

from accelerate.utils import find_executable_batch_size
from transformers import Trainer, TrainerCallback

from cwclip_kernels.integrations.transformers import ComponentClipCallback
from cwclip_kernels.integrations.transformers.clipping import FILE
from hf import ClippingTrainer, arguments, encoder, examples, logged, on_one_thread, plain_loop, with_scaler

_on_one_thread = pytest.fixture(autouse=True)(on_one_thread)
WAYS = ["mixin", "callback"]
POLICIES = {
    "Schedule": lambda: thresholds.Schedule(lambda step: 0.05 / (1 + step)),
    "EMA": lambda: thresholds.EMA(warmup_steps=2),
    "ZScore": lambda: thresholds.ZScore(warmup_steps=2, threshold=0.5),
    "Percentile": lambda: thresholds.Percentile(50.0),
}


def trainer_of(way, folder, caps, model=None, callbacks=(), data=None, optimizers=(None, None), **changed):
    args = arguments(folder, max_grad_norm=0.0, **changed)
    told = {"train_dataset": examples() if data is None else data, "optimizers": optimizers}
    model = encoder() if model is None else model
    if way == "mixin":
        given = {"max_norm": caps}
        return ClippingTrainer(model, args, callbacks=list(callbacks), component_clipping=given, **told)
    return Trainer(model, args, callbacks=[*callbacks, ComponentClipCallback(caps)], **told)


def clipping_of(trainer):
    if isinstance(trainer, ClippingTrainer):
        return trainer._clipping
    (callback,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, ComponentClipCallback))
    return callback._clipping


def same_state(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one["host"] == other["host"]
    assert set(one["tensors"]) == set(other["tensors"])
    return all(same_bits(one["tensors"][name], other["tensors"][name]) for name in one["tensors"])


# ------------------------------------------------------------------------------------------------------------
# auto_find_batch_size
# ------------------------------------------------------------------------------------------------------------


def out_of_memory(model, after, size=4):
    """From some batches on there is too little memory for those of one size."""
    seen = []

    def look(module, args, batch):
        seen.append(len(batch["labels"]))
        if seen[-1] == size and seen.count(size) > after:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model.register_forward_pre_hook(look, with_kwargs=True)
    return model


def next_size(size=4):
    """What Accelerate tries next: a little less, or half in older versions."""
    tried = []

    @find_executable_batch_size(starting_batch_size=size)
    def run(batch_size):
        tried.append(batch_size)
        if len(tried) == 1:
            raise RuntimeError("CUDA out of memory.")

    run()
    return tried[1]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_run_that_begins_again_forgets_what_the_first_try_taught(tmp_path, way, policy):
    """Trainer begins again with the model as it is then."""
    expected, first, caps = encoder(), POLICIES[policy](), POLICIES[policy]()
    data = examples()
    plain_loop(expected, lambda model: fused_component_clip_(model, first), data=data[:12])
    plain_loop(expected, lambda model: fused_component_clip_(model, caps), data=data, size=next_size())
    ours = POLICIES[policy]()
    trainer = trainer_of(way, tmp_path, ours, out_of_memory(encoder(), 3), auto_find_batch_size=True)
    trainer.train()
    steps = len(data) // next_size()
    assert trainer.state.global_step == clipping_of(trainer).steps == steps
    assert all(map(same_bits, trainer.model.parameters(), expected.parameters()))
    assert same_state(ours, caps)
    assert len(logged(trainer, "clip_rate")) == steps


@pytest.mark.parametrize("way", WAYS)
def test_what_another_run_has_taught_stays(tmp_path, way):
    """A second run goes on with the model, and the caps; only what a failed try taught is forgotten."""
    data, caps, again = examples(), POLICIES["EMA"](), POLICIES["EMA"]()
    model = encoder()
    trainer_of(way, tmp_path, caps, model, data=data[:8]).train()
    again.load_state_dict(caps.state_dict())
    expected = copy.deepcopy(model)
    before = copy.deepcopy(again.state_dict())
    plain_loop(expected, lambda m: fused_component_clip_(m, again), data=data[:4])
    again.load_state_dict(before)
    plain_loop(expected, lambda m: fused_component_clip_(m, again), data=data[:12], size=next_size())
    out_of_memory(model, 1)
    trainer_of(way, tmp_path, caps, model, data=data[:12], auto_find_batch_size=True).train()
    assert all(map(same_bits, model.parameters(), expected.parameters()))
    assert same_state(caps, again)


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_was_given_up_and_begun_once_more(tmp_path, way):
    """Its caps had gone back to nothing, for the second try."""
    model, caps, seen = encoder(), POLICIES["EMA"](), []

    def give_up(module, args, batch):
        seen.append(len(batch["labels"]))
        if seen.count(next_size()) == 1:
            raise KeyboardInterrupt

    trainer = trainer_of(way, tmp_path, caps, out_of_memory(model, 1), auto_find_batch_size=True)
    model.register_forward_pre_hook(give_up, with_kwargs=True)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert seen == [4, next_size()]
    trainer.train()
    assert caps.state_dict()["host"] == {"steps": 24 // next_size()}


@pytest.mark.parametrize("way", WAYS)
def test_two_runs_one_after_the_other_learn_on(tmp_path, way):
    caps, again = POLICIES["Schedule"](), POLICIES["Schedule"]()
    trainer = trainer_of(way, tmp_path, caps, auto_find_batch_size=True)
    for _ in range(2):
        trainer.train()
    again._step = 12
    assert same_state(caps, again)


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_that_begins_again_goes_back_to_the_checkpoint(tmp_path, way):
    saving = {"save_strategy": "steps", "save_steps": 3, "auto_find_batch_size": True}
    first = POLICIES["EMA"]()
    trainer_of(way, tmp_path, first, max_steps=3, **saving).train()
    found = []

    class AtBegin(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                found.append(copy.deepcopy(caps.state_dict()))

    caps = POLICIES["EMA"]()
    trainer = trainer_of(way, tmp_path, caps, out_of_memory(encoder(), 2), [AtBegin()], max_steps=6, **saving)
    trainer.train(resume_from_checkpoint=True)
    assert len(found) == 2
    learnt = first.state_dict()
    for state in found:
        assert state["host"] == learnt["host"]
        assert all(same_bits(state["tensors"][name], learnt["tensors"][name]) for name in learnt["tensors"])
    assert caps.state_dict()["host"] == {"steps": 6}


# ------------------------------------------------------------------------------------------------------------
# Steps that a loss scaler skips
# ------------------------------------------------------------------------------------------------------------


def overflow_at(model, step):
    seen = []

    def hook(grad):
        seen.append(0)
        return torch.full_like(grad, torch.inf) if len(seen) == step + 1 else grad

    model.classifier.bias.register_hook(hook)
    return model


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("step", [0, 3])  # in the warm-up, and after it
@pytest.mark.parametrize("policy", POLICIES)
def test_a_skipped_step_teaches_nothing(tmp_path, monkeypatch, way, policy, step):
    """As for a clipper that is attached to the optimizer, which isn't stepped."""

    def run(caps, train):
        model = overflow_at(encoder(), step)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        optimizers = optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        return with_scaler(train(model, optimizer, optimizers, caps), monkeypatch)

    def attached(model, optimizer, optimizers, caps):
        ComponentClipper(model, caps).attach(optimizer)
        args = arguments(tmp_path, max_grad_norm=0.0)
        return Trainer(model, args, train_dataset=examples(), optimizers=optimizers)

    def ours(model, optimizer, optimizers, caps):
        return trainer_of(way, tmp_path, caps, model, optimizers=optimizers)

    found = []
    for train in (attached, ours):
        caps = POLICIES[policy]()
        trainer = run(caps, train)
        trainer.train()
        assert trainer.accelerator.scaler.get_scale() == 512.0
        found.append((trainer, caps))
    (theirs, their_caps), (own, own_caps) = found
    assert all(map(same_bits, own.model.parameters(), theirs.model.parameters()))
    assert same_state(own_caps, their_caps)
    # The step is shown as it was.
    assert clipping_of(own).steps == 6
    assert max(logged(own, "component_norm_nonfinite")) > 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("caps", [0.05, thresholds.FromGlobal(1.0)])
def test_what_learns_nothing_asks_nothing(tmp_path, monkeypatch, way, caps):
    """Whether the step is skipped is known on the device alone."""
    asked = []
    trainer = trainer_of(way, tmp_path, caps)
    monkeypatch.setattr(
        "cwclip_kernels.integrations._common._is_skipped", lambda *arguments: asked.append(0) or False
    )
    with_scaler(trainer, monkeypatch).train()
    assert not asked


# ------------------------------------------------------------------------------------------------------------
# Checkpoints, copies
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("caps", "is_saved"),
    [
        (lambda: 0.05, False),
        (lambda: thresholds.FromGlobal(1.0), False),
        (lambda: thresholds.ParamRelative(), False),
        (POLICIES["Schedule"], True),
        (POLICIES["ZScore"], True),
    ],
)
def test_a_checkpoint_has_what_was_learnt(tmp_path, way, caps, is_saved):
    """And nothing, of which a run that goes on doesn't complain, where nothing is."""
    saving = {"save_strategy": "steps", "save_steps": 3}
    trainer_of(way, tmp_path, caps(), max_steps=3, **saving).train()
    assert (tmp_path / "checkpoint-3" / FILE).exists() == is_saved
    trainer_of(way, tmp_path, caps(), max_steps=6, **saving).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("policy", [None, "Schedule", "Percentile"])
def test_a_trainer_can_be_copied_after_a_run(tmp_path, way, policy):
    """As without us. Pickled it can't be then, nor does the copy train, with or without us."""
    caps = POLICIES[policy]() if policy else 0.05
    trainer = trainer_of(way, tmp_path, caps)
    trainer.train()
    other = copy.deepcopy(trainer)
    assert same_bits(clipping_of(other).last.norms, clipping_of(trainer).last.norms)
    copied = clipping_of(other)._max_norm
    assert (copied is caps) == (policy is None)
    if policy:
        assert same_state(copied, caps)
        trainer.train()
        assert copied.state_dict()["host"] != caps.state_dict()["host"] or not same_state(copied, caps)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_a_callback_can_be_copied_and_pickled(tmp_path, copied, when):
    caught = []

    class Copier(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if when == "during" and state.global_step == 2:
                caught.append(copied(callback))

    callback = ComponentClipCallback(0.05, log_norms="classifier.*")
    args = arguments(tmp_path, max_grad_norm=0.0)
    if when == "before":
        caught.append(copied(callback))
    Trainer(encoder(), args, train_dataset=examples(), callbacks=[callback, Copier()]).train()
    if when == "after":
        caught.append(copied(callback))
    (other,) = caught
    assert (other.last_clip is None) == (when == "before")
    trainer = Trainer(encoder(), args, train_dataset=examples(), callbacks=[other])
    trainer.train()
    expected = plain_loop(encoder(), lambda model: fused_component_clip_(model, 0.05))
    torch.testing.assert_close(list(trainer.model.parameters()), list(expected.parameters()))
    assert same_bits(other.last_clip.norms, callback.last_clip.norms)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copied_callback_has_a_threshold_of_its_own(tmp_path, copied):
    caps, own = POLICIES["EMA"](), POLICIES["EMA"]()
    callback = ComponentClipCallback(caps)
    args = arguments(tmp_path, max_grad_norm=0.0)
    Trainer(encoder(), args, train_dataset=examples(), callbacks=[callback]).train()
    own.load_state_dict(caps.state_dict())
    other = copied(callback)
    expected = plain_loop(encoder(), lambda model: fused_component_clip_(model, own))
    learnt = copy.deepcopy(caps.state_dict())
    trainer = Trainer(encoder(), args, train_dataset=examples(), callbacks=[other])
    trainer.train()
    torch.testing.assert_close(list(trainer.model.parameters()), list(expected.parameters()))
    assert caps.state_dict()["host"] == learnt["host"]
    assert all(same_bits(caps.state_dict()["tensors"][name], t) for name, t in learnt["tensors"].items())


# ------------------------------------------------------------------------------------------------------------
# Clipped by two
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("caps", [0.05, thresholds.EMA()])
def test_an_attached_clipper_is_refused(tmp_path, way, caps):
    model = encoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = ComponentClipper(model, 0.05).attach(optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = trainer_of(way, tmp_path, caps, model, optimizers=(optimizer, scheduler))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"optimizer: a clipper is attached to .*call remove\(\) on what attach"):
        trainer.train()
    assert all(map(same_bits, before, model.parameters()))
    handle.remove()
    trainer.train()


@pytest.mark.parametrize("way", WAYS)
def test_a_scaler_that_clips_is_refused(tmp_path, monkeypatch, way):
    model = encoder()
    trainer = with_scaler(trainer_of(way, tmp_path, 0.05, model), monkeypatch)
    scaler = ComponentClipGradScaler(ComponentClipper(model, 0.05), "cpu", 1024.0)
    monkeypatch.setattr(trainer.accelerator, "scaler", scaler)
    with pytest.raises(RuntimeError, match="scaler: a ComponentClipGradScaler clips when it unscales"):
        trainer.train()


@pytest.mark.parametrize("way", WAYS)
def test_gradients_that_the_backward_pass_clips_are_refused(tmp_path, way):
    model = encoder()
    handle = clip_in_backward(model, 0.05)
    with pytest.raises(RuntimeError, match=r"is clipped in the backward pass already \(clip_in_backward\)"):
        trainer_of(way, tmp_path, 0.05, model).train()
    handle.remove()
