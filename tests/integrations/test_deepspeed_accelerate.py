"""Accelerate's DeepSpeedPlugin: what is attached clips, and its call returns the norm."""

import contextlib
from copy import deepcopy

import pytest
import torch
import torch.distributed as dist

from cwclip_kernels import fused_component_clip_, thresholds
from helpers import same_bits
from ranks import on_ranks

pytest.importorskip("accelerate")
pytest.importorskip("deepspeed")

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin

from cwclip_kernels.integrations.accelerate import clip_grad_norm_
from cwclip_kernels.integrations.deepspeed import attach
from deepspeed_trainers import assert_same, launched, one_folder, whole
from small_transformer import Model, batches

CAP = 0.1


@contextlib.contextmanager
def prepared(model, stage, accumulate=1, **config):
    """An Accelerator, and what its ``prepare`` returns."""
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0,
        "gradient_accumulation_steps": accumulate,
        **config,
    }
    with launched():
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            accelerator = Accelerator(
                deepspeed_plugin=DeepSpeedPlugin(config), gradient_accumulation_steps=accumulate
            )
            yield accelerator, *accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.3))
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


def part(tokens):
    """What this rank has of a batch of two."""
    return tokens[dist.get_rank() :][:1]


@pytest.mark.parametrize(("stage", "accumulate"), [(0, 1), (2, 2), (3, 1)])
@on_ranks(2)
def test_a_loop_for_all_backends(stage, accumulate):
    """It goes on as it is; ``attach`` takes what ``prepare`` returns."""
    model = Model().float()
    plain, data = deepcopy(model), batches(4)
    theirs = torch.optim.SGD(plain.parameters(), lr=0.3)
    with prepared(model, stage, accumulate) as (accelerator, model, optimizer):
        clipping = attach(model, CAP)
        for i, tokens in enumerate(data):
            plain(tokens).square().mean().div(accumulate).backward()
            with accelerator.accumulate(model):
                accelerator.backward(model(part(tokens)).square().mean())
                assert accelerator.sync_gradients == ((i + 1) % accumulate == 0)
                if accelerator.sync_gradients:
                    expected = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()])
                    norms = fused_component_clip_(plain, CAP)
                    theirs.step()
                    theirs.zero_grad()
                    norm = clip_grad_norm_(accelerator, model.parameters(), CAP)
                    torch.testing.assert_close(norm, expected, rtol=1e-4, atol=0.0)
                    torch.testing.assert_close(clipping.last.norms, norms, rtol=1e-3, atol=1e-6)
                else:
                    with pytest.raises(RuntimeError, match="if accelerator.sync_gradients"):
                        clip_grad_norm_(accelerator, model.parameters(), CAP)
                optimizer.step()
                optimizer.zero_grad()
        assert_same(whole(model.module), whole(plain), rtol=1e-5)


@on_ranks(2)
def test_what_contradicts_what_is_attached_is_named():
    with prepared(Model().float(), 2) as (accelerator, model, _):
        tokens = part(batches(1)[0])
        with pytest.raises(RuntimeError, match=r'"gradient_clipping"\] = 0 before prepare\(\), and call .*attach'):
            clip_grad_norm_(accelerator, model, CAP)
        attach(model, CAP, components="layer", eps=1e-3)
        same = {"components": "layer", "eps": 1e-3}
        accelerator.backward(model(tokens).square().mean())
        total = clip_grad_norm_(accelerator, model, CAP, **same)
        assert (
            total
            == model.get_global_grad_norm()
            == clip_grad_norm_(accelerator, iter(model.parameters()), CAP, **same)
        )
        for name, max_norm, norm_type, options in (
            ("max_norm", 0.2, 2, same),
            ("max_norm", {"*": CAP}, 2, same),
            ("norm_type", CAP, 1, same),
            ("eps", CAP, 2, {"components": "layer"}),
            ("components", CAP, 2, {"eps": 1e-3}),
            ("nonfinite", CAP, 2, {**same, "nonfinite": "zero"}),
        ):
            with pytest.raises(ValueError, match=f"^{name}: not what was attached to DeepSpeed's engine"):
                clip_grad_norm_(accelerator, model, max_norm, norm_type, **options)
        with pytest.raises(ValueError, match="parameters: not those of DeepSpeed's engine"):
            clip_grad_norm_(accelerator, list(model.parameters())[1:], CAP, **same)
        with pytest.raises(TypeError, match="unexpected keyword argument 'pp_mesh'"):
            clip_grad_norm_(accelerator, model, CAP, pp_mesh=None)


@on_ranks(2)
def test_a_state_has_what_caps_have_learnt():
    folder = one_folder()
    caps = [thresholds.EMA(warmup_steps=1), thresholds.EMA(warmup_steps=1)]
    for i in range(2):
        with prepared(Model().float(), 2) as (accelerator, model, _):
            attach(model, caps[i])
            if i:
                accelerator.load_state(folder)
                break
            for tokens in batches(3):
                accelerator.backward(model(part(tokens)).square().mean())
            accelerator.save_state(folder)
    one, other = (c.state_dict() for c in caps)
    assert one["host"] == other["host"] == {"steps": 3}
    assert all(same_bits(one["tensors"][name], other["tensors"][name]) for name in one["tensors"])


@on_ranks(2)
def test_accelerates_own_number():
    """0 is left out, so that DeepSpeed's default holds, and "auto" is 1."""
    assert "gradient_clipping" not in DeepSpeedPlugin(gradient_clipping=0.0).deepspeed_config
    message = 'engine: its configuration has "gradient_clipping": 1.0'
    with (
        prepared(Model().float(), 2, gradient_clipping="auto") as (_, model, _),
        pytest.raises(RuntimeError, match=message),
    ):
        attach(model, CAP)
