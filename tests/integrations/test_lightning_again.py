"""In Lightning: a fit after a copy, a pickle, a second fit; steps that are skipped; what is clipped by two."""

import pickle
import weakref
from copy import deepcopy
from multiprocessing.reduction import ForkingPickler

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

pytest.importorskip("lightning")

from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision

from cwclip_kernels.integrations.lightning import ComponentClip
from lightning_models import (
    THEIRS,
    ByHook,
    Lit,
    Manual,
    adamw,
    fused,
    half_precision,
    plain_steps,
    same_parameters,
    sgd,
    trainer,
)
from small_transformer import Model, batches

pytestmark = [pytest.mark.filterwarnings(f"ignore:{text}") for text in THEIRS]


def pickled(thing):
    return pickle.loads(pickle.dumps(thing))


COPIES = [deepcopy, pickled]


def clipped(model, data, cap=0.1):
    """What a fit with this cap should come to."""
    plain = deepcopy(model)
    plain_steps(plain, data, lambda m: fused_component_clip_(m, cap))
    return plain


# ------------------------------------------------------------------------------------------------------------
# Copies and pickles
# ------------------------------------------------------------------------------------------------------------


class During(Callback):
    def __init__(self, clip, copied):
        self.clip, self.copied, self.caught = clip, copied, []

    def on_train_batch_end(self, *arguments):
        self.caught.append(self.copied(self.clip))


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("when", ["before", "during", "after"])
@pytest.mark.parametrize("log", [False, "components"])
def test_a_copied_callback_fits_another_module(copied, when, log):
    data, clip = batches(), ComponentClip(0.1, log=log)
    during = During(clip, copied if when == "during" else lambda clip: None)
    other = copied(clip) if when == "before" else None
    trainer(clip, during).fit(Lit(), data)
    if when == "during":
        other = during.caught[1]
    elif when == "after":
        other = copied(clip)
    assert other.clipper is None
    assert (other.last is None) == (when == "before")
    lit = Lit()
    expected = clipped(lit.model, data)
    trainer(other).fit(lit, data)
    assert same_parameters(lit.model, expected)
    assert clip.clipper.names == other.clipper.names
    assert clip.clipper.parameters[0] is not other.clipper.parameters[0]


@pytest.mark.parametrize("copied", COPIES)
def test_a_trainer_is_copied_after_a_fit_and_fits_again(copied):
    data = batches()
    first = trainer(ComponentClip(0.1), max_epochs=1)
    lit = Lit()
    first.fit(lit, data)
    second = copied(first)
    second.fit_loop.max_epochs = 2
    again = second.lightning_module
    assert again is not lit
    expected = clipped(again.model, data)
    second.fit(again, data)
    assert same_parameters(again.model, expected)


@pytest.mark.parametrize("copied", COPIES)
def test_a_module_that_clips_in_its_hook_is_copied(copied):
    data, lit = batches(), ByHook(0.1)
    trainer().fit(lit, data)
    other = copied(lit)
    other.clipped.clear()
    expected = clipped(other.model, data)
    trainer().fit(other, data)
    assert same_parameters(other.model, expected)
    assert len(other.clipped) == len(data)


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("when", ["before", "during", "after"])
@pytest.mark.parametrize("policy", ["Schedule", "EMA", "ZScore", "Percentile", "ParamRelative"])
def test_a_copied_callback_has_a_threshold_of_its_own(copied, when, policy):
    """That begins with what the original had learnt."""
    data, caps = batches(), POLICIES[policy]()
    clip = ComponentClip(caps)
    states = []

    class Copier(Callback):
        def on_train_batch_end(self, fit, module, outputs, batch, batch_idx):
            if batch_idx == 1 and when == "during":
                states.append((copied(clip), caps.state_dict()))

    if when == "before":
        states.append((copied(clip), caps.state_dict()))
    trainer(clip, Copier()).fit(Lit(), data)
    if when == "after":
        states.append((copied(clip), caps.state_dict()))
    ((other, state),) = states
    assert other.max_norm is not caps
    learnt = caps.state_dict()
    lit, own = Lit(), POLICIES[policy]()
    plain = deepcopy(lit.model)
    if when != "before":
        own.load_state_dict({**state, "components": None})
    trainer(other).fit(lit, data)
    plain_steps(plain, data, lambda m: fused_component_clip_(m, own))
    assert same_parameters(lit.model, plain)
    now = caps.state_dict()
    assert now["host"] == learnt["host"]
    assert all(same_bits(now["tensors"][name], learnt["tensors"][name]) for name in learnt["tensors"])


