"""``ComponentClipAdamW`` where ``torch.optim.AdamW`` stood: checkpoints, groups, hooks, schedulers, scalers."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim import AdamW

from cwclip_kernels import ComponentClipper, thresholds
from cwclip_kernels.optim import ComponentClipAdamW
from cwclip_kernels.telemetry import ClipRecorder, read_run
from helpers import DEVICE, FUSED, same_bits
from stepping import assert_stepped_alike, give_gradients, named, run, states_of, twins

SHAPES = [(9,), (50, 7), (6,)]
LR, CAP = 1e-2, 0.05


def same_states(a, a_params, b, b_params):
    return all(map(same_bits, states_of(a, a_params), states_of(b, b_params)))


# ------------------------------------------------------------------------------------------------------------
# Checkpoints and copies
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_checkpoints_go_both_ways_bit_for_bit(amsgrad, fused):
    ours, theirs = twins(SHAPES)
    optimizer = ComponentClipAdamW(ours, lr=LR, max_norm=CAP, amsgrad=amsgrad, fused=fused)
    plain = AdamW(theirs, lr=LR, amsgrad=amsgrad, fused=fused)
    run(3, (ours, optimizer.step), (theirs, plain.step))
    here, there = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(plain.state_dict())
    assert here["param_groups"] == there["param_groups"]
    assert here.keys() == there.keys()
    optimizer.load_state_dict(there)
    plain.load_state_dict(here)
    for optimizer_, params, state in ((optimizer, ours, there), (plain, theirs, here)):
        saved = [v for i in range(len(params)) for _, v in sorted(state["state"][i].items())]
        assert all(map(same_bits, states_of(optimizer_, params), saved))
    assert [group["max_norm"] for group in optimizer.param_groups] == [CAP]


def test_checkpoints_load_with_weights_only():
    params, _ = twins(SHAPES)
    optimizer = ComponentClipAdamW(named(params), max_norm=thresholds.EMA(warmup_steps=0))
    run(2, (params, optimizer.step))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = ComponentClipAdamW(named(params), max_norm=thresholds.EMA(warmup_steps=0))
    other.load_state_dict(torch.load(file, weights_only=True))
    give_gradients(params)
    expected = optimizer.param_groups[0]["max_norm"].state_dict()
    actual = other.param_groups[0]["max_norm"].state_dict()
    assert actual["components"] == expected["components"]
    assert all(map(torch.equal, actual["tensors"].values(), expected["tensors"].values()))


def test_training_goes_on_from_a_checkpoint_to_the_same_bits():
    ours, theirs = twins(SHAPES)
    caps = [thresholds.EMA(warmup_steps=1, warmup_norm=0.1) for _ in range(2)]
    first = ComponentClipAdamW(ours, lr=LR, max_norm=caps[0])
    run(3, (ours, first.step))
    second = ComponentClipAdamW(theirs, lr=LR, max_norm=caps[1])
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # loading shares tensors, as torch does
    with torch.no_grad():
        for a, b in zip(theirs, ours, strict=True):
            a.copy_(b)
    run(3, (ours, first.step), (theirs, second.step))
    assert all(map(same_bits, ours, theirs))


def test_a_checkpoint_of_other_thresholds_is_refused():
    params, _ = twins(SHAPES)
    learning = ComponentClipAdamW(params, max_norm=thresholds.EMA(warmup_steps=0))
    run(1, (params, learning.step))
    other = ComponentClipAdamW(params, max_norm=CAP)
    with pytest.raises(ValueError, match="1 thresholds as max_norm"):
        other.load_state_dict(learning.state_dict())


def test_a_checkpoint_without_what_thresholds_have_learnt_is_no_secret():
    params, _ = twins(SHAPES)
    plain = AdamW(params)
    run(1, (params, plain.step))
    for cap in (CAP, thresholds.ParamRelative()):  # which learn nothing
        ComponentClipAdamW(params, max_norm=cap).load_state_dict(plain.state_dict())
    with pytest.warns(UserWarning, match="EMA goes on from what it has learnt here"):
        ComponentClipAdamW(params, max_norm=thresholds.EMA()).load_state_dict(plain.state_dict())


@pytest.mark.parametrize("kept", [None, torch.float32])
def test_the_running_means_of_halves_survive_a_checkpoint(kept):
    ours, theirs = twins(SHAPES, torch.bfloat16)
    first = ComponentClipAdamW(ours, max_norm=CAP, state_dtype=kept)
    run(2, (ours, first.step))
    second = ComponentClipAdamW(theirs, max_norm=CAP, state_dtype=kept)
    second.load_state_dict(first.state_dict())
    assert same_states(first, ours, second, theirs)


@pytest.mark.parametrize("copy_", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies(copy_):
    params, _ = twins(SHAPES)
    optimizer = ComponentClipAdamW(params, lr=LR, max_norm=CAP, named_parameters=named(params), components="layer")
    run(2, (params, optimizer.step))
    others, twin = copy_((params, optimizer))
    assert twin.param_groups[0]["params"][0] is others[0]
    assert twin.last is None
    run(2, (params, optimizer.step), (others, twin.step))
    assert all(map(same_bits, params, others))
    assert twin.last.names == optimizer.last.names == ("layers.0", "layers.1")


# ------------------------------------------------------------------------------------------------------------
# Param groups
# ------------------------------------------------------------------------------------------------------------


def test_groups_with_their_own_options_and_caps():
    ours, theirs = twins([(9,), (50, 7), (6,), (8, 8)])

    def groups(params, **more):
        return [
            {"params": params[:2], "lr": 0.1, "weight_decay": 0.0, **more},
            {"params": params[2:3], "betas": (0.8, 0.9), "amsgrad": True},
            {"params": params[3:], "maximize": True},
        ]

    optimizer = ComponentClipAdamW(groups(ours, max_norm=1e9), lr=LR, max_norm=CAP)
    clipper, plain = ComponentClipper(theirs[2:], CAP), AdamW(groups(theirs), lr=LR)

    def clip_and_step():
        clipper.clip_()
        plain.step()

    run(4, (ours, optimizer.step), (theirs, clip_and_step))
    assert_stepped_alike(ours[:2], theirs[:2], 4, 0.1)
    assert_stepped_alike(ours[2:], theirs[2:], 4, LR)
    assert optimizer.last.names == ("0", "1", "2", "3")
    assert optimizer.last.clipped.tolist() == [False, False, True, True]
    assert optimizer.last.caps.tolist() == [1e9, 1e9, CAP, CAP]


def test_one_component_may_span_groups_that_share_a_cap():
    ours, theirs = twins([(9, 9), (9,)])
    decay = [{"params": [(n, p)], "weight_decay": w} for (n, p), w in zip(named(ours), (0.1, 0.0), strict=True)]
    optimizer = ComponentClipAdamW(decay, lr=LR, max_norm=CAP, components="layer")
    clipper = ComponentClipper(named(theirs), CAP, components="layer")
    plain = AdamW([{"params": [theirs[0]], "weight_decay": 0.1}, {"params": [theirs[1]], "weight_decay": 0.0}], lr=LR)

    def clip_and_step():
        clipper.clip_()
        plain.step()

    run(3, (ours, optimizer.step), (theirs, clip_and_step))
    assert_stepped_alike(ours, theirs, 3, LR)
    assert optimizer.last.names == ("layers.0",)


def test_one_component_may_not_have_two_caps():
    ours, _ = twins([(9, 9), (9,)])
    groups = [{"params": [pair], "max_norm": cap} for pair, cap in zip(named(ours), (0.1, 0.2), strict=True)]
    with pytest.raises(ValueError, match=r"'layers.0' has parameters in param groups with different max_norm"):
        ComponentClipAdamW(groups, max_norm=CAP, components="layer")


def test_caps_can_be_changed_like_learning_rates():
    params, _ = twins(SHAPES)
    optimizer = ComponentClipAdamW([{"params": [p]} for p in params], max_norm=CAP)
    run(1, (params, optimizer.step))
    assert optimizer.last.caps.unique().tolist() == [CAP]
    optimizer.param_groups[1]["max_norm"] = 7.0
    run(1, (params, optimizer.step))
    assert sorted(optimizer.last.caps.tolist()) == [CAP, CAP, 7.0]


def test_a_group_that_comes_later():
    params, _ = twins(SHAPES)
    optimizer = ComponentClipAdamW(params[:1], max_norm=CAP)
    run(2, (params, optimizer.step))
    optimizer.add_param_group({"params": params[1:], "lr": 0.5})
    run(1, (params, optimizer.step))
    assert optimizer.last.names == ("0", "1", "2")
    assert [optimizer.state[p]["step"].item() for p in params] == [3, 1, 1]


def test_several_caps_and_an_error_leave_every_bit():
    params, before = twins(SHAPES)
    groups = [{"params": params[:1], "max_norm": 1.0}, {"params": params[1:]}]
    optimizer = ComponentClipAdamW(groups, max_norm=CAP, nonfinite="error")
    give_gradients(params)
    params[2].grad[0] = math.inf  # in the last of two calls
    with pytest.raises(RuntimeError, match="'2'"):
        optimizer.step()
    assert all(map(same_bits, params, before))


@pytest.mark.usefixtures("needs_extension")
def test_a_gradient_that_cant_be_stepped_in_the_second_group_leaves_the_first():
    params, before = twins(SHAPES)
    groups = [{"params": params[:1], "max_norm": 1.0}, {"params": params[1:]}]
    optimizer = ComponentClipAdamW(groups, max_norm=CAP, backend=FUSED[0])
    give_gradients(params)
    params[1].grad = params[1].grad.t().contiguous().t()
    with pytest.raises(RuntimeError, match="shapes and strides"):
        optimizer.step()
    assert all(map(same_bits, params, before))


# ------------------------------------------------------------------------------------------------------------
# Loops
# ------------------------------------------------------------------------------------------------------------


def test_learning_rates_of_schedulers_and_tensors():
    ours, theirs = twins(SHAPES)
    optimizer, plain = ComponentClipAdamW(ours, lr=LR, max_norm=math.inf), AdamW(theirs, lr=LR)
    both = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 5) for o in (optimizer, plain)]
    run(5, (ours, lambda: (optimizer.step(), both[0].step())), (theirs, lambda: (plain.step(), both[1].step())))
    assert_stepped_alike(ours, theirs, 5, LR)
    lr = torch.tensor(LR, device=DEVICE)
    optimizer, plain = ComponentClipAdamW(ours, lr=lr, max_norm=math.inf), AdamW(theirs, lr=LR)
    lr.fill_(0.1)
    plain.param_groups[0]["lr"] = 0.1
    run(2, (ours, optimizer.step), (theirs, plain.step))
    assert_stepped_alike(ours, theirs, 7, 0.1)


def test_closures_and_hooks():
    params, _ = twins(SHAPES)
    optimizer = ComponentClipAdamW(params, max_norm=CAP)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure():
        calls.append(torch.is_grad_enabled())
        give_gradients(params)
        return 3.5

    assert optimizer.step(closure) == 3.5
    assert calls == ["before", True, "after"]
    assert optimizer.last.clipped.all()


def test_results_are_recorded(tmp_path):
    params, _ = twins(SHAPES)
    optimizer = ComponentClipAdamW(named(params), max_norm=CAP)
    assert optimizer.last is None
    with ClipRecorder(tmp_path / "run") as recorder:
        run(2, (params, lambda: (optimizer.step(), recorder.record(optimizer.last))))
    assert read_run(tmp_path / "run.jsonl").norms.shape == (2, 3)


def test_parameters_outside_of_all_components_are_stepped_unclipped():
    ours, theirs = twins(SHAPES)
    optimizer = ComponentClipAdamW(ours, lr=LR, max_norm=CAP, components=lambda name, p: None)
    plain = AdamW(theirs, lr=LR)
    run(3, (ours, optimizer.step), (theirs, plain.step))
    assert_stepped_alike(ours, theirs, 3, LR)
    assert optimizer.last.names == ()


def test_a_first_step_without_gradients():
    params, before = twins(SHAPES)
    optimizer = ComponentClipAdamW(params, max_norm=CAP)
    optimizer.step()
    assert all(map(same_bits, params, before))
    assert optimizer.last.norms.tolist() == [0.0] * 3


# ------------------------------------------------------------------------------------------------------------
# GradScaler
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unscales", [False, True])
def test_under_a_grad_scaler(unscales):
    ours, theirs = twins(SHAPES)
    optimizer, plain = ComponentClipAdamW(ours, lr=LR, max_norm=CAP), AdamW(theirs, lr=LR)
    clipper = ComponentClipper(theirs, CAP)
    scalers = [GradScaler(DEVICE, init_scale=2.0**10) for _ in range(2)]
    for turn in range(4):
        give_gradients(ours, theirs)
        for params, own, scaler in ((ours, optimizer, scalers[0]), (theirs, plain, scalers[1])):
            scaler.scale(torch.ones((), device=DEVICE))
            for p in params:
                p.grad *= scaler.get_scale()
            if turn == 1:
                params[1].grad[0, 0] = math.inf
            before = [p.detach().clone() for p in params]
            if own is plain:
                scaler.unscale_(own)
                clipper.clip_()
            elif unscales:
                scaler.unscale_(own)
            scaler.step(own)
            scaler.update()
            assert all(map(same_bits, params, before)) == (turn == 1)
    assert scalers[0].get_scale() == scalers[1].get_scale() == 2.0**9
    assert_stepped_alike(ours, theirs, 4, LR)
    assert {s["step"].item() for s in optimizer.state.values()} == {3}


def test_for_a_scaler_inf_is_no_error_and_nothing_is_learnt_from_a_skipped_step():
    params, before = twins(SHAPES)
    cap = thresholds.EMA(warmup_steps=0)
    optimizer = ComponentClipAdamW(params, max_norm=cap, nonfinite="error")
    scaler = GradScaler(DEVICE)
    give_gradients(params)
    scaler.scale(torch.ones((), device=DEVICE))
    params[1].grad[0, 0] = math.nan
    state = cap.state_dict()["tensors"]
    scaler.step(optimizer)
    scaler.update()
    assert all(map(same_bits, params, before))
    after = cap.state_dict()["tensors"]
    assert all(torch.equal(after[name], state[name]) for name in state)


@pytest.mark.usefixtures("needs_extension")
def test_a_step_that_fails_under_a_scaler_leaves_no_scale_behind():
    params, before = twins(SHAPES)
    optimizer = ComponentClipAdamW(params, max_norm=math.inf, backend=FUSED[0])
    scaler = GradScaler(DEVICE, init_scale=8.0)
    scaler.scale(torch.ones((), device=DEVICE))
    give_gradients(params)
    plain = params[1].grad
    params[1].grad = plain.t().contiguous().t()  # another layout than its parameter's
    with pytest.raises(RuntimeError, match="shapes and strides"):
        scaler.step(optimizer)
    assert all(map(same_bits, params, before))
    params[1].grad = plain
    optimizer.step()
    torch.testing.assert_close(optimizer.last.norms[1], plain.norm())


# ------------------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"max_norm": -1.0}, ValueError, "max_norm"),
        ({"max_norm": "small"}, TypeError, "max_norm"),
        ({"max_norm": {"nothing": 1.0}}, ValueError, "nothing"),
        ({"nonfinite": "ignore"}, ValueError, "nonfinite"),
        ({"clip_eps": -1e-6}, ValueError, "eps"),
        ({"backend": "gpu"}, ValueError, "backend"),
        ({"components": "layer"}, ValueError, "needs names"),
        ({"correct_bias": 1}, TypeError, "correct_bias"),
        ({"state_dtype": torch.float16}, ValueError, "state_dtype"),
        ({"differentiable": True}, ValueError, "differentiable"),
        ({"lr": -1.0}, ValueError, "Invalid learning rate"),
        ({"foreach": True, "fused": True}, RuntimeError, "cannot be `True` together"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, error, says):
    with pytest.raises(error, match=says):
        ComponentClipAdamW([nn.Parameter(torch.ones(2))], **{"max_norm": CAP, **arguments})


def test_names_for_some_parameters_only():
    params, _ = twins(SHAPES)
    with pytest.raises(ValueError, match="named_parameters: has no name for 1 of the 3"):
        ComponentClipAdamW(params, max_norm=CAP, named_parameters=named(params)[:2])


def test_names_of_a_module_for_groups_without():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    decay, rest = ([p for p in model.parameters() if (p.ndim > 1) == wide] for wide in (True, False))
    groups = [{"params": decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = ComponentClipAdamW(groups, max_norm={"0*": 0.1}, components="module", named_parameters=model)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert optimizer.last.names == ("0", "1")
    assert optimizer.last.caps.tolist() == [0.1, math.inf]
