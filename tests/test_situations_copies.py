"""Every way into the loop x every kind of cap: copied, pickled, resumed, made or called in inference mode."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn

from cwclip_kernels import ComponentClipper, thresholds
from helpers import DEVICE, same_bits
from ways import (
    CAP,
    CAPS,
    LEARN,
    Attached,
    Clipper,
    InBackward,
    Model,
    Scaler,
    backward,
    every_cap,
    every_way,
    gradients_of,
    skip_refused,
    trained,
)

COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "save": lambda value: _saved_and_loaded(value),
}


def _saved_and_loaded(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def cap_of_step(step):
    return CAP / (1 + step)


@pytest.mark.usefixtures("own_garbage")
@every_cap
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("order", ["model holds it", "model first", "clipper first"])
def test_a_clipper_copied_with_its_model(kind, how, order):
    model = Model()
    cap = thresholds.Schedule(cap_of_step) if kind == "Schedule" else CAPS[kind]()
    clipper = ComponentClipper(model, cap)
    for _ in range(4):
        model.zero_grad()
        backward(model, gradients_of(model))
        clipper.clip_()
    if order == "model holds it":
        model.clipper = clipper
        twin = COPIES[how](model)
        copied = twin.clipper
    elif order == "model first":
        twin, copied = COPIES[how]((model, clipper))
    else:
        copied, twin = COPIES[how]((clipper, model))
    own = {id(p) for p in twin.parameters()}
    assert {id(p) for p in copied.parameters} <= own
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(10.0)
    results = []
    gradients = gradients_of(model, size=100.0)
    for one, its in ((model, clipper), (twin, copied)):
        one.zero_grad()
        backward(one, gradients)
        results.append(its.clip_())
    assert same_bits(results[0].norms, results[1].norms)
    factor = 10.0 if kind == "ParamRelative" else 1.0
    clipped = (results[0].norms > 0).expand(results[0].caps.shape) if results[0].caps.ndim else ...
    torch.testing.assert_close(results[1].caps[clipped], results[0].caps[clipped] * factor, rtol=1e-5, atol=0)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trained(twin))
    # And by itself, when the first is gone.
    watch = weakref.ref(model)
    del model, clipper, one, its, results
    gc.collect()
    assert watch() is None
    twin.zero_grad()
    backward(twin, gradients)
    copied.clip_()


@every_cap
def test_a_deep_copy_by_itself_clips_the_same_parameters(kind):
    model = Model()
    clipper = ComponentClipper(model, CAPS[kind]())
    copied = copy.deepcopy(clipper)
    assert all(a is b for a, b in zip(copied.parameters, clipper.parameters, strict=True))
    for _ in range(3):
        model.zero_grad()
        backward(model, gradients_of(model))
        clipper.clip_()
    if kind in ("EMA", "ZScore", "Percentile", "Schedule"):  # each learns for itself
        fresh, learnt = copied.state_dict()["max_norm"], clipper.state_dict()["max_norm"]
        assert repr((fresh["tensors"], fresh["host"])) != repr((learnt["tensors"], learnt["host"]))


def test_a_threshold_before_and_after_it_is_bound():
    for kind in ("EMA", "ZScore", "Percentile"):
        for how in (*COPIES.values(), copy.copy):
            threshold = how(CAPS[kind]())
            model = Model()
            clipper = ComponentClipper(model, threshold)
            backward(model, gradients_of(model))
            clipper.clip_()
            twin = how(threshold)
            state, other = threshold.state_dict(), twin.state_dict()
            assert state["components"] == other["components"]
            for name, tensor in state["tensors"].items():
                assert same_bits(tensor, other["tensors"][name])
            with pytest.raises(ValueError, match="has loaded the state of other components"):
                ComponentClipper(nn.Linear(2, 1).to(DEVICE), twin)


@pytest.mark.parametrize("way", [Clipper, Attached, Scaler, InBackward])
@every_cap
def test_resumed_from_a_checkpoint(way, kind):
    skip_refused(way, kind)
    model = Model()
    loop, fresh = way(model, CAPS[kind]()), None
    for _ in range(5):
        loop.step(gradients_of(model, size=0.1))
    holder = getattr(loop, "handle", None) or loop.clipper
    state = _saved_and_loaded(holder.state_dict())
    assert (state == {}) == (kind not in LEARN)
    twin = copy.deepcopy(model)
    fresh = way(twin, CAPS[kind]())
    (getattr(fresh, "handle", None) or fresh.clipper).load_state_dict(state)
    for _ in range(3):
        gradients = gradients_of(model)
        assert all(same_bits(a, b) for a, b in zip(loop.step(gradients), fresh.step(gradients), strict=True))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("kind", ["EMA", "ZScore", "Percentile"])
def test_a_checkpoint_of_torch_distributed(kind, tmp_path):
    """It fills the tensors that it finds: none, before the policy is bound."""
    import torch.distributed.checkpoint as dcp

    model = Model()
    loop = Clipper(model, CAPS[kind]())
    for _ in range(5):
        loop.step(gradients_of(model, size=0.1))
    dcp.save({"clipper": loop.clipper.state_dict()}, checkpoint_id=tmp_path, no_dist=True)

    early = CAPS[kind]()
    state = {"clipper": {"max_norm": early.state_dict()}}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    early.load_state_dict(state["clipper"]["max_norm"])
    with pytest.raises(ValueError, match="make the clipper first, and load then"):
        ComponentClipper(model, early)

    resumed = Clipper(model, CAPS[kind]())
    state = {"clipper": resumed.clipper.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    resumed.clipper.load_state_dict(state["clipper"])
    gradients = gradients_of(model)
    assert all(same_bits(a, b) for a, b in zip(loop.step(gradients), resumed.step(gradients), strict=True))


@every_way
@every_cap
def test_made_in_inference_mode(way, kind):
    skip_refused(way, kind)
    model = Model()
    with torch.inference_mode():
        loop = way(model, CAPS[kind]())
    expected = way(model := copy.deepcopy(model), CAPS[kind]())
    loop = loop if way is not InBackward else way(copy.deepcopy(model), CAPS[kind]())
    for _ in range(5):
        gradients = gradients_of(model)
        assert all(same_bits(a, b) for a, b in zip(loop.step(gradients), expected.step(gradients), strict=True))


@every_cap
def test_called_in_inference_mode(kind):
    model = Model()
    clippers = [ComponentClipper(model, CAPS[kind]()) for _ in range(2)]
    for _ in range(4):
        model.zero_grad()
        gradients = gradients_of(model)
        backward(model, gradients)
        expected = clippers[0].clip_()
        model.zero_grad()
        backward(model, gradients)
        with torch.inference_mode():
            found = clippers[1].clip_()
        assert same_bits(found.coefs, expected.coefs)
        found.norms.add_(1.0)  # an ordinary tensor