class Failing(Lit):
    def training_step(self, batch, batch_idx):
        if batch_idx == 2:
            raise ZeroDivisionError
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_the_trainer_is_held_after_a_fit(fails):
    clip, lit = ComponentClip(0.1, log=True), Failing() if fails else Lit()
    fit = trainer(clip)
    if fails:
        with pytest.raises(ZeroDivisionError):
            fit.fit(lit, batches())
    else:
        fit.fit(lit, batches())
    held, reached = [clip], []
    while held:  # all that can be reached from the callback, but for the module's own parameters
        thing = held.pop()
        if any(thing is r for r in reached) or isinstance(thing, torch.Tensor):
            continue
        reached.append(thing)
        assert thing is not fit
        assert not isinstance(thing, weakref.ref)
        if isinstance(thing, dict):
            held += [*thing, *thing.values()]
        elif isinstance(thing, list | tuple | set):
            held += thing
        elif type(thing).__module__.startswith("cwclip_kernels.integrations"):
            held += vars(thing).values()
    pickled(clip)


def test_what_ddp_spawn_sends_to_its_processes():
    """A Trainer that is to spawn, its module and its callback, all of which have been in fits before."""
    data, clip, lit = batches(), ComponentClip(0.1), Lit()
    for _ in range(2):
        trainer(clip).fit(lit, data)
        spawning = trainer(clip, strategy="ddp_spawn", devices=2)
        ForkingPickler.dumps((spawning, lit))


@pytest.mark.parametrize("policy", ["Schedule", "EMA"])
def test_a_callback_that_joins_in_the_middle_of_a_fit_clips(policy):
    caps = {"Schedule": thresholds.Schedule(cap_of), "EMA": thresholds.EMA(warmup_steps=1)}

    class Joins(Callback):
        def on_train_batch_end(self, fit, module, outputs, batch, batch_idx):
            if batch_idx == 1:
                fit.callbacks.append(ComponentClip(caps[policy]))

    lit, data = Lit(), batches(6)
    plain, own = deepcopy(lit.model), deepcopy(caps[policy])
    fit = trainer(Joins())
    fit.fit(lit, data)
    steps = iter(range(6))
    plain_steps(plain, data, lambda m: next(steps) > 1 and fused_component_clip_(m, own))
    assert same_parameters(lit.model, plain)
    assert same_state(caps[policy], own)


# ------------------------------------------------------------------------------------------------------------
# Steps that the loss scaler skips
# ------------------------------------------------------------------------------------------------------------


def cap_of(step):
    return 0.5 / (1 + step)


POLICIES = {
    "Schedule": lambda: thresholds.Schedule(cap_of),
    "EMA": lambda: thresholds.EMA(warmup_steps=2),
    "ZScore": lambda: thresholds.ZScore(warmup_steps=2, threshold=0.5),
    "Percentile": lambda: thresholds.Percentile(50.0),
    "ParamRelative": lambda: thresholds.ParamRelative(0.01),
}
LEARNING = [name for name in POLICIES if name != "ParamRelative"]


