"""What goes wrong in a DeepSpeed engine, and what its checkpoints carry."""

import math
import tempfile
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.utils._pytree import tree_flatten

from cwclip_kernels import thresholds
from ranks import on_ranks

pytest.importorskip("deepspeed")

from collectives import everywhere
from cwclip_kernels.integrations._common import clipper_arguments
from cwclip_kernels.integrations.deepspeed import EngineClipping, attach
from deepspeed_engines import (
    backward,
    full_gradients,
    full_parameters,
    made,
    quiet,
    step_of,
    train,
)


def same_state(first, second):
    """Two states of a threshold."""
    (one, form), (other, other_form) = tree_flatten(first), tree_flatten(second)
    assert form == other_form
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def poisoned(engine, step, value=math.inf):
    """A backward pass of which one rank's loss is inf."""
    backward(engine, step, scale=value if dist.get_rank() == 1 else 1.0)


# Stage, precision: those that skip the step. DeepSpeed checks for inf or NaN itself, or takes the norm's.
SKIPS = [
    (1, "fp16"),
    (2, "fp16"),
    (3, "fp16"),
    (1, "fp32"),
    (2, "fp32"),
    (3, "fp32"),
    (3, "bf16"),
    (1, "bf16-fp32"),
    (0, "bf16"),
]


@pytest.mark.parametrize(("stage", "precision"), SKIPS)
@on_ranks(2)
def test_a_step_with_inf_on_one_rank_is_skipped_as_before(stage, precision):
    states = []
    for max_norm in (None, thresholds.EMA(1.1, warmup_steps=1)):
        engine = made(stage, precision)
        clipping = None if max_norm is None else attach(engine, max_norm, nonfinite="zero")
        train(engine, 0)
        before = full_parameters(engine)
        learnt = None if clipping is None else (clipping.last, clipping.state_dict())
        poisoned(engine, 1)
        step_of(engine)
        assert engine.skipped_steps == 1
        for name, parameter in full_parameters(engine).items():
            torch.testing.assert_close(parameter, before[name], rtol=0.0, atol=0.0)
        if clipping is not None:
            assert clipping.last is learnt[0]
            assert same_state(clipping.state_dict(), learnt[1])
        scale = getattr(engine.optimizer, "loss_scale", None)
        train(engine, 2)
        assert engine.skipped_steps == 1
        if clipping is not None:
            assert clipping.last is not learnt[0]
        states.append((scale, float(engine.get_global_grad_norm() or 0.0) > 0))
    assert states[0][0] == states[1][0]
    assert states[1][1]


@pytest.mark.parametrize("policy", ["propagate", "zero", "skip"])
@pytest.mark.parametrize("stage", [1, 2])
@on_ranks(2)
def test_with_bf16_the_policy_decides(stage, policy):
    """Stages 1 and 2 with bf16 step whatever the norm is: then only the component that is bad is lost, if any."""
    engine = made(stage, "bf16", bf16={"enabled": True, "check_grad_overflow": False})
    clipping = attach(engine, 0.1, nonfinite=policy)
    train(engine, 0)
    backward(engine, 1)
    bad = "first.weight"
    index = [id(p) for p in engine.optimizer.params_in_partition[0]]
    target = id(dict(engine.module.named_parameters())[bad])
    if target in index:
        engine.optimizer.averaged_gradients[0][index.index(target)].view(-1)[0] = math.inf
    before = full_parameters(engine)
    step_of(engine)
    after, found = full_parameters(engine), clipping.last.as_dict()
    assert engine.skipped_steps == 0
    assert [name for name, (norm, _) in found.items() if not math.isfinite(norm)] == [bad]
    for name, parameter in after.items():
        if name != bad:
            assert parameter.isfinite().all(), name
            assert not torch.equal(parameter, before[name]) or name == "unused.bias"
    if policy == "zero":  # but for weight decay
        torch.testing.assert_close(after[bad], before[bad] * (1 - 0.1 * 0.01))
    else:
        assert not after[bad].isfinite().all()


@on_ranks(2)
def test_error_if_nonfinite_is_raised_on_all_ranks_before_anything_is_changed():
    for stage, precision in ((0, "fp32"), (2, "fp32"), (3, "bf16"), (1, "bf16-fp32")):
        engine = made(stage, precision)
        attach(engine, 0.1, error_if_nonfinite=True)
        train(engine, 0)
        before = full_parameters(engine)
        poisoned(engine, 1)
        with pytest.raises(RuntimeError, match="non-finite for"):
            step_of(engine)
        for name, parameter in full_parameters(engine).items():
            torch.testing.assert_close(parameter, before[name], rtol=0.0, atol=0.0)
    # Where DeepSpeed would skip the step before.
    for stage, precision in ((0, "bf16"), (2, "bf16"), (1, "fp16"), (3, "fp16")):
        with pytest.raises(ValueError, match="would never be one here"):
            attach(made(stage, precision), 1.0, error_if_nonfinite=True)


