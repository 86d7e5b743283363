"""A ``ComponentClipper`` in place of parameters and options: its components, caps, options and state are used."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import cwclip_kernels
from cwclip_kernels import BackwardClipping, ComponentClipper, ComponentSpec, clip_in_backward, thresholds
from cwclip_kernels.in_backward import clipped_in_backward
from helpers import DEVICE, same_bits
from ranks import on_ranks
from tied_model import CAP, batch, loss_of, same_parameters, tied

OPTIONS = {
    "plain": lambda: {"max_norm": CAP},
    "positional": lambda: {"max_norm": CAP, "norm_type": 1.0, "eps": 1e-3},
    "slices": lambda: {"max_norm": {"*body*": CAP}, "components": ComponentSpec().unitwise("*.weight")},
    "nonfinite": lambda: {"max_norm": CAP, "nonfinite": "zero", "backend": "reference"},
    "schedule": lambda: {"max_norm": thresholds.Schedule(lambda step: CAP / (1 + step))},
    "parameters": lambda: {"max_norm": thresholds.ParamRelative(0.1)},
    "budget": lambda: {"max_norm": thresholds.FromGlobal(CAP)},
}


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_the_same_bits_as_from_parameters(options, stepped):
    model, made = tied(), OPTIONS[options]
    twin = copy.deepcopy(model)
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.1) if stepped else None for m in (model, twin))
    handle = clip_in_backward(ComponentClipper(model, **made()), optimizer=ours)
    expected = clip_in_backward(twin, **made(), optimizer=theirs)
    for _ in range(3):
        tokens = batch()
        for m in (model, twin):
            m.zero_grad()
            loss_of(m, tokens).backward()
        assert handle.last.names == expected.last.names
        for name in ("norms", "coefs", "caps"):
            assert same_bits(getattr(handle.last, name), getattr(expected.last, name)), name
        assert same_parameters(model, twin)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            assert p.grad is None or same_bits(p.grad, q.grad)


def test_state_is_shared():
    model = tied()
    clipper = ComponentClipper(model, thresholds.Schedule(lambda step: 1.0 / (1 + step)))
    with clip_in_backward(clipper) as handle:
        for _ in range(2):
            model.zero_grad()
            loss_of(model, batch()).backward()
        assert handle.state_dict() == clipper.state_dict() == {"max_norm": clipper.max_norm.state_dict()}
    loss_of(model, batch()).backward()
    assert clipper.clip_().caps.item() == pytest.approx(1 / 3)
    handle.load_state_dict({"max_norm": thresholds.Schedule(len).state_dict()})
    assert clipper.clip_().caps.item() == 1.0


def test_a_warm_up_by_the_clipper_goes_on_in_the_backward_pass():
    model = tied()
    twin = copy.deepcopy(model)
    clippers = [ComponentClipper(m, thresholds.EMA(warmup_steps=2, warmup_norm=0.5)) for m in (model, twin)]
    with pytest.raises(ValueError, match="EMA depends on all norms of a step.*until its warm-up is over"):
        clip_in_backward(clippers[0])
    for step in range(5):
        if step == 2:
            handle = clip_in_backward(clippers[0])
        tokens = batch()
        for m in (model, twin):
            m.zero_grad()
            loss_of(m, tokens).backward()
        wanted = clippers[1].clip_()
        found = clippers[0].clip_() if step < 2 else handle.last
        assert same_bits(found.coefs, wanted.coefs)
        assert same_bits(found.caps, wanted.caps)


def test_a_part_has_the_names_and_caps_of_the_whole():
    model = tied()
    clipper = ComponentClipper(model, {"body.*": CAP})
    handle = clip_in_backward(clipper.part(model.body.parameters()))
    assert not clipped_in_backward(model.embedding.weight)
    (loss_of(model, batch()) * 100).backward()
    assert handle.last.names == clipper.names
    is_body = [name.startswith("body.") for name in clipper.names]
    assert (handle.last.norms > 0).tolist() == handle.last.clipped.tolist() == is_body


@pytest.mark.parametrize("alive", [False, True])
def test_freezing_under_a_budget(alive):
    """Noticed before anything is clipped while the clipper is alive."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)).to(DEVICE)
    clipper = ComponentClipper(model, thresholds.FromGlobal(1.0))
    handle = clip_in_backward(clipper)
    if not alive:
        del clipper
    model[0].bias.requires_grad_(False)
    loss = (model(torch.ones(1, 3, device=DEVICE)) * 100).sum()
    if alive:
        with pytest.raises(RuntimeError, match="FromGlobal counted .*'0.bias' was trained, which is frozen now"):
            loss.backward()
    else:
        loss.backward()
    assert (handle.last is None) == alive


