"""``ComponentClipAdamW`` when something is changed between steps, or is wrong: all is stepped, or nothing."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from cwclip_kernels import thresholds
from cwclip_kernels.optim import ComponentClipAdamW
from helpers import DEVICE, same_bits
from stepping import give_gradients, run, states_of, twins

SHAPES = [(9,), (50, 7), (6,)]
LR, CAP = 1e-2, 0.05


class Failing(thresholds.Threshold):
    """A cap of 1, until it fails."""

    fails = False

    def caps(self, device, norms):
        if self.fails:
            raise RuntimeError("no cap today")
        return torch.ones((), dtype=torch.float64, device=device)


def spoil_number(group):
    group["max_norm"] = -1.0


def spoil_threshold(group):
    group["max_norm"].fails = True


@pytest.mark.parametrize(
    ("cap", "spoil", "error"),
    [(7.0, spoil_number, ValueError), (Failing(), spoil_threshold, RuntimeError)],
    ids=["number", "threshold"],
)
def test_a_wrong_cap_of_the_second_group_leaves_the_first(cap, spoil, error):
    params, _ = twins(SHAPES)
    optimizer = ComponentClipAdamW([{"params": params[:1]}, {"params": params[1:], "max_norm": cap}], max_norm=CAP)
    run(1, (params, optimizer.step))
    before = [p.detach().clone() for p in params]
    spoil(optimizer.param_groups[1])
    give_gradients(params)
    with pytest.raises(error):
        optimizer.step()
    assert all(map(same_bits, params, before))
    assert {state["step"].item() for state in optimizer.state.values()} == {1}


@pytest.mark.parametrize("wrong", [{"max_norm": -1.0}, {"max_norm": {"x.*": 1.0}}], ids=str)
def test_a_group_that_is_refused_is_not_added(wrong):
    params, _ = twins(SHAPES)
    optimizer = ComponentClipAdamW(params[:2], max_norm=CAP)
    with pytest.raises(ValueError, match="max_norm"):
        optimizer.add_param_group({"params": params[2:], **wrong})
    assert len(optimizer.param_groups) == 1
    run(1, (params, optimizer.step))  # goes on
    assert optimizer.last.names == ("0", "1")


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_parameter_given_twice():
    p = nn.Parameter(torch.ones(3, device=DEVICE))
    with pytest.raises(ValueError, match="given more than once"):
        ComponentClipAdamW([p, p], max_norm=CAP)


def test_a_state_that_was_emptied_begins_anew():
    ours, theirs = twins(SHAPES)
    optimizer, plain = ComponentClipAdamW(ours, lr=LR, max_norm=math.inf), AdamW(theirs, lr=LR)
    run(2, (ours, optimizer.step), (theirs, plain.step))
    optimizer.state[ours[1]].clear()
    plain.state[theirs[1]].clear()
    run(1, (ours, optimizer.step), (theirs, plain.step))
    assert [optimizer.state[p]["step"].item() for p in ours] == [3, 1, 3]
    expected = [state.to(DEVICE) for state in states_of(plain, theirs)]  # torch counts steps on the CPU
    torch.testing.assert_close(states_of(optimizer, ours), expected)


def test_a_conjugated_parameter_is_refused():
    values = torch.randn(9, dtype=torch.complex64, device=DEVICE)
    params = [nn.Parameter(values.clone()), nn.Parameter(values.clone().conj())]
    optimizer = ComponentClipAdamW(params, max_norm=CAP)
    for p in params:
        p.grad = torch.ones_like(values)
    with pytest.raises(RuntimeError, match="lazily conjugated"):
        optimizer.step()
    assert torch.equal(params[0], values)


# ------------------------------------------------------------------------------------------------------------
# Hooks of checkpoints
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [None, torch.float32])
def test_a_hook_may_change_what_is_loaded(kept):
    """As where a checkpoint has more parameters, in another order."""
    params, others = twins(SHAPES, torch.bfloat16)
    optimizer = ComponentClipAdamW(params, max_norm=CAP, state_dtype=kept)
    run(1, (params, optimizer.step))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"] = {0: {"step": torch.ones(())}, **{3 - i: state for i, state in saved["state"].items()}}
    saved["param_groups"][0]["params"] = [0, 1, 2, 3]

    def in_our_order(_, state_dict):
        (group,) = state_dict["param_groups"]
        states = {i: state_dict["state"][3 - i] for i in range(3)}
        return {"state": states, "param_groups": [{**group, "params": [0, 1, 2]}]}

    other = ComponentClipAdamW(others, max_norm=CAP, state_dtype=kept)
    other.register_load_state_dict_pre_hook(in_our_order)
    other.load_state_dict(saved)
    assert all(map(same_bits, states_of(other, others), states_of(optimizer, params)))


def test_hooks_see_the_loaded_optimizer_and_the_saved_state():
    params, _ = twins(SHAPES)
    optimizer = ComponentClipAdamW(params, max_norm=thresholds.EMA(warmup_steps=0))
    run(1, (params, optimizer.step))
    seen = []
    optimizer.register_load_state_dict_post_hook(lambda loaded: seen.append(loaded.param_groups[0]["max_norm"]))
    optimizer.register_state_dict_post_hook(lambda _, state: {"inside": state})
    inside = optimizer.state_dict()["inside"]
    assert "max_norm" not in inside["param_groups"][0]
    assert len(inside["clipping"]) == 1
    optimizer.load_state_dict(inside)
    assert seen == [optimizer.param_groups[0]["max_norm"]]