@pytest.mark.parametrize("norm_type", [2.0, 1.0])  # of order 1: DeepSpeed measures the global norm
@pytest.mark.parametrize("stage", [1, 2, 3])
@on_ranks(2)
def test_a_loss_scale_that_grows_in_this_step_is_not_the_gradients(stage, norm_type):
    """DeepSpeed updates it before it unscales; without clipping that step is half as long."""
    fp16 = {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 2, "hysteresis": 1}
    engine = made(stage, "fp16", fp16=fp16)
    clipping = attach(engine, 0.1, norm_type)
    for step in range(5):
        backward(engine, step)
        scale = engine.optimizer.loss_scale
        gradients = full_gradients(engine)
        step_of(engine)
        for name, (norm, _) in clipping.last.as_dict().items():
            gradient = gradients.get(name)
            expected = 0.0 if gradient is None else gradient.double().norm(norm_type).item() / scale
            assert norm == pytest.approx(expected, rel=1e-5)
        total = math.sqrt(
            sum((g.double() / scale).square().sum().item() for g in gradients.values() if g is not None)
        )
        assert float(engine.get_global_grad_norm()) == pytest.approx(total, rel=1e-5)
    assert engine.optimizer.loss_scale > 2**4


@pytest.mark.parametrize("stage", [0, 2, 3])
@on_ranks(2)
def test_remove_leaves_the_engine_as_it_was(stage):
    engine = made(stage)
    own = set(vars(engine)), set(vars(engine.optimizer))
    with attach(engine, 1e-3) as clipping:
        train(engine, 0)
        with pytest.raises(RuntimeError, match="attached to it already"):
            attach(engine, 1.0)
    assert (set(vars(engine)), set(vars(engine.optimizer))) == own
    assert stage > 0 or engine.get_global_grad_norm() is None
    last = clipping.last
    backward(engine, 1)
    gradients, before = full_gradients(engine), full_parameters(engine)
    step_of(engine)
    after = full_parameters(engine)
    assert clipping.last is last
    moved = before["first.bias"] - after["first.bias"]
    torch.testing.assert_close(moved, 0.1 * gradients["first.bias"].reshape(moved.shape), rtol=1e-4, atol=1e-6)
    attach(engine, 1.0).remove()


@on_ranks(1)
def test_remove_within_on_clip_would_leave_a_step_half_clipped():
    engine = made(2)
    clipping = attach(engine, 1e-3, on_clip=lambda result: clipping.remove())
    before = full_parameters(engine)
    with pytest.raises(RuntimeError, match="remove.*call it after engine.step"):
        train(engine, 0)
    for name, parameter in full_parameters(engine).items():
        torch.testing.assert_close(parameter, before[name], rtol=0.0, atol=0.0)
    clipping.remove()


@on_ranks(1)
def test_a_trainers_clipping_gives_deepspeeds_back():
    engine = made(2, gradient_clipping=0.5)
    arguments = clipper_arguments(2.0, False, {})
    with EngineClipping(engine, 1.0, arguments, None, replaces_clipping=True):
        assert (engine.gradient_clipping(), engine.optimizer.clip_grad) == (0.0, 0.0)
    assert (engine.gradient_clipping(), engine.optimizer.clip_grad) == (0.5, 0.5)


def resumed(stage, precision, max_norm, folder, **options):
    engine = made(stage, precision)
    clipping = attach(engine, max_norm)
    with quiet():
        path, state = engine.load_checkpoint(folder, **options)
    assert path is not None
    return engine, clipping, state


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (2, "fp32"), (3, "bf16"), (1, "bf16-fp32"), (0, "bf16")]
)
@on_ranks(2)
def test_checkpoints_carry_what_caps_have_learnt(stage, precision):
    def caps():
        return {"*.bias": 0.5, "*": thresholds.EMA(1.1, warmup_steps=1)}

    (folder,) = set(everywhere(tempfile.mkdtemp() if dist.get_rank() == 0 else None)) - {None}
    engine = made(stage, precision)
    clipping = attach(engine, caps())
    for step in range(3):
        train(engine, step)
    with quiet():
        engine.save_checkpoint(folder, client_state={"epoch": 3})
    again, twin, state = resumed(stage, precision, caps(), folder)
    assert state["epoch"] == 3
    assert "cwclip_kernels" not in state
    assert same_state(twin.state_dict(), clipping.state_dict())
    kept = clipping.state_dict()
    for one in (engine, again):
        train(one, 3)
    torch.testing.assert_close(twin.last.caps, clipping.last.caps)
    # Of the weights alone caps know nothing.
    for weights in ({"load_module_only": True}, {"load_optimizer_states": False}):
        _, other, _ = resumed(stage, precision, caps(), folder, **weights)
        assert not same_state(other.state_dict(), kept)
    # Caps that don't learn have no use for it.
    constant, _, state = resumed(stage, precision, 1.0, folder)
    assert "cwclip_kernels" not in state
    train(constant, 3)
    # Caps that learn nothing save nothing.
    assert attach(made(stage, precision), 1.0).state_dict() == {}


@on_ranks(2)
def test_a_checkpoint_that_was_clipped_by_one_norm():
    """DeepSpeed goes on with the clip_grad that it finds there."""
    (folder,) = set(everywhere(tempfile.mkdtemp() if dist.get_rank() == 0 else None)) - {None}
    for stage, precision in ((2, "fp32"), (1, "bf16-fp32")):
        engine = made(stage, precision, gradient_clipping=0.5)
        train(engine, 0)
        with quiet():
            engine.save_checkpoint(folder)
        again = made(stage, precision)
        clipping = attach(again, thresholds.EMA(1.1))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            again.load_checkpoint(folder)
        told = [str(one.message) for one in caught]
        assert any("clipped with gradient_clipping=0.5 by DeepSpeed" in text for text in told)
        assert any("nothing that caps had learnt was saved there" in text for text in told)
        assert again.optimizer.clip_grad == 0.0
        train(again, 1)
        assert clipping.last is not None
