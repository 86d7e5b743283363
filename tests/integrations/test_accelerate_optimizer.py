"""``ComponentClipAdamW`` under Accelerate: nothing else clips, in a plain loop, with accumulation, a loss scale."""

import pytest
import torch

from cwclip_kernels import fused_component_clip_, thresholds
from cwclip_kernels.integrations.accelerate import clip_grad_norm_
from cwclip_kernels.optim import ComponentClipAdamW
from helpers import same_bits

pytest.importorskip("accelerate")

from accelerate import Accelerator
from accelerate.state import AcceleratorState

from small_transformer import Model, batches

LR, CAP = 0.01, 0.05


@pytest.fixture(autouse=True)
def _fresh_state():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def prepared(accelerator, max_norm=CAP, **options):
    """A model and its optimizer, and the optimizer inside."""
    model = Model()
    inner = ComponentClipAdamW(model.named_parameters(), lr=LR, max_norm=max_norm, **options)
    return *accelerator.prepare(model, inner), inner


def close(a, b):
    """In float64; AdamW's update is computed in another order."""
    torch.testing.assert_close(list(a.parameters()), list(b.parameters()), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("components", [None, "layer", "all"])
@pytest.mark.parametrize("every", [1, 2])
def test_a_plain_loop(every, components):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=every)
    model, optimizer, inner = prepared(accelerator, components=components)
    plain = Model()
    plain.load_state_dict(model.state_dict())
    theirs = torch.optim.AdamW(plain.parameters(), lr=LR)
    for i, tokens in enumerate(batches(6)):
        with accelerator.accumulate(model):
            accelerator.backward(model(tokens).square().sum())
            optimizer.step()
            optimizer.zero_grad()
        (plain(tokens).square().sum() / every).backward()
        if (i + 1) % every == 0:
            norms = fused_component_clip_(plain, CAP, components=components)
            theirs.step()
            theirs.zero_grad()
            torch.testing.assert_close(inner.last.norms, norms)
            assert inner.last.clipped.any()
    close(model, plain)
    assert {state["step"].item() for state in inner.state.values()} == {6 // every}


def test_clipping_beside_it_is_refused():
    accelerator = Accelerator(cpu=True)
    model, optimizer, _ = prepared(accelerator)
    other = accelerator.prepare(Model())
    for m in (model, other):
        accelerator.backward(m(batches()[0]).square().sum())
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(
        RuntimeError, match="optimizer: ComponentClipAdamW clips in its own step, .*leave out clip_grad_norm_"
    ):
        clip_grad_norm_(accelerator, model, 0.1)
    assert all(map(same_bits, before, (p.grad for p in model.parameters())))
    clip_grad_norm_(accelerator, other, 0.1)  # which that optimizer doesn't have
    optimizer.step()


def scaled(accelerator, monkeypatch, scale):
    """Accelerate has float16 on accelerators alone: a scaler for the CPU is put there by hand."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    monkeypatch.setattr(accelerator, "scaler", scaler)
    monkeypatch.setattr(accelerator, "native_amp", True)
    monkeypatch.setattr(AcceleratorState, "mixed_precision", "fp16")


def test_a_scaled_loss_is_unscaled_in_the_step(monkeypatch):
    accelerator = Accelerator(cpu=True)
    scaled(accelerator, monkeypatch, 1024.0)
    model, optimizer, inner = prepared(accelerator)
    plain = Model()
    plain.load_state_dict(model.state_dict())
    theirs = torch.optim.AdamW(plain.parameters(), lr=LR)
    for i, tokens in enumerate(batches(5)):
        accelerator.scaler.scale(model(tokens).square().sum()).backward()
        plain(tokens).square().sum().backward()
        if i == 2:
            model.head.bias.grad.fill_(torch.inf)
        else:
            fused_component_clip_(plain, CAP)
            theirs.step()
        optimizer.step()
        optimizer.zero_grad()
        theirs.zero_grad()
        assert inner.last.norms.isfinite().all() == (i != 2)
    close(model, plain)
    assert accelerator.scaler.get_scale() == 512.0


def test_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path):
    def run(steps, save=None, load=None, start=None):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator, caps = Accelerator(cpu=True), thresholds.EMA(warmup_steps=2)
        model, optimizer, _ = prepared(accelerator, caps)
        model.load_state_dict(start or model.state_dict())
        if load is not None:
            accelerator.load_state(load)
        for tokens in data[steps]:
            accelerator.backward(model(tokens).square().sum())
            optimizer.step()
            optimizer.zero_grad()
        if save is not None:
            accelerator.save_state(save)
        return model, caps.state_dict()

    data, start = batches(6), Model().state_dict()
    whole, theirs = run(slice(0, 6), start=start)
    run(slice(0, 3), save=tmp_path / "state", start=start)
    resumed, ours = run(slice(3, 6), load=tmp_path / "state")
    assert all(map(same_bits, resumed.parameters(), whole.parameters()))
    assert ours["host"] == theirs["host"] == {"steps": 6}
    assert all(same_bits(ours["tensors"][name], value) for name, value in theirs["tensors"].items())
