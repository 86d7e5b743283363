"""``clip_in_backward`` with an optimizer that clips: one pass over each gradient as it becomes final."""

import copy
import math

import pytest
import torch
from torch import nn

from cwclip_kernels import ComponentSpec, clip_in_backward, thresholds
from cwclip_kernels.optim import ComponentClipAdamW
from helpers import DEVICE, same_bits
from stepping import states_of

LR, CAP = 1e-2, 0.05


def models():
    made = [nn.Sequential(nn.Linear(7, 33), nn.Tanh(), nn.Linear(33, 5)).to(DEVICE) for _ in range(2)]
    made[1].load_state_dict(made[0].state_dict())
    return made


def backward(*models):
    x = torch.randn(4, 7, device=DEVICE)
    for model in models:
        model(x).square().sum().backward()


GROUPINGS = {
    "parameter": None,
    "rows": ComponentSpec().split("0.weight", 11),
    "biases alone": lambda name, p: None if p.ndim == 1 else name,
}


@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "maximize": True}, {"correct_bias": False}], ids=str)
@pytest.mark.parametrize("grouping", GROUPINGS.values(), ids=list(GROUPINGS))
def test_the_same_bits_as_after_the_backward_pass(grouping, options):
    early, late = models()
    made = [
        ComponentClipAdamW(model.named_parameters(), lr=LR, max_norm=CAP, components=grouping, **options)
        for model in (early, late)
    ]
    with clip_in_backward(optimizer=made[0]) as handle:
        for turn in range(5):
            backward(early, late)
            assert all(p.grad is None for p in early.parameters())
            made[1].step()
            made[1].zero_grad()
            for p, q in zip(early.parameters(), late.parameters(), strict=True):
                assert same_bits(p, q), turn
            assert handle.last is made[0].last
            assert handle.last.names == made[1].last.names
            assert same_bits(handle.last.norms, made[1].last.norms)
            assert same_bits(handle.last.coefs, made[1].last.coefs)
    pairs = zip(*(states_of(o, m.parameters()) for o, m in zip(made, (early, late), strict=True)), strict=True)
    assert all(same_bits(a, b) for a, b in pairs)
    backward(early)
    assert all(p.grad is not None for p in early.parameters())  # it has ended


def test_thresholds_and_learning_rates_go_on():
    early, late = models()
    made = [
        ComponentClipAdamW(model.named_parameters(), lr=LR, max_norm=thresholds.ParamRelative(0.01))
        for model in (early, late)
    ]
    with clip_in_backward(optimizer=made[0]):
        for turn in range(4):
            for optimizer in made:
                optimizer.param_groups[0]["lr"] = LR / (turn + 1)
            backward(early, late)
            made[1].step()
            made[1].zero_grad()
    assert all(map(same_bits, early.parameters(), late.parameters()))


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"max_norm": 1.0}, TypeError, "max_norm: the ComponentClipAdamW has its own"),
        ({"components": "layer"}, TypeError, "components: the ComponentClipAdamW has its own"),
        ({"parameters": [nn.Parameter(torch.ones(1))]}, TypeError, "parameters: the ComponentClipAdamW has its own"),
    ],
    ids=str,
)
def test_what_the_optimizer_has_cant_be_given(given, error, says):
    model, _ = models()
    with pytest.raises(error, match=says):
        clip_in_backward(optimizer=ComponentClipAdamW(model.parameters(), max_norm=CAP), **given)


def test_without_parameters_and_without_such_an_optimizer():
    model, _ = models()
    with pytest.raises(TypeError, match="parameters: missing"):
        clip_in_backward(max_norm=1.0, optimizer=torch.optim.AdamW(model.parameters()))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"components": "module"}, "consists of several parameters"),
        ({"nonfinite": "error"}, "'error' would come when others are clipped already"),
    ],
    ids=str,
)
def test_what_cant_be_done_in_the_backward_pass_is_refused(options, says):
    model, _ = models()
    optimizer = ComponentClipAdamW(model.named_parameters(), max_norm=CAP, **options)
    with pytest.raises(ValueError, match=says):
        clip_in_backward(optimizer=optimizer)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_several_caps_are_refused():
    model, _ = models()
    groups = [{"params": list(m.parameters()), "max_norm": cap} for m, cap in ((model[0], 1.0), (model[2], 2.0))]
    with pytest.raises(ValueError, match="different max_norm"):
        clip_in_backward(optimizer=ComponentClipAdamW(groups, max_norm=CAP))


