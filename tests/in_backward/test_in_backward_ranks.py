"""Clipping in the backward pass where another rank averages the gradients afterwards: refused, however given."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cwclip_kernels import clip_in_backward, fused_component_clip_
from helpers import same_bits
from ranks import on_ranks

CAP = 0.05


def made():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


def loss_of(model):
    # Other data on each rank.
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    return (model(torch.randn(3, 4, generator=generator)) * 100).square().sum()


def set_up(parameters, model, stepped):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return clip_in_backward(parameters, CAP, optimizer=optimizer if stepped else None)


def refused_at_set_up(parameters, model, stepped):
    with pytest.raises(ValueError, match=r"in a DistributedDataParallel the backward pass sees local .*attach"):
        set_up(parameters, model, stepped)


def refused_in_the_first_pass(run, model):
    """Before anything is clipped or stepped."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"in a DistributedDataParallel the backward pass sees local .*attach"):
        loss_of(run).backward()
    assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None or p.grad.norm() > 10 * CAP for p in model.parameters())


FORMS = {
    "ddp": lambda ddp: ddp,
    "module": lambda ddp: ddp.module,
    "parameters": lambda ddp: ddp.parameters(),
    "named": lambda ddp: list(ddp.module.named_parameters()),
    "a part": lambda ddp: ddp.module[2],
}


@on_ranks(2)
@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_wrapped_before(form, stepped):
    model = made()
    ddp = DistributedDataParallel(model)
    refused_at_set_up(FORMS[form](ddp), model, stepped)


@on_ranks(2)
@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}, {"static_graph": True}], ids=str)
@pytest.mark.parametrize("stepped", [False, True])
def test_wrapped_after_set_up(stepped, options):
    model = made()
    handle = set_up(model, model, stepped)
    ddp = DistributedDataParallel(model, **options)
    refused_in_the_first_pass(ddp, model)
    refused_in_the_first_pass(ddp, model)
    handle.remove()


@on_ranks(2)
@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}, {"static_graph": True}], ids=str)
@pytest.mark.parametrize("stepped", [False, True])
def test_wrapped_after_the_first_passes(stepped, options):
    model = made()
    seen = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    handle = clip_in_backward(model, CAP, optimizer=optimizer if stepped else None, on_clip=seen.append)
    for _ in range(3):
        loss_of(model).backward()
        optimizer.step()
        model.zero_grad()
    ddp = DistributedDataParallel(model, **options)
    refused_in_the_first_pass(ddp, model)
    assert len(seen) == 3
    handle.remove()


@on_ranks(2)
def test_looking_for_it_is_rare():
    from cwclip_kernels.in_backward import clipping as in_backward

    looks = []
    original = in_backward.are_averaged
    in_backward.are_averaged = lambda is_ours: looks.append(1) or original(is_ours)
    try:
        model = made()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        handle = clip_in_backward(model, CAP, optimizer=optimizer)
        for _ in range(10):
            loss_of(model).backward()
        handle.remove()
    finally:
        in_backward.are_averaged = original
    assert len(looks) <= 2


@on_ranks(2)
def test_found_though_the_collector_does_not_show_it():
    model = made()
    ddp = DistributedDataParallel(model)
    gc.freeze()
    try:
        handle = clip_in_backward(model, CAP)
        with pytest.raises(
            RuntimeError, match=r"was written to in the backward pass after it had been clipped.*attach"
        ):
            loss_of(ddp).backward()
        handle.remove()
    finally:
        gc.unfreeze()
        gc.collect()
        gc.freeze()


@on_ranks(2)
@pytest.mark.parametrize("when", ["before", "after"])
def test_replicate(when):
    from torch.distributed._composable.replicate import replicate

    model = made()
    if when == "after":
        handle = clip_in_backward(model, CAP)
    replicate(model)
    if when == "before":
        handle = clip_in_backward(model, CAP)  # it is wrapped in its first forward pass only
    refused_in_the_first_pass(model, model)
    handle.remove()


@on_ranks(2)
def test_what_it_leaves_alone_is_clipped():
    model = made()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["0.weight", "0.bias"])
    ddp = DistributedDataParallel(model)
    handle = clip_in_backward(model[0], CAP)
    twin = copy.deepcopy(model)
    loss_of(ddp).backward()
    loss_of(twin).backward()
    fused_component_clip_(twin[0], CAP)
    assert all(same_bits(p.grad, q.grad) for p, q in zip(model[0].parameters(), twin[0].parameters(), strict=True))
    handle.remove()


@on_ranks(2)
def test_other_models_of_the_process_do_not_count():
    other = DistributedDataParallel(made())
    gone = made()
    ddp = DistributedDataParallel(gone)
    ddp.itself = [ddp]  # a cycle, which the collector alone ends
    del ddp
    models = [made(), gone]
    for model in models:
        twin = copy.deepcopy(model)
        handle = clip_in_backward(model, CAP)
        for _ in range(2):
            for m in (model, twin):
                m.zero_grad()
                loss_of(m).backward()
            fused_component_clip_(twin, CAP)
            assert all(same_bits(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
        handle.remove()
    assert other.module is not None


class Sly:
    """A proxy whose class can't be asked for."""

    @property
    def __class__(self):
        raise ReferenceError("weakly-referenced object no longer exists")


@on_ranks(2)
def test_objects_that_do_not_like_to_be_looked_at():
    sly = Sly()
    handle = clip_in_backward(made(), CAP)
    handle.remove()
    assert type(sly) is Sly


def test_data_parallel_is_right():
    """It has the whole gradient before the hooks see it. On the CPU it is the module itself."""
    model = made()
    twin = copy.deepcopy(model)
    clip_in_backward(nn.DataParallel(model), CAP)
    x = torch.randn(3, 4)
    nn.DataParallel(model)(x).square().sum().backward()
    twin(x).square().sum().backward()
    fused_component_clip_(twin, CAP)
    assert all(same_bits(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@on_ranks(2)
def test_freed_by_a_later_hook():
    """An optimizer in the backward pass, by hand."""
    model = made()
    seen = []
    handle = clip_in_backward(model, CAP, on_clip=seen.append)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    for i in range(3):
        loss_of(model).backward()
        assert len(seen) == i + 1
        assert all(p.grad is None for p in model.parameters())
    handle.remove()


@on_ranks(2)
@pytest.mark.parametrize("how", ["written to", "replaced"])
def test_written_to_by_a_later_hook(how):
    def change(grad):
        return grad.mul_(0.5) if how == "written to" else grad.clone()

    model = made()
    handle = clip_in_backward(model, CAP)
    model[0].weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", change(p.grad)))
    with pytest.raises(RuntimeError, match="the gradient of '0.weight' was written to"):
        loss_of(model).backward()
    handle.remove()


@on_ranks(2)
def test_looking_for_it_grows_rare_where_references_grow():
    from cwclip_kernels.in_backward import clipping as in_backward

    looks, bag = [], []
    original = in_backward.are_averaged
    in_backward.are_averaged = lambda is_ours: looks.append(1) or original(is_ours)
    try:
        model = made()
        handle = clip_in_backward(model, CAP)
        for _ in range(33):
            loss_of(model).backward()
            model.zero_grad()
            bag.append(list(model.parameters()))
        handle.remove()
    finally:
        in_backward.are_averaged = original
    assert 3 < len(looks) <= 8
