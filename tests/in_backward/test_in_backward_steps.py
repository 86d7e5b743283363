"""Stepping in the backward pass: right for every optimizer, or refused with the way out."""

import copy
import functools

import pytest
import torch
from torch import nn

from cwclip_kernels import ComponentClipper, clip_in_backward, fused_component_clip_
from helpers import DEVICE
from stand_ins import Lookahead, accelerated
from tied_model import CAP, batch, loss_of, same_parameters, tied

TORCHS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
}
ONE_BY_ONE = sorted(TORCHS.keys() - {"LBFGS"})


def twins(make=None):
    make = make or (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Linear(4, 3)))
    model = make().to(DEVICE)
    return model, copy.deepcopy(model)


def matrices():
    return nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 4, bias=False))


def sparse():
    return nn.Sequential(nn.Embedding(6, 5, sparse=True), nn.Embedding(6, 5, sparse=True))


def loss_on(model, x):
    if isinstance(model[0], nn.Embedding):
        return sum(part(x).square().sum() for part in model)
    return model(x).square().sum()


def inputs(model):
    if isinstance(model[0], nn.Embedding):
        return torch.tensor([1, 3, 3], device=DEVICE)
    return torch.randn(7, 6, device=DEVICE)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_each_of_torchs_own_steps_as_afterwards(name, flags):
    kind = TORCHS[name]
    model, twin = twins({"Muon": matrices, "SparseAdam": sparse}.get(name))

    def made(module):
        parts = list(module.children())
        groups = [{"params": parts[0].parameters(), "lr": 0.02}, {"params": nn.Sequential(*parts[1:]).parameters()}]
        return kind(groups, lr=0.01, **flags)

    try:
        ours, theirs = made(model), made(twin)
    except (TypeError, RuntimeError):
        pytest.skip(f"{name} takes no {flags}")
    clip_in_backward(model, CAP, optimizer=ours)
    for _ in range(4):
        x = inputs(model)
        before = [{**group, "params": None} for group in ours.param_groups]
        loss_on(model, x).backward()
        assert all(p.grad is None for p in model.parameters())
        # What is stepped is a copy of the group: an optimizer that wrote to it would be lost here.
        assert [{**group, "params": None} for group in ours.param_groups] == before
        loss_on(twin, x).backward()
        fused_component_clip_(twin, CAP)
        theirs.step()
        theirs.zero_grad()
        assert same_parameters(model, twin)
    for ours_group, theirs_group in zip(ours.param_groups, theirs.param_groups, strict=True):
        for group in (ours_group, theirs_group):
            group.pop("params")
        assert ours_group == theirs_group
    assert len(ours.state) == len(theirs.state)
    for state, expected in zip(ours.state.values(), reversed(theirs.state.values()), strict=True):
        assert state.keys() == expected.keys()