def test_neither_keeps_the_other_alive():
    model = tied()
    clipper = ComponentClipper(model, CAP)
    clip_in_backward(clipper)
    loss_of(model, batch()).backward()
    alive = weakref.ref(clipper), weakref.ref(model.embedding.weight)
    del clipper
    gc.collect()
    assert alive[0]() is None
    assert clipped_in_backward(model.embedding.weight)
    del model
    gc.collect()
    assert alive[1]() is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_norm", CAP),
        ("norm_type", 2.0),
        ("components", "parameter"),
        ("eps", 1e-6),
        ("nonfinite", "propagate"),
        ("backend", "reference"),
    ],
)
def test_its_own_options_are_refused_beside_it(name, value):
    model = tied()
    with pytest.raises(TypeError, match=f"^{name}: the ComponentClipper has its own"):
        clip_in_backward(ComponentClipper(model, CAP), **{name: value})
    assert not any(clipped_in_backward(p) for p in model.parameters())


def test_refusals():
    model = tied()
    for clipper, message in (
        (ComponentClipper(model, CAP, error_if_nonfinite=True), "nonfinite: 'error' would come when"),
        (ComponentClipper(model, CAP, nonfinite="error"), "nonfinite: 'error' would come when"),
        (ComponentClipper(model, CAP, components="module"), "'body.0' consists of several parameters"),
        (ComponentClipper(model, thresholds.Percentile()), "max_norm: Percentile depends on all norms"),
    ):
        with pytest.raises(ValueError, match=message):
            clip_in_backward(clipper)
    attached = ComponentClipper(model, CAP)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with attached.attach(optimizer), pytest.raises(ValueError, match="attached to it .* clips 'unused'"):
        clip_in_backward(attached, optimizer=optimizer)
    with pytest.raises(TypeError, match="max_norm: missing"):
        clip_in_backward(model)
    assert not any(clipped_in_backward(p) for p in model.parameters())
    with clip_in_backward(attached), pytest.raises(ValueError, match="clipped or stepped .* already"):
        clip_in_backward(attached)


@on_ranks(2)
@pytest.mark.parametrize("how", ["sharded", "process_group", "pp_mesh", "averaged"])
def test_a_clipper_of_several_ranks_is_refused(how):
    model = nn.Linear(4, 4)
    mesh = init_device_mesh("cpu", (2,))
    message = "adds up norms over ranks.*attach"
    if how == "sharded":
        from torch.distributed.tensor import Shard, distribute_tensor

        model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(0)]))
        clipper, message = ComponentClipper(model, CAP), "'weight' is a DTensor.*attach"
    elif how == "averaged":
        clipper, message = ComponentClipper(model, CAP), "in a DistributedDataParallel .*attach"
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert wrapped.module is model
    else:
        clipper = ComponentClipper(model, CAP, **{how: mesh})
    with pytest.raises(ValueError, match=message):
        clip_in_backward(clipper)
    assert not any(clipped_in_backward(p) for p in model.parameters())


def test_what_is_returned_can_be_imported():
    assert "BackwardClipping" in cwclip_kernels.__all__
    with clip_in_backward(tied(), CAP) as handle:
        assert type(handle) is BackwardClipping


def test_a_frozen_parameter_that_the_spec_does_not_fit():
    """Not clipped as a whole, in silence, when it is trained later."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).to(DEVICE)
    model[1].weight.requires_grad_(False)
    spec = ComponentSpec().split("*.weight", sizes=(1, 2), names=("a", "b"), dim=0)
    clip_in_backward(model, CAP, components=spec)
    model(torch.ones(1, 3, device=DEVICE)).sum().backward()
    model.zero_grad()
    model[1].weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"the gradient of '1.weight', which was frozen when .*"):
        model(torch.ones(1, 3, device=DEVICE)).sum().backward()
