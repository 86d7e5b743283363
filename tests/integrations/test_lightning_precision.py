"""In Lightning: gradients are unscaled before they are clipped, fused optimizers' too."""

from copy import deepcopy

import pytest
import torch

from cwclip_kernels import fused_component_clip_

pytest.importorskip("lightning")


from cwclip_kernels.integrations.lightning import ComponentClip, configure_gradient_clipping
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


def test_bfloat16():
    lit, data = Lit(Model().float()), batches()
    plain = deepcopy(lit.model)
    trainer(ComponentClip(0.05), precision="bf16-mixed").fit(lit, data)
    optimizer = sgd(plain.parameters())
    for tokens in data:
        with torch.autocast("cpu", torch.bfloat16):
            loss = plain(tokens).square().sum()
        loss.backward()
        fused_component_clip_(plain, 0.05)
        optimizer.step()
        optimizer.zero_grad()
    assert same_parameters(lit.model, plain)


NOTHING_AT = (0, 3)  # the second step is none, though part of its gradients has come


# A scale at which the first steps overflow, and one that fits.
@pytest.mark.parametrize(
    ("way", "scale", "nothing_at"),
    [
        ("callback", 2.0**10, ()),
        ("callback", 2.0**60, ()),
        ("callback", 2.0**10, NOTHING_AT),
        ("hook", 2.0**10, NOTHING_AT),
    ],
)
@pytest.mark.parametrize("optimizer", [adamw, fused])
def test_float16_is_unscaled_first(way, optimizer, scale, nothing_at):
    every = 2 if nothing_at else 1
    clip, data = ComponentClip(0.05), batches(8)
    lit = Lit(Model().float(), optimizer, nothing_at) if way == "callback" else ByHook(0.05)
    if way == "hook":
        lit.model, lit._optimizer, lit._nothing_at = Model().float(), optimizer, nothing_at
    plain = deepcopy(lit.model)
    plugin = half_precision(scale)
    trainer(*([clip] if way == "callback" else []), plugins=[plugin], accumulate_grad_batches=every).fit(lit, data)
    steps, scaler = optimizer(plain.parameters()), half_precision(scale).scaler
    for i, tokens in enumerate(data):
        if i % every == 0:
            steps.zero_grad()
        if i not in nothing_at:
            with torch.autocast("cpu", torch.float16):
                loss = plain(tokens).square().sum() / every
            scaler.scale(loss).backward()
        if (i + 1) % every == 0 and i not in nothing_at:
            scaler.unscale_(steps)
            fused_component_clip_(plain, 0.05)
            scaler.step(steps)
            scaler.update()
    assert same_parameters(lit.model, plain)
    assert plugin.scaler.get_scale() == scaler.get_scale()
    if way == "hook" and optimizer is adamw:
        assert [result is None for result in lit.clipped] == [False, True, False, False]


def test_lightning_itself_refuses_fused_optimizers():
    lit = Lit(Model().float(), fused)
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        trainer(plugins=[half_precision()], gradient_clip_val=1.0).fit(lit, batches())


@pytest.mark.parametrize("optimizer", [adamw, fused])
def test_manual_float16(optimizer):
    lit, data = Manual(Model().float(), optimizer), batches()
    automatic = Lit(deepcopy(lit.model), optimizer)
    for module in (lit, automatic):
        trainer(ComponentClip(0.05), plugins=[half_precision()]).fit(module, data)
    assert same_parameters(lit.model, automatic.model)


class UnscalesInStep(torch.optim.SGD):
    _step_supports_amp_scaling = True

    def step(self, closure=None, *, grad_scaler=None):
        raise NotImplementedError


class Early(Manual):
    def manual_backward(self, loss):
        super().manual_backward(loss)
        configure_gradient_clipping(self, self.optimizers(), 0.1)


def test_what_is_scaled_and_stays_so_is_refused():
    lit = Lit(Model().float(), lambda parameters: UnscalesInStep(parameters, lr=0.1))
    with pytest.raises(RuntimeError, match="UnscalesInStep unscales its gradients in its own step"):
        trainer(ComponentClip(0.1), plugins=[half_precision()]).fit(lit, batches())
    with pytest.raises(RuntimeError, match="AdamW: gradients still carry the loss's scale.*on_before_optimizer_step"):
        trainer(plugins=[half_precision()]).fit(Early(Model().float(), adamw), batches())
    with pytest.raises(ValueError, match=r"\(error_if_nonfinite=True\) can't be used with a scaled loss"):
        trainer(ComponentClip(0.1, error_if_nonfinite=True), plugins=[half_precision()]).fit(Lit(), batches())


def test_manual_clipping_before_the_step_of_what_has_no_scale():
    lit, data = Early(), batches()
    plain = deepcopy(lit.model)
    trainer().fit(lit, data)
    plain_steps(plain, data, lambda m: fused_component_clip_(m, 0.1))
    assert same_parameters(lit.model, plain)