class CountsInGroup(torch.optim.SGD):
    """Like schedule-free optimizers and Prodigy: what it does depends on a count in its group."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            for p in group["params"]:
                if p.grad is not None:
                    p.data.add_(p.grad, alpha=-group["lr"] / group["k"])


class Disguised(torch.optim.SGD):
    @functools.wraps(torch.optim.SGD.step)
    def step(self, closure=None):
        return super().step(closure)


class OverridesWhatStepCalls(torch.optim.AdamW):
    def _init_group(self, group, *args, **kwargs):
        group["k"] = group.get("k", 0) + 1
        return super()._init_group(group, *args, **kwargs)


class Bare(torch.optim.Optimizer):
    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.add_(p.grad, alpha=-group["lr"])


class NeedsClosure(torch.optim.SGD):
    def step(self, closure):
        return super().step(closure)


NOT_TORCHS = (CountsInGroup, Disguised, OverridesWhatStepCalls, Bare)


@pytest.mark.parametrize("kind", NOT_TORCHS)
def test_others_are_refused_for_many_parameters(kind):
    model = tied()
    with pytest.raises(
        ValueError, match=rf"optimizer: .*{kind.__name__}\.\w+ is not torch.optim's own.*Optimizer\(\[p\].*attach"
    ):
        clip_in_backward(model, CAP, optimizer=kind(model.parameters(), lr=0.1))
    loss_of(model, batch()).backward()
    assert model.embedding.weight.grad.norm() > CAP * 1.001  # nothing was left behind


@pytest.mark.parametrize("kind", [*NOT_TORCHS, torch.optim.AdamW])
def test_one_optimizer_for_each_parameter(kind):
    model = tied()
    twin = copy.deepcopy(model)
    ours = {p: kind([p], lr=0.01) for name, p in model.named_parameters() if name not in ("unused", "frozen")}
    theirs = kind(twin.parameters(), lr=0.01)
    clip_in_backward(model, CAP, optimizer=ours)
    schedules = [torch.optim.lr_scheduler.StepLR(o, 2) for o in (*ours.values(), theirs)]
    for _ in range(4):
        tokens = batch()
        loss_of(model, tokens).backward()
        assert all(p.grad is None for p in model.parameters())
        loss_of(twin, tokens).backward()
        fused_component_clip_(twin, CAP)
        theirs.step()
        theirs.zero_grad()
        for schedule in schedules:
            schedule.step()
        assert same_parameters(model, twin)


def test_a_subclass_that_changes_nothing_of_the_step_is_torchs():
    class Named(torch.optim.AdamW):
        def __init__(self, params):
            super().__init__(params, lr=0.5)

        def zero_grad(self, set_to_none=True):
            super().zero_grad(set_to_none)

    model = tied()
    before = model.body[0].weight.detach().clone()
    clip_in_backward(model, CAP, optimizer=Named(model.parameters()))
    loss_of(model, batch()).backward()
    assert not torch.equal(model.body[0].weight, before)


def test_mappings_that_do_not_fit_are_refused():
    model = tied()
    weight, other = model.embedding.weight, model.body[0].weight
    sgd = torch.optim.SGD
    for mapping, error, message in (
        ({}, ValueError, "optimizer: a mapping of no parameter"),
        ({"embedding.weight": sgd([weight])}, TypeError, "keys of a mapping are parameters, not str"),
        ({weight: "sgd"}, TypeError, "expected a torch.optim.Optimizer for 'embedding.weight', not str"),
        ({weight: sgd([weight, other])}, ValueError, "'embedding.weight' must own that parameter and no other"),
        ({weight: sgd([{"params": [weight]}, {"params": [other]}])}, ValueError, "and no other"),
        ({weight: sgd([other])}, ValueError, "and no other"),
        ({nn.Parameter(torch.ones(2)): sgd([weight])}, ValueError, r"a key of shape \[2\] is none of the parameters"),
        ({weight: torch.optim.LBFGS([weight])}, ValueError, "LBFGS needs 'closure' at its step.*; .*attach"),
        ({weight: NeedsClosure([weight])}, ValueError, "NeedsClosure needs 'closure' at its step.*; .*attach"),
    ):
        with pytest.raises(error, match=message):
            clip_in_backward(model, CAP, optimizer=mapping)
    with pytest.raises(ValueError, match="NeedsClosure needs 'closure' at its step"):
        clip_in_backward(model, CAP, optimizer=NeedsClosure(model.parameters()))
    with pytest.raises(ValueError, match="optimizer: owns none of the parameters"):
        clip_in_backward(model, CAP, optimizer=sgd([nn.Parameter(torch.ones(2))]))
    optimizer = sgd([weight])
    handle = clip_in_backward(model, CAP, optimizer={weight: optimizer})
    optimizer.add_param_group({"params": [other]})
    with pytest.raises(
        RuntimeError, match="the one for 'embedding.weight' doesn't own that parameter alone any more"
    ):
        loss_of(model, batch()).backward()
    handle.remove()


class CountingList(list):
    read = 0

    def __iter__(self):
        for item in super().__iter__():
            CountingList.read += 1
            yield item


def test_work_grows_with_the_number_of_parameters_not_with_its_square():
    count = 40
    model = nn.ParameterList(torch.ones(2) for _ in range(count)).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["params"] = CountingList(optimizer.param_groups[0]["params"])
    clip_in_backward(model, CAP, optimizer=optimizer)
    CountingList.read = 0
    for _ in range(3):
        sum(p.sum() for p in model).backward()
    assert CountingList.read <= 3 * count
    assert all(p.grad is None for p in model)


def test_groups_that_change_after_set_up():
    model = tied()
    optimizer = torch.optim.SGD(model.body[0].parameters(), lr=0.1)
    clip_in_backward(model, CAP, optimizer=optimizer)
    loss_of(model, batch()).backward()
    assert model.body[0].weight.grad is None
    assert model.body[2].weight.grad is not None
    optimizer.zero_grad()
    model.zero_grad()
    optimizer.add_param_group({"params": model.body[2].parameters(), "lr": 1e-3})
    optimizer.load_state_dict(optimizer.state_dict())  # makes its groups anew
    before = model.body[2].weight.detach().clone()
    loss_of(model, batch()).backward()
    moved = (model.body[2].weight - before).norm().item()
    assert moved == pytest.approx(1e-3 * CAP, rel=1e-3)
    # In place, where the number of parameters stays.
    model.zero_grad()
    optimizer.param_groups[0]["params"][0] = model.embedding.weight
    loss_of(model, batch()).backward()
    assert model.body[0].weight.grad is not None
    assert model.body[2].weight.grad is None


def test_what_is_there_to_be_saved_is_that_of_a_usual_step():
    model = tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    clip_in_backward(model, CAP, optimizer=optimizer)
    loss_of(model, batch()).backward()
    state = copy.deepcopy(optimizer.state_dict())
    assert len(state["param_groups"][0]["params"]) == len(list(model.parameters()))
    assert {int(s["step"]) for s in state["state"].values()} == {1}
    loss_of(model, batch()).backward()
    optimizer.load_state_dict(state)
    loss_of(model, batch()).backward()
    assert {int(s["step"]) for s in optimizer.state_dict()["state"].values()} == {2}


def test_groups_are_put_back_when_a_step_fails():
    model = tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    clip_in_backward(model, CAP, optimizer=optimizer)
    groups = optimizer.param_groups
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(TypeError):
        loss_of(model, batch()).backward()
    assert optimizer.param_groups is groups
    assert len(groups[0]["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", ["pre hook", "post hook", "attached", "replaced"])
def test_what_would_happen_once_a_parameter_is_refused(what, when):
    model = tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calls = []

    def put():
        if what == "pre hook":
            optimizer.register_step_pre_hook(lambda *_: calls.append(1))
        elif what == "post hook":
            optimizer.register_step_post_hook(lambda *_: calls.append(1))
        elif what == "attached":
            ComponentClipper(model.body, CAP).attach(optimizer)
        else:
            optimizer.step = lambda: calls.append(1)

    def set_up():
        clip_in_backward(model, CAP, optimizer=optimizer)

    message = "optimizer: its step was replaced" if what == "replaced" else "optimizer: has hooks on its step"
    if what == "attached":
        message = (
            r"optimizer: a clipper that was attached to it \(ComponentClipper.attach\) clips '0.weight.*remove\(\)"
        )
    if when == "before":
        put()
        with pytest.raises(ValueError, match=message):
            set_up()
    else:
        set_up()
        try:
            put()
        except RuntimeError:  # refused at once
            return
        with pytest.raises(ValueError, match=message):
            loss_of(model, batch()).backward()
        assert all(p.grad is None or p.grad.norm() > CAP * 1.001 for p in model.parameters())  # not begun
    assert calls == []


def test_a_parameter_that_is_left_alone_is_stepped_unclipped():
    model, twin = twins()
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin))

    def components(name, p):
        return None if name.startswith("0.") else name

    handle = clip_in_backward(model, CAP, components=components, optimizer=ours)
    x = inputs(model)
    loss_on(model, x).backward()
    loss_on(twin, x).backward()
    fused_component_clip_(twin, CAP, components=components)
    theirs.step()
    assert same_parameters(model, twin)
    assert all(p.grad is None for p in model.parameters())
    assert not any(name.startswith("0.") for name in handle.last.names)


def test_a_scaled_loss_is_noticed_by_torchs_scaler():
    model = tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clip_in_backward(model, CAP, optimizer=optimizer)
    scaler = torch.amp.GradScaler(DEVICE)
    scaler.scale(loss_of(model, batch())).backward()
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        scaler.step(optimizer)


def test_attached_to_one_of_many():
    model = tied()
    ours = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}
    weight = model.body[0].weight
    attached = ComponentClipper(model, CAP).attach(ours[weight])
    with pytest.raises(ValueError, match=r"clipper that was attached to it .*attach\) clips 'body.0.weight' as well"):
        clip_in_backward(model, CAP, optimizer=ours)
    attached.remove()
    clip_in_backward(model, CAP, optimizer=ours)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize(
    ("wrapper", "inner"),
    [(accelerated, ".optimizer"), (lambda ps: Lookahead(torch.optim.SGD(ps, lr=0.1)), "._base_optimizer")],
)
def test_of_a_wrapper_the_one_inside_is_asked_for(wrapper, inner, many):
    p = torch.nn.Parameter(torch.ones(2, device=DEVICE))
    optimizer = wrapper([p])
    with pytest.raises(TypeError, match=rf"optimizer: .* wraps one; pass the optimizer inside: its {inner} \(SGD\)"):
        clip_in_backward([p], CAP, optimizer={p: optimizer} if many else optimizer)
