"""``ComponentClipAdamW`` clips in its own step: whatever else would clip the same gradients is refused."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

from cwclip_kernels import ComponentClipGradScaler, ComponentClipper, clip_in_backward
from cwclip_kernels.core.optimizers import clipping_optimizer
from cwclip_kernels.integrations._common import refuse_double_clipping
from cwclip_kernels.optim import ComponentClipAdamW
from helpers import DEVICE, same_bits
from stand_ins import Lookahead
from stepping import give_gradients, twins

SHAPES = [(9,), (50, 7), (6,)]
CAP = 0.05


class Around(torch.optim.SGD):
    """Runs hooks of its own, and then another optimizer's step."""

    def __init__(self, inner):
        self.inner = inner
        super().__init__(inner.param_groups[0]["params"], lr=0.0)

    @torch.no_grad()
    def step(self, closure=None):
        return self.inner.step(closure)


def attach(optimizer, params):
    ComponentClipper(params, CAP).attach(optimizer)


def scaler_step(optimizer, params):
    scaler = ComponentClipGradScaler(ComponentClipper(params, CAP), device=DEVICE)
    scaler.scale(torch.ones((), device=DEVICE))
    scaler.step(optimizer)


def scaler_unscale(optimizer, params):
    scaler = ComponentClipGradScaler(ComponentClipper(params, CAP), device=DEVICE, enabled=False)
    scaler.unscale_(optimizer)


def trainer(optimizer, params):
    refuse_double_clipping([optimizer], None, params, "ComponentClip")


def in_backward(optimizer, params):
    clip_in_backward(params, CAP, optimizer=optimizer)


def in_backward_each(optimizer, params):
    clip_in_backward(params, CAP, optimizer={p: ComponentClipAdamW([p], max_norm=CAP) for p in params})


# What would clip, its error, and the way out that the error names.
WAYS = {
    "attach": (attach, ValueError, "don't attach one, or use torch.optim.AdamW"),
    "scaler.step": (scaler_step, RuntimeError, "use torch.amp.GradScaler, whose scale this optimizer takes out"),
    "scaler.unscale_": (
        scaler_unscale,
        RuntimeError,
        "use torch.amp.GradScaler, whose scale this optimizer takes out",
    ),
    "trainer": (trainer, RuntimeError, "leave out ComponentClip, or use torch.optim.AdamW"),
}
INSIDE = {"itself": lambda optimizer: optimizer, "wrapped": Around}


@pytest.mark.parametrize("inside", INSIDE.values(), ids=list(INSIDE))
@pytest.mark.parametrize(("way", "error", "out"), WAYS.values(), ids=list(WAYS))
def test_a_second_clipper_is_refused_by_name(way, error, out, inside):
    params, _ = twins(SHAPES)
    optimizer = ComponentClipAdamW(params, max_norm=CAP)
    give_gradients(params)
    before = [p.grad.clone() for p in params]
    with pytest.raises(error, match=f"optimizer: ComponentClipAdamW clips in its own step.*{out}"):
        way(inside(optimizer), params)
    assert all(same_bits(p.grad, grad) for p, grad in zip(params, before, strict=True))
    assert not optimizer._optimizer_step_pre_hooks
    assert optimizer.last is None


@pytest.mark.parametrize(("way", "error", "out"), WAYS.values(), ids=list(WAYS))
def test_a_clipper_of_other_parameters_is_not_refused(way, error, out):
    """As in a GAN: one network's optimizer clips by itself, the other network is clipped otherwise."""
    params, others = twins(SHAPES)
    held = Around(ComponentClipAdamW(params, max_norm=CAP))
    held.add_param_group({"params": others})  # which the wrapper steps, and the optimizer inside doesn't have
    give_gradients(params, others)
    way(held, others)


@pytest.mark.parametrize(
    ("way", "error", "says"),
    [
        (in_backward, TypeError, "parameters: the ComponentClipAdamW has its own"),
        (in_backward_each, ValueError, "optimizer: ComponentClipAdamW clips in its own step, after clip_in_backward"),
        (
            lambda o, p: in_backward(Around(o), p),
            ValueError,
            r"clips in its own step, .*clip_in_backward\(optimizer=",
        ),
    ],
    ids=["itself", "one each", "wrapped"],
)
def test_in_the_backward_pass(way, error, says):
    params, _ = twins(SHAPES)
    with pytest.raises(error, match=says):
        way(ComponentClipAdamW(params, max_norm=CAP), params)
    assert not any(p._post_accumulate_grad_hooks for p in params)


def test_which_optimizers_clip_by_themselves():
    params, others = twins(SHAPES)
    ours, plain = ComponentClipAdamW(params, max_norm=math.inf), torch.optim.AdamW(params)
    assert clipping_optimizer(ours) is ours
    assert clipping_optimizer(Lookahead(ours)) is ours
    assert clipping_optimizer(SimpleNamespace(_optimizer=ours), params) is ours  # a wrapper that is no Optimizer
    assert clipping_optimizer(ours, others) is None
    for other in (plain, Lookahead(plain), nn.Linear(1, 1), None):
        assert clipping_optimizer(other) is None
    with ComponentClipper(params, CAP).attach(plain):
        assert clipping_optimizer(plain) is None  # a clipper that is attached isn't the optimizer's own


def test_the_way_out_of_the_scaler_works():
    params, before = twins(SHAPES)
    optimizer, scaler = ComponentClipAdamW(params, max_norm=CAP), GradScaler(DEVICE)
    give_gradients(params)
    norms = [p.grad.norm() for p in params]
    scaler.scale(torch.ones((), device=DEVICE))
    for p in params:
        p.grad *= scaler.get_scale()
    scaler.step(optimizer)
    torch.testing.assert_close(optimizer.last.norms, torch.stack(norms))
    assert not any(map(same_bits, params, before))
