"""The Trainer of transformers with the mixin: against a plain loop, in mixed precision, resumed, refused."""

import pytest
import torch
from torch import nn

from cwclip_kernels import ComponentSpec, fused_component_clip_, thresholds
from cwclip_kernels.telemetry import ClipRecorder, read_run
from helpers import same_bits

pytest.importorskip("transformers")

from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from hf import (
    ClippingTrainer,
    arguments,
    encoder,
    examples,
    logged,
    on_one_thread,
    plain_loop,
    total_norm,
    weights_of,
    with_scaler,
)

_on_one_thread = pytest.fixture(autouse=True)(on_one_thread)
NUMBERS = ("clip_rate", "clip_ratio_max", "component_norm_max", "component_norm_nonfinite")


def trained(folder, model=None, data=None, resume=None, component_clipping=None, **changed):
    trainer = ClippingTrainer(
        encoder() if model is None else model,
        arguments(folder, **changed),
        train_dataset=examples() if data is None else data,
        component_clipping=component_clipping,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


# ------------------------------------------------------------------------------------------------------------
# The steps
# ------------------------------------------------------------------------------------------------------------

SPEC = ComponentSpec().split("*.query.weight", sizes=8)


# The cap where each kind of it can be given, and components that need the model's own names.
@pytest.mark.parametrize(
    ("max_grad_norm", "component_clipping", "cap", "components"),
    [
        (0.05, None, 0.05, None),
        (1.0, {"max_norm": 0.05, "components": "layer"}, 0.05, "layer"),
        (0.0, {"max_norm": {"*.bias": 0.01, "classifier.*": 0.02}}, {"*.bias": 0.01, "classifier.*": 0.02}, None),
        (0.05, {"components": SPEC}, 0.05, SPEC),
        (0.5, {"components": "all"}, 0.5, "all"),
        (0.0, None, torch.inf, None),
    ],
)
def test_a_run_is_the_plain_loop_to_the_bit(tmp_path, max_grad_norm, component_clipping, cap, components):
    totals = []

    def clip(model):
        totals.append(total_norm(model).item())
        fused_component_clip_(model, cap, components=components)

    expected = plain_loop(encoder(), clip)
    trainer = trained(tmp_path, max_grad_norm=max_grad_norm, component_clipping=component_clipping)
    assert all(map(same_bits, trainer.model.parameters(), expected.parameters()))
    assert logged(trainer, "grad_norm") == pytest.approx(totals, rel=1e-6)
    assert trainer.last_clip.names[0].startswith(("bert.", "all", "classifier"))


def test_a_tensor_as_cap_is_read_at_every_step(tmp_path):
    cap = torch.tensor(0.05)

    class Halve(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            cap.mul_(0.5)

    own = cap.clone()

    def clip(model):
        fused_component_clip_(model, own)
        own.mul_(0.5)

    expected = plain_loop(encoder(), clip)
    trainer = ClippingTrainer(
        encoder(),
        arguments(tmp_path),
        train_dataset=examples(),
        callbacks=[Halve()],
        component_clipping={"max_norm": cap},
    )
    trainer.train()
    assert all(map(same_bits, trainer.model.parameters(), expected.parameters()))


def test_accumulated_gradients_are_clipped_once_and_whole(tmp_path):
    steps = []

    def clip(model):
        steps.append(total_norm(model).item())
        fused_component_clip_(model, 0.05)

    expected = plain_loop(encoder(), clip, accumulate=2)
    trainer = trained(tmp_path, max_grad_norm=0.05, gradient_accumulation_steps=2)
    assert len(steps) == trainer.state.global_step == 3
    assert logged(trainer, "grad_norm") == pytest.approx(steps, rel=1e-5)
    torch.testing.assert_close(weights_of(trainer.model), weights_of(expected))


# With the cap in one place or the other, Trainer's own way would be to clip by one norm, or once more to inf.
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_nobody_else_passes_over_the_gradients(tmp_path, monkeypatch, max_grad_norm):
    def never(*args, **kwargs):
        raise AssertionError("a pass of Accelerate's")

    monkeypatch.setattr("accelerate.Accelerator.clip_grad_norm_", never)
    calls = []
    given = {"max_norm": 0.05, "on_clip": calls.append}
    assert trained(tmp_path, max_grad_norm=max_grad_norm, component_clipping=given).state.global_step == 6
    assert len(calls) == 6


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_bad_gradient_stays_alone(tmp_path, max_grad_norm, bad):
    def spoil(model):
        model.classifier.bias.register_hook(lambda grad: torch.full_like(grad, bad))
        return model

    good = plain_loop(encoder(), lambda model: fused_component_clip_(model, 0.05), data=examples(4))
    trainer = trained(
        tmp_path,
        spoil(encoder()),
        examples(4),
        max_grad_norm=max_grad_norm,
        component_clipping={"max_norm": 0.05},
    )
    for (name, ours), theirs in zip(trainer.model.named_parameters(), good.parameters(), strict=True):
        assert (name == "classifier.bias") != same_bits(ours, theirs), name
    assert logged(trainer, "component_norm_nonfinite") == [1.0]
    (ratio,) = logged(trainer, "clip_ratio_max")
    assert 0.0 < ratio < torch.inf


def test_adaptive_caps_are_those_of_a_plain_loop(tmp_path):
    own = thresholds.EMA(warmup_steps=2)
    expected = plain_loop(encoder(), lambda model: fused_component_clip_(model, own))
    trainer = trained(tmp_path, component_clipping={"max_norm": thresholds.EMA(warmup_steps=2)})
    assert all(map(same_bits, trainer.model.parameters(), expected.parameters()))


# ------------------------------------------------------------------------------------------------------------
# Mixed precision
# ------------------------------------------------------------------------------------------------------------


def test_bfloat16(tmp_path):
    expected = encoder()
    plain = expected.forward

    def forward(**batch):
        with torch.autocast("cpu", torch.bfloat16):
            return plain(**batch)

    expected.forward = forward
    plain_loop(expected, lambda model: fused_component_clip_(model, 0.05))
    trainer = trained(tmp_path, max_grad_norm=0.05, bf16=True)
    torch.testing.assert_close(weights_of(trainer.model), weights_of(expected), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_scaled_loss_is_unscaled_once(tmp_path, monkeypatch, accumulate):
    expected = plain_loop(encoder(), lambda model: fused_component_clip_(model, 0.05), accumulate=accumulate)
    args = arguments(tmp_path, max_grad_norm=0.05, gradient_accumulation_steps=accumulate)
    trainer = with_scaler(ClippingTrainer(encoder(), args, train_dataset=examples()), monkeypatch)
    trainer.train()
    torch.testing.assert_close(weights_of(trainer.model), weights_of(expected))


def test_a_step_that_overflows_is_skipped_and_teaches_nothing(tmp_path, monkeypatch):
    model, steps = encoder(), []

    def overflow_once(grad):
        steps.append(0)
        return torch.full_like(grad, torch.inf) if len(steps) == 2 else grad

    model.classifier.bias.register_hook(overflow_once)
    results, caps = [], thresholds.EMA(warmup_steps=1)
    args = arguments(tmp_path, max_steps=3)
    given = {"max_norm": caps, "on_clip": results.append}
    trainer = ClippingTrainer(model, args, train_dataset=examples(), component_clipping=given)
    with_scaler(trainer, monkeypatch).train()
    assert logged(trainer, "component_norm_nonfinite") == [0.0, 1.0, 0.0]
    assert trainer.accelerator.scaler.get_scale() == 512.0
    assert caps.state_dict()["tensors"]["gamma"].isfinite().all()
    assert all(p.isfinite().all() for p in model.parameters())


def test_errors_for_what_a_scaled_loss_has_now_and_then_are_refused(tmp_path, monkeypatch):
    given = {"nonfinite": "error"}
    trainer = ClippingTrainer(encoder(), arguments(tmp_path), train_dataset=examples(), component_clipping=given)
    with pytest.raises(ValueError, match="nonfinite: 'error' .* can't be used with a scaled loss"):
        with_scaler(trainer, monkeypatch).train()


# ------------------------------------------------------------------------------------------------------------
# Logs and checkpoints
# ------------------------------------------------------------------------------------------------------------


def test_the_log_tells_of_all_steps_since_the_last(tmp_path):
    results = []
    given = {"max_norm": 0.05, "on_clip": results.append, "log_norms": "*.pooler.*"}
    trainer = trained(tmp_path, logging_steps=3, component_clipping=given)
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [3, 6]
    first = [r.as_dict() for r in results[:3]]
    clipped = sum(c != 1 for step in first for _, c in step.values())
    rate = clipped / sum(n != 0 for step in first for n, _ in step.values())
    largest = max(n for step in first for n, _ in step.values())
    assert 0 < rate < 1
    for key, expected in zip(NUMBERS, (rate, largest / 0.05, largest, 0.0), strict=True):
        assert logged(trainer, key)[0] == pytest.approx(expected, rel=1e-6), key
    weight = "bert.pooler.dense.weight"
    assert logged(trainer, f"component_norm/{weight}") == [results[i].as_dict()[weight][0] for i in (2, 5)]
    assert "component_norm/classifier.bias" not in trainer.state.log_history[0]
    assert "clip_rate" not in trainer.state.log_history[-1]  # the summary


def test_nothing_is_looked_at_between_logs(tmp_path, monkeypatch):
    looks = []
    own = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: looks.append(1) or own(tensor))
    trained(tmp_path, max_grad_norm=0.05, logging_steps=6)
    assert len(looks) == 1


def test_everything_can_be_recorded(tmp_path):
    with ClipRecorder(tmp_path / "norms") as recorder:
        trainer = trained(tmp_path, max_grad_norm=0.05, component_clipping={"on_clip": recorder.record})
    run = read_run(tmp_path / "norms.jsonl")
    assert run.names == trainer.last_clip.names
    assert len(run.steps) == 6


def mapping():
    return thresholds.ByPattern({"*.bias": 0.05, "*": thresholds.Percentile(50.0)})


@pytest.mark.parametrize("policy", [lambda: thresholds.EMA(warmup_steps=2), mapping])
def test_a_resumed_run_is_the_whole_one_to_the_bit(tmp_path, policy):
    def run(folder, resume=None, **changed):
        given = {"max_norm": policy()}
        trainer = trained(
            folder, save_strategy="steps", save_steps=3, component_clipping=given, resume=resume, **changed
        )
        return trainer, given["max_norm"].state_dict()

    whole, learnt = run(tmp_path / "a")
    half, _ = run(tmp_path / "b", max_steps=3)
    assert half.state.global_step == 3
    resumed, relearnt = run(tmp_path / "b", resume=get_last_checkpoint(str(tmp_path / "b")))
    assert all(map(same_bits, resumed.model.parameters(), whole.model.parameters()))
    learnt, relearnt = (one.get("thresholds", {}).get("*", one) for one in (learnt, relearnt))
    assert relearnt["host"] == learnt["host"]
    assert learnt["tensors"]
    for name, tensor in learnt["tensors"].items():
        assert same_bits(relearnt["tensors"][name], tensor)
    assert logged(resumed, "grad_norm") == logged(whole, "grad_norm")
    assert logged(resumed, "clip_rate") == logged(whole, "clip_rate")


def test_what_a_checkpoint_has_of_ours(tmp_path):
    def files(folder, **changed):
        trained(folder, max_steps=1, save_strategy="steps", save_steps=1, **changed)
        return [path.name for path in (folder / "checkpoint-1").glob("component_clipping.pt")]

    learning = {"component_clipping": {"max_norm": thresholds.EMA()}}
    assert files(tmp_path / "a", max_grad_norm=0.05) == []
    assert files(tmp_path / "b", save_only_model=True, **learning) == []
    assert files(tmp_path / "c", **learning) == ["component_clipping.pt"]
    with pytest.warns(UserWarning, match=r"no component_clipping.pt of this run, so what EMA had learnt is lost"):
        trained(tmp_path / "a", resume=True, component_clipping={"max_norm": thresholds.EMA()})
    with pytest.raises(ValueError, match="state: of a EMA, not of a ZScore"):
        trained(tmp_path / "c", resume=True, component_clipping={"max_norm": thresholds.ZScore()})


def test_with_a_fresh_model_caps_begin_anew(tmp_path):
    caps = thresholds.EMA(warmup_steps=2)
    trainer = ClippingTrainer(
        args=arguments(tmp_path),
        train_dataset=examples(),
        model_init=lambda: encoder(),
        component_clipping={"max_norm": caps},
    )
    found = []
    for _ in range(2):
        trainer.train()
        found.append([*weights_of(trainer.model), caps.state_dict()["tensors"]["gamma"]])
    assert all(map(same_bits, *found))


def test_a_parameter_replaced_between_runs_is_clipped(tmp_path):
    model = encoder()
    trainer = trained(tmp_path, model, max_grad_norm=0.05)
    model.classifier.weight = nn.Parameter(model.classifier.weight.detach() * 2.0)
    trainer.optimizer, trainer.lr_scheduler = None, None
    trainer.train()
    assert trainer.last_clip.as_dict()["classifier.weight"][0] > 0