def same_state(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one["host"] == other["host"]
    assert set(one["tensors"]) == set(other["tensors"])
    return all(same_bits(one["tensors"][name], other["tensors"][name]) for name in one["tensors"])


OVERFLOWS = (0, 4)


def overflowing(model):
    """Some of its gradients are inf, in the first step of all and in a later one."""
    seen = []

    def hook(grad):
        seen.append(0)
        return torch.full_like(grad, torch.inf) if len(seen) - 1 in OVERFLOWS else grad

    model.head.bias.register_hook(hook)
    return model


@pytest.mark.parametrize("way", ["callback", "hook"])
@pytest.mark.parametrize("optimizer", [adamw, fused])
@pytest.mark.parametrize("policy", LEARNING)
def test_a_skipped_step_teaches_nothing(way, optimizer, policy):
    """As for a clipper that isn't called where no step is taken."""
    data, caps = batches(8), POLICIES[policy]()
    lit = Lit(Model().float(), optimizer)
    if way == "hook":
        model, lit = lit.model, ByHook(caps)
        lit.model, lit._optimizer = model, optimizer
    plain, own = overflowing(deepcopy(lit.model)), POLICIES[policy]()
    overflowing(lit.model)
    clip = ComponentClip(caps)
    trainer(*([clip] if way == "callback" else []), plugins=[half_precision()]).fit(lit, data)
    steps, scaler = optimizer(plain.parameters()), half_precision().scaler
    for i, tokens in enumerate(data):
        steps.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = plain(tokens).square().sum()
        scaler.scale(loss).backward()
        scaler.unscale_(steps)
        if i not in OVERFLOWS:
            fused_component_clip_(plain, own)
        scaler.step(steps)
        scaler.update()
    assert same_parameters(lit.model, plain)
    assert same_state(caps, own)
    if way == "hook":  # what happened is told as it was
        assert [bool(r.norms.isfinite().all()) for r in lit.clipped] == [i not in OVERFLOWS for i in range(8)]


# ------------------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "caps", [0.1, {"*": 0.1}, thresholds.Fixed(0.1), thresholds.FromGlobal(1.0), thresholds.ParamRelative()]
)
def test_caps_that_learn_nothing_have_no_state(caps):
    clip = ComponentClip(caps)
    trainer(clip).fit(Lit(), batches())
    assert clip.state_dict() == {}
    clip.load_state_dict({})
    clip.load_state_dict({"max_norm": thresholds.EMA().state_dict()})  # of a run that had others


@pytest.mark.parametrize("policy", LEARNING)
def test_state_goes_through_a_file(policy, tmp_path):
    clip, other = ComponentClip(POLICIES[policy]()), ComponentClip(POLICIES[policy]())
    trainer(clip).fit(Lit(), batches())
    torch.save(clip.state_dict(), tmp_path / "state")
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert same_state(other.max_norm, clip.max_norm)


# ------------------------------------------------------------------------------------------------------------
# Clipped by two
# ------------------------------------------------------------------------------------------------------------


def attached(parameters):
    parameters = list(parameters)
    optimizer = sgd(parameters)
    ComponentClipper(parameters, 0.1).attach(optimizer)
    return optimizer


@pytest.mark.parametrize("way", ["callback", "hook", "manual"])
def test_an_attached_clipper_is_refused(way):
    kind = {"callback": Lit, "manual": Manual}.get(way)
    lit = ByHook(0.1) if way == "hook" else kind(optimizer=attached)
    lit._optimizer = attached
    before = deepcopy(lit.model)
    with pytest.raises(RuntimeError, match=r"optimizer: a clipper is attached to SGD.* call remove\(\)"):
        trainer(*([] if way == "hook" else [ComponentClip(0.1)])).fit(lit, batches())
    assert same_parameters(lit.model, before)


def test_a_scaler_that_clips_is_refused():
    lit = Lit(Model().float(), adamw)
    scaler = ComponentClipGradScaler(ComponentClipper(lit, 0.1), "cpu", 1024.0)
    with pytest.raises(RuntimeError, match="scaler: a ComponentClipGradScaler clips when it unscales"):
        trainer(ComponentClip(0.1), plugins=[MixedPrecision("16-mixed", "cpu", scaler)]).fit(lit, batches())


def test_the_callback_and_the_hook_together_are_refused():
    with pytest.raises(RuntimeError, match="the Trainer has a ComponentClip, which would clip again"):
        trainer(ComponentClip(0.1)).fit(ByHook(0.1), batches())


@pytest.mark.parametrize("way", ["callback", "hook"])
def test_gradients_that_the_backward_pass_clips_are_refused(way):
    lit = Lit() if way == "callback" else ByHook(0.1)
    handle = clip_in_backward(lit, 0.1)
    with pytest.raises(RuntimeError, match=r"is clipped in the backward pass already \(clip_in_backward\)"):
        trainer(*([ComponentClip(0.1)] if way == "callback" else [])).fit(lit, batches())
    handle.remove()


def test_a_clipper_of_other_parameters_may_be_attached():
    """Each clips its own."""

    def optimizer(parameters):
        optimizer = sgd(parameters)
        ComponentClipper(lit.model.head, 0.1).attach(optimizer)
        return optimizer

    lit, data = Lit(optimizer=optimizer), batches()
    expected = clipped(lit.model, data)
    own = ComponentClip(0.1, components=lambda name, p: None if ".head." in name else name)
    trainer(own).fit(lit, data)
    assert same_parameters(lit.model, expected)
