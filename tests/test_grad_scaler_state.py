"""``ComponentClipGradScaler`` beside other clippers, over skipped steps, copied, pickled and saved."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim import SGD

from cwclip_kernels import ComponentClipGradScaler, ComponentClipper, thresholds
from helpers import DEVICE, grads_of, parameter, random_grad, same_bits
from stand_ins import InBackward, Lookahead

CAP = 0.05
OPTIONS = {"device": DEVICE, "init_scale": 2.0**10}


def sgd(params, lr=0.0):
    return SGD(params, lr=lr)


def scaler_of(clipper, **more):
    return ComponentClipGradScaler(clipper, **OPTIONS, **more)


def give_gradients(scaler, params, bad=()):
    """Gradients as of a scaled loss, each larger than the cap; of some components inf."""
    scale = scaler.scale(torch.ones((), device=DEVICE))
    for p in params:
        p.grad = random_grad(p.shape) * scale
        if any(p is b for b in bad):
            p.grad.view(-1)[0] = math.inf


@pytest.fixture
def params():
    return [parameter(None, (4,)), parameter(None, (3, 2))]


# ------------------------------------------------------------------------------------------------------------
# Clipped elsewhere as well
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("call", ["unscale_", "step", "step after unscale_"])
@pytest.mark.parametrize("where", ["attached", "attached inside", "in backward"])
def test_what_is_clipped_elsewhere_is_refused(where, call, enabled, params):
    base = sgd(params)
    optimizer = Lookahead(base) if where == "attached inside" else base
    scaler = scaler_of(ComponentClipper(params, CAP), enabled=enabled)
    give_gradients(scaler, params)
    if call == "step after unscale_":
        scaler.unscale_(optimizer)
    if where == "in backward":
        for p in params:
            p.register_post_accumulate_grad_hook(InBackward())
    else:
        ComponentClipper(params, CAP).attach(base)
    before = grads_of(params)
    message = (
        r"clip_in_backward.* remove\(\)" if where == "in backward" else r"optimizer: .* clips '0' as well; remove"
    )
    with pytest.raises(RuntimeError, match=message):
        getattr(scaler, call.split()[0])(optimizer)
    assert all(same_bits(p.grad, b) for p, b in zip(params, before, strict=True))


def test_a_clipper_attached_for_other_parameters_is_none_of_its_business(params):
    optimizer = sgd(params)
    handle = ComponentClipper(params[1:], 2 * CAP).attach(optimizer)
    scaler = scaler_of(ComponentClipper(params[:1], CAP))
    give_gradients(scaler, params)
    scaler.step(optimizer)
    scaler.update()
    assert [p.grad.norm().item() for p in params] == pytest.approx([CAP, 2 * CAP], rel=1e-4)
    assert handle.last is not None


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("by_name", [False, True])
def test_a_closure_is_refused_before_anything_is_changed(by_name, enabled, params):
    optimizer = sgd(params)
    scaler = scaler_of(ComponentClipper(params, CAP), enabled=enabled)
    give_gradients(scaler, params)
    before = grads_of(params)
    args, kwargs = ((), {"closure": lambda: 0.0}) if by_name else ((lambda: 0.0,), {})
    with pytest.raises(RuntimeError, match="a closure's gradients can't be clipped here"):
        scaler.step(optimizer, *args, **kwargs)
    assert all(same_bits(p.grad, b) for p, b in zip(params, before, strict=True))
    # None is none; Accelerate hands one on.
    args, kwargs = ((), {"closure": None}) if by_name else ((None,), {})
    scaler.step(optimizer, *args, **kwargs)
    assert all(p.grad.norm().item() == pytest.approx(CAP, rel=1e-4) for p in params)


# ------------------------------------------------------------------------------------------------------------
# Steps that aren't taken
# ------------------------------------------------------------------------------------------------------------

THRESHOLDS = {
    "EMA": lambda: thresholds.EMA(warmup_steps=0),
    "EMA in warm-up": lambda: thresholds.EMA(warmup_steps=9),
    "ZScore": lambda: thresholds.ZScore(warmup_steps=2),
    "Percentile": lambda: thresholds.Percentile(50.0),
    "Schedule": lambda: thresholds.Schedule(lambda step: 1.0 / (1 + step)),
}


def state_of(clipper):
    state = clipper.max_norm.state_dict()
    return {**state["tensors"], **{name: torch.tensor(float(n)) for name, n in state["host"].items()}}


def run(kind, way, bad_at):
    """What a threshold has learnt after five iterations of two optimizers, and the caps of each clip.

    Args:
        kind: of the threshold.
        way: how it gets to clip.
        bad_at: {iteration: which of the two optimizers have a gradient that isn't finite}.
    """
    torch.manual_seed(3)
    params = [parameter(None, (4,)), parameter(None, (3, 2)), parameter(None, (5,))]
    clipper, caps = ComponentClipper(params, THRESHOLDS[kind]()), []

    def seen(result):
        caps.append(result.caps.clone())

    optimizers = [sgd(params[:2]), sgd(params[2:])]
    if way == "attach":
        scaler = GradScaler(**OPTIONS)
        for optimizer in optimizers:
            clipper.attach(optimizer, on_clip=seen)
    else:
        scaler = scaler_of(clipper, on_clip=seen)
    for iteration in range(5):
        give_gradients(scaler, params, [params[2 * i] for i in bad_at.get(iteration, ())])
        if way != "scaler":
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
    return state_of(clipper), caps


BAD = {"none": {}, "one": {1: (0,)}, "the other": {2: (1,)}, "both": {1: (0, 1)}, "by turns": {0: (1,), 3: (0,)}}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("way", ["scaler", "scaler, unscale_ first"])
@pytest.mark.parametrize("kind", THRESHOLDS)
def test_thresholds_learn_what_they_do_under_attach(kind, way, bad):
    """Where a hook that isn't called at a skipped step learns nothing, though other components' norms were finite."""
    if way != "scaler" and kind == "EMA in warm-up":
        way = "scaler"  # its steps are calls, and here both are clipped before either has counted
    expected, their_caps = run(kind, "attach", BAD[bad])
    found, our_caps = run(kind, way, BAD[bad])
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=0.0)
    assert len(our_caps) == 10  # it clips at a skipped step, and tells it, all the same
    assert len(their_caps) == 10 - sum(map(len, BAD[bad].values()))


@pytest.mark.parametrize("kind", THRESHOLDS)
def test_a_step_that_is_never_asked_for_teaches_nothing_either(kind, params):
    clipper = ComponentClipper(params, THRESHOLDS[kind]())
    scaler, optimizer = scaler_of(clipper), sgd(params)
    for _ in range(3):
        give_gradients(scaler, params)
        scaler.step(optimizer)
        scaler.update()
    before = state_of(clipper)
    for _ in range(2):
        give_gradients(scaler, params)
        scaler.unscale_(optimizer)
        scaler.update()
    assert all(same_bits(tensor, before[name]) for name, tensor in state_of(clipper).items())
    give_gradients(scaler, params)
    scaler.step(optimizer)
    assert not all(same_bits(tensor, before[name]) for name, tensor in state_of(clipper).items())


@pytest.mark.parametrize("way", ["attach", "scaler"])
def test_fused_optimizers_decide_on_the_device_and_the_step_counts(way, params):
    """The host isn't told, under either; as the docs say."""
    clipper = ComponentClipper(params, thresholds.Schedule(lambda step: 1.0))
    optimizer = torch.optim.AdamW(params, fused=True)
    scaler = scaler_of(clipper) if way == "scaler" else GradScaler(**OPTIONS)
    if way == "attach":
        clipper.attach(optimizer)
    for bad in ((), params[:1], ()):
        give_gradients(scaler, params, bad)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert clipper.max_norm.state_dict()["host"] == {"step": 3}


@pytest.mark.parametrize("with_update", [False, True])
def test_disabled_an_unscale_without_a_step_does_not_leave_the_next_gradient_unclipped(with_update, params):
    scaler, optimizer = scaler_of(ComponentClipper(params, CAP), enabled=False), sgd(params)
    give_gradients(scaler, params)
    scaler.unscale_(optimizer)  # and then the loop goes on without a step
    if with_update:
        scaler.update()
    give_gradients(scaler, params)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert all(p.grad.norm().item() == pytest.approx(CAP, rel=1e-4) for p in params)


def test_disabled_another_optimizer_in_the_same_place_is_clipped(params):
    """What is remembered of an optimizer isn't its address alone."""
    scaler = scaler_of(ComponentClipper(params, CAP), enabled=False)
    optimizer = sgd(params)
    scaler.unscale_(optimizer)
    old = id(optimizer)
    del optimizer
    optimizer = sgd(params)
    for _ in range(100):
        if id(optimizer) == old:
            break
        optimizer = sgd(params)
    give_gradients(scaler, params)
    scaler.step(optimizer)
    assert all(p.grad.norm().item() == pytest.approx(CAP, rel=1e-4) for p in params)


# ------------------------------------------------------------------------------------------------------------
# Nothing to clip
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("enabled", [False, True])
def test_a_clipper_of_another_model_is_told(enabled, params):
    clipper = ComponentClipper([nn.Parameter(torch.zeros_like(p)) for p in params], CAP)
    scaler, optimizer = scaler_of(clipper, enabled=enabled), sgd(params)

    def steps(count):
        for _ in range(count):
            give_gradients(scaler, params)
            scaler.step(optimizer)
            scaler.update()

    steps(127)
    with pytest.warns(UserWarning, match="has clipped nothing in 128 steps: .* own none of the clipper's parameters"):
        steps(1)
    steps(130)  # once is enough


def test_an_optimizer_of_a_gan_that_is_not_clipped_is_not_told(params):
    scaler = scaler_of(ComponentClipper(params[:1], CAP))
    generator, critic = sgd(params[:1]), sgd(params[1:])
    for optimizer in [critic] * 100 + [generator] + [critic] * 200:
        give_gradients(scaler, params)
        scaler.step(optimizer)
        scaler.update()
    assert params[0].grad.norm() > CAP  # it was the other's turn
    assert scaler.last.clipped.all()


# ------------------------------------------------------------------------------------------------------------
# Copies and checkpoints
# ------------------------------------------------------------------------------------------------------------

MOMENTS = ["at first", "after backward", "after unscale_", "after step", "after update"]


def up_to(moment, scaler, optimizer, params):
    """An iteration, as far as that."""
    steps = MOMENTS.index(moment)
    if steps > 0:
        give_gradients(scaler, params)
    for call in (lambda: scaler.unscale_(optimizer), lambda: scaler.step(optimizer), scaler.update)[
        : max(0, steps - 1)
    ]:
        call()


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy], ids=lambda how: how.__name__)
@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_copy_clips_what_the_original_does_or_is_refused_where_torch_refuses_it(moment, enabled, how, params):
    optimizer, seen = sgd(params), []
    theirs, ours = GradScaler(**OPTIONS, enabled=enabled), scaler_of(ComponentClipper(params, CAP), enabled=enabled)
    ours._on_clip = seen.append
    up_to(moment, theirs, optimizer, params)
    try:
        expected = how(theirs)
    except AssertionError:
        expected = None
    if moment == "after unscale_" and not enabled:
        expected = None  # ours still has something to remember there
    up_to(moment, ours, optimizer, params)
    if expected is None:
        with pytest.raises((AssertionError, RuntimeError), match=r"may only be pickled at|can't be copied between"):
            how(ours)
        return
    copied = how(ours)
    assert copied.state_dict() == expected.state_dict() == ours.state_dict()
    assert (copied.last is None) == (ours.last is None)
    for scaler in (copied, ours, copied):
        seen.clear()
        give_gradients(scaler, params)
        scaler.step(optimizer)
        scaler.update()
        assert all(p.grad.norm().item() == pytest.approx(CAP, rel=1e-4) for p in params)
        assert len(seen) == 1
        assert scaler.last is seen[0]