def test_hooks_on_the_step_are_refused():
    model, _ = models()
    optimizer = ComponentClipAdamW(model.parameters(), max_norm=CAP)
    optimizer.register_step_post_hook(lambda *_: None)
    with pytest.raises(ValueError, match="hooks on its step"):
        clip_in_backward(optimizer=optimizer)


def test_nonfinite_stays_in_its_component():
    model, _ = models()
    optimizer = ComponentClipAdamW(model.named_parameters(), max_norm=CAP, nonfinite="zero")
    model[0].bias.register_hook(lambda grad: torch.full_like(grad, math.nan))
    with clip_in_backward(optimizer=optimizer) as handle:
        backward(model)
    assert all(p.isfinite().all() for p in model.parameters())
    assert handle.last.norms.isfinite().tolist() == [True, False, True, True]


@pytest.mark.filterwarnings("error:Detected call of")
@pytest.mark.parametrize("scheduled", ["before", "after"])
def test_learning_rate_schedulers(scheduled):
    """These replace the optimizer's step by one that counts calls."""
    early, late = models()
    made = [ComponentClipAdamW(model.parameters(), lr=LR, max_norm=CAP) for model in (early, late)]

    def schedule(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, 1)

    rates = [schedule(made[0])] if scheduled == "before" else []
    with clip_in_backward(optimizer=made[0]):
        rates += [schedule(made[0])] if scheduled == "after" else []
        rates.append(schedule(made[1]))
        for _ in range(3):
            backward(early, late)
            made[1].step()
            made[1].zero_grad()
            for rate in rates:
                rate.step()
    assert made[0].param_groups[0]["lr"] == made[1].param_groups[0]["lr"] == pytest.approx(LR * 1e-3)
    assert all(map(same_bits, early.parameters(), late.parameters()))


@pytest.mark.parametrize("cap", [7.0, torch.tensor(7.0, device=DEVICE), {"0.*": 7.0}, thresholds.ParamRelative(0.5)])
def test_caps_may_change_between_passes(cap):
    early, late = models()
    made = [ComponentClipAdamW(model.named_parameters(), lr=LR, max_norm=CAP) for model in (early, late)]
    with clip_in_backward(optimizer=made[0]) as handle:
        for turn in range(4):
            for optimizer in made:
                optimizer.param_groups[0]["max_norm"] = copy.deepcopy(cap) if turn in (1, 2) else CAP
            backward(early, late)
            made[1].step()
            made[1].zero_grad()
            assert same_bits(handle.last.caps.expand(4), made[1].last.caps.expand(4)), turn
    assert all(map(same_bits, early.parameters(), late.parameters()))


def test_groups_whose_caps_are_made_to_differ_are_refused_before_anything_changes():
    model, before = models()
    optimizer = ComponentClipAdamW([{"params": [p]} for p in model.parameters()], max_norm=CAP)
    with clip_in_backward(optimizer=optimizer):
        optimizer.param_groups[1]["max_norm"] = 7.0
        with pytest.raises(ValueError, match="have different max_norm now"):
            backward(model)
    assert all(map(same_bits, model.parameters(), before.parameters()))


def test_a_step_of_a_subclass_is_not_ignored():
    class Loud(ComponentClipAdamW):
        def step(self, closure=None):
            return super().step(closure)

    model, _ = models()
    with pytest.raises(ValueError, match="Loud has a step of its own"):
        clip_in_backward(optimizer=Loud(model.parameters(), max_norm=CAP))