@pytest.mark.parametrize("deep", [False, True])
def test_copies_share_thresholds_or_do_not(deep, params):
    clipper = ComponentClipper(params, thresholds.ZScore(warmup_steps=1))
    scaler, optimizer = scaler_of(clipper), sgd(params)
    copied = copy.deepcopy(scaler) if deep else copy.copy(scaler)
    give_gradients(copied, params)
    copied.step(optimizer)
    assert state_of(clipper)["seen"].tolist() == [0.0 if deep else 1.0] * 2
    assert copied._parts._parts.keys() == {id(optimizer)}
    assert not scaler._parts._parts


def test_a_copy_together_with_the_model_clips_the_copied_model():
    model = nn.Linear(3, 2).to(DEVICE)
    holder = {"model": model, "scaler": scaler_of(ComponentClipper(model, CAP)), "optimizer": sgd(model.parameters())}
    up_to("after update", holder["scaler"], holder["optimizer"], list(model.parameters()))
    copied = copy.deepcopy(holder)
    twins = list(copied["model"].parameters())
    assert not set(map(id, twins)) & set(map(id, model.parameters()))
    give_gradients(copied["scaler"], twins)
    copied["scaler"].step(copied["optimizer"])
    assert all(p.grad.norm().item() == pytest.approx(CAP, rel=1e-4) for p in twins)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("enabled", [False, True])
def test_pickling_is_refused(enabled, moment, params, tmp_path):
    scaler = scaler_of(ComponentClipper(params, CAP), enabled=enabled)
    up_to(moment, scaler, sgd(params), params)
    for save in (pickle.dumps, lambda s: torch.save({"scaler": s}, tmp_path / "scaler.pt")):
        with pytest.raises(
            TypeError, match=r"can't be pickled, .* load_state_dict\(\) with this one's state_dict\(\)"
        ):
            save(scaler)


def test_checkpoints_go_both_ways_between_torchs_scaler_and_this(params):
    """So what thresholds have learnt isn't in them; it is in the clipper's."""
    scaler = scaler_of(ComponentClipper(params, thresholds.ZScore()), growth_interval=2)
    theirs = GradScaler(**OPTIONS, growth_interval=2)
    optimizer = sgd(params)
    for one in (scaler, theirs):
        for bad in ((), params[:1], (), (), ()):
            give_gradients(one, params, bad)
            one.step(optimizer)
            one.update()
    assert scaler.state_dict() == theirs.state_dict()
    for source, target in ((theirs, scaler_of(ComponentClipper(params, CAP))), (scaler, GradScaler(DEVICE))):
        target.load_state_dict(source.state_dict())
        assert target.state_dict() == source.state_dict()


@pytest.mark.parametrize("name", ["_unscale_grads_", "_maybe_opt_step"])
@pytest.mark.parametrize("missing", [False, True])
def test_another_torch_is_refused(name, missing, monkeypatch, params):
    if missing:
        monkeypatch.delattr(GradScaler, name)
    else:
        monkeypatch.setattr(GradScaler, name, lambda self, optimizer: {})
    with pytest.raises(RuntimeError, match=r"isn't made for the GradScaler of torch .* scaler.unscale_\(optimizer\)"):
        scaler_of(ComponentClipper(params, CAP))
