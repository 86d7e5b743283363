"""What one way to clip did otherwise than the others, or a step otherwise than the one before it."""

import math

import pytest
import torch
from torch import nn

from cwclip_kernels import (
    ComponentClipper,
    clip_gradients,
    clip_gradients_,
    component_clip_with_norms_,
    component_norms,
    fused_component_clip_,
    thresholds,
)
from cwclip_kernels.core.options import check_options
from cwclip_kernels.core.session import ClipSession
from cwclip_kernels.optim import ComponentClipAdamW
from helpers import BACKENDS, DEVICE, parameter

THRESHOLDS = {
    "Schedule": lambda: thresholds.Schedule(lambda step: 1.0 / (1 + step)),
    "tensor": lambda: torch.tensor(1.0, dtype=torch.float64, device=DEVICE),
    "tensor of K": lambda: torch.tensor([1.0, 0.5], dtype=torch.float64, device=DEVICE),
    "float32 tensor": lambda: torch.tensor([1.0, 0.5], device=DEVICE),
    "pattern": lambda: {"*weight": thresholds.Schedule(lambda step: 1.0 / (1 + step))},
    "Bounded": lambda: thresholds.Bounded(thresholds.Schedule(lambda step: 1.0 / (1 + step)), high=0.8),
    "EMA": lambda: thresholds.EMA(warmup_steps=2),
    "ZScore": lambda: thresholds.ZScore(warmup_steps=2),
    "Percentile": lambda: thresholds.Percentile(40.0, window=3),
    "ParamRelative": lambda: thresholds.ParamRelative(0.1),
    "RMS": lambda: thresholds.RMS(0.1),
}


def linear(scale=1.0):
    """A Linear(2, 1) with gradients [3, 4] and [2]."""
    model = nn.Linear(2, 1, device=DEVICE)
    give(model, scale)
    return model


def give(model, scale=1.0):
    model.weight.grad = scale * torch.tensor([[3.0, 4.0]], device=DEVICE)
    model.bias.grad = scale * torch.tensor([2.0], device=DEVICE)


def results_of(way, model, max_norm):
    """The call of one step, which returns its result."""
    if way == "optimizer":
        own = ComponentClipAdamW(model.named_parameters(), max_norm=max_norm)
        return lambda: (own.step(), own.last)[1]
    clipper = ComponentClipper(model, max_norm)
    if way == "clipper":
        return clipper.clip_
    if way == "halves":
        return lambda: clipper.clip_with_norms_(clipper.norms())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = clipper.attach(optimizer)
    return lambda: (optimizer.step(), handle.last)[1]


@pytest.mark.parametrize("way", ["clipper", "halves", "attach", "optimizer"])
@pytest.mark.parametrize("kind", THRESHOLDS)
def test_results_of_earlier_steps_stay_as_they_were(kind, way):
    """Nothing needs a look at a result before the next step."""
    model, max_norm = linear(), THRESHOLDS[kind]()
    step = results_of(way, model, max_norm)
    found = []
    for k in range(4):
        give(model, 1.0 + k)
        result = step()
        found.append((result, result.caps.clone(), result.norms.clone(), result.coefs.clone()))
        if isinstance(max_norm, torch.Tensor):
            max_norm.mul_(0.5)
    for result, caps, norms, coefs in found:
        for now, then in ((result.caps, caps), (result.norms, norms), (result.coefs, coefs)):
            torch.testing.assert_close(now, then, rtol=0.0, atol=0.0)
    if kind not in ("RMS", "ZScore", "ParamRelative"):
        assert not torch.equal(found[0][1], found[-1][1])


def test_max_norm_of_a_clipper_is_not_assigned():
    clipper = ComponentClipper(linear(), 1.0)
    with pytest.raises(AttributeError, match="max_norm: can't be assigned"):
        clipper.max_norm = 0.01
    assert clipper.max_norm == 1.0
    assert clipper.clip_().caps == 1.0


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_a_number_of_non_zeros_has_no_loss_scale(backend):
    if backend in ("cpu", "cuda", "triton"):
        pytest.skip("no kernel of that order")
    scale, wanted = 1024.0, torch.tensor([2.0, 1.0], device=DEVICE)
    model = linear(scale)
    assert torch.equal(component_norms(model, 0.0, inv_scale=1 / scale, backend=backend), wanted)
    assert torch.equal(fused_component_clip_(model, 1.0, 0.0, eps=0.0, inv_scale=1 / scale, backend=backend), wanted)
    expected = linear()
    fused_component_clip_(expected, 1.0, 0.0, eps=0.0, backend=backend)
    torch.testing.assert_close(model.weight.grad, expected.weight.grad)
    halves = linear(scale)
    coefs = component_clip_with_norms_(halves, 1.0, wanted, 0.0, eps=0.0, inv_scale=1 / scale, backend=backend)
    assert coefs.tolist() == [0.5, 1.0]
    torch.testing.assert_close(halves.weight.grad, expected.weight.grad)
    grads = {name: p.grad for name, p in linear(scale).named_parameters()}
    new, norms = clip_gradients(grads, 1.0, 0.0, eps=0.0, inv_scale=1 / scale, backend=backend)
    assert torch.equal(norms, wanted)
    torch.testing.assert_close(new["weight"], expected.weight.grad)
    if backend is None:
        grads = {name: grad.requires_grad_().clone() for name, grad in grads.items()}
        new, norms = clip_gradients(grads, 1.0, 0.0, eps=0.0, inv_scale=1 / scale)
        assert torch.equal(norms, wanted)
        torch.testing.assert_close(new["weight"].detach(), expected.weight.grad)
        optimizer = ComponentClipAdamW(linear(scale).named_parameters(), max_norm=1.0, norm_type=0.0)
        optimizer.grad_scale = torch.tensor(scale, device=DEVICE)
        optimizer.found_inf = torch.zeros((), device=DEVICE)
        optimizer.step()
        assert torch.equal(optimizer.last.norms, wanted)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, 3.0, 0.0, -1.0, -math.inf])
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_global_norm_of_a_warm_up(norm_type, has_bias):
    """AdaGC's first steps are torch's: one coefficient by the norm of all components together."""
    model, small = linear(), 0.1
    if not has_bias:
        model.bias.grad = None
    clipper = ComponentClipper(model, thresholds.EMA(warmup_norm=small), norm_type, eps=0.0)
    result = clipper.clip_()
    wanted = small / clipper.total_norm(result.norms)
    assert result.coefs[0].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert result.coefs[1].item() == pytest.approx(wanted.item() if has_bias else 1.0, rel=1e-5)


def test_caps_that_another_thread_has_set_meanwhile():
    """Sessions are shared by names and looks: a call of another thread comes between two lines of this one."""
    rule, tensors = check_options().rule, [parameter(None)]
    kept, others = [None], [9.0]

    def keep(session, value):
        kept[0] = value
        if others and value is not None:
            session.caps_for(others.pop(), tensors, rule)

    known = ComponentClipper(tensors, 1.0)._session
    kind = type("Interrupted", (ClipSession,), {"_last_fixed": property(lambda _: kept[0], keep)})
    session = kind(known.components, tensors)
    assert session.caps_for(0.25, tensors, rule).caps(torch.device(DEVICE), None) == 0.25
    assert not others


@pytest.mark.parametrize("function", [clip_gradients, clip_gradients_])
@pytest.mark.parametrize("kind", ["EMA", "ZScore", "Percentile", "pattern"])
def test_gradients_that_come_and_go_teach_one_threshold(kind, function):
    """As ``torch.autograd.grad(..., allow_unused=True)`` returns them; each kind of look has its own session."""
    max_norm = {"*": thresholds.EMA()} if kind == "pattern" else getattr(thresholds, kind)()
    for k in range(6):
        bias = None if k % 2 else torch.ones(2, device=DEVICE)
        function({"weight": torch.ones(3, device=DEVICE), "bias": bias}, max_norm)


@pytest.mark.builds
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # of importing inductor
class TestCompiled:
    @pytest.fixture(autouse=True)
    def _forget(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    def test_param_groups_whose_caps_part_ways(self):
        model = linear()
        groups = [{"params": [model.weight]}, {"params": [model.bias]}]
        optimizer = ComponentClipAdamW(groups, max_norm=0.1)
        step = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")
        step()
        optimizer.param_groups[1]["max_norm"] = 0.001
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(Exception, match="different max_norm"):  # one of Dynamo's, around ours
            step()
        assert all(map(torch.equal, before, model.parameters()))
        optimizer.param_groups[0]["max_norm"] = 0.001
        give(model)
        step()
        torch.testing.assert_close(optimizer.last.coefs, 0.001 / optimizer.last.norms, rtol=1e-4, atol=0.0)

    @pytest.mark.parametrize("nonfinite", ["propagate", "error"])
    @pytest.mark.parametrize("kind", ["EMA", "ZScore", "Percentile", "pattern", "Bounded"])
    def test_skipped_steps_teach_nothing(self, kind, nonfinite):
        makes = {"pattern": lambda: {"*": thresholds.ZScore(warmup_steps=1)}, "EMA": THRESHOLDS["EMA"]}
        makes["Bounded"] = lambda: thresholds.Bounded(thresholds.ZScore(), high=10.0)
        learnt = []
        for compiled in (True, False):
            model, max_norm = linear(), makes.get(kind, getattr(thresholds, kind, None))()
            with torch.no_grad():
                for p in model.parameters():
                    p.fill_(0.5)
            optimizer = ComponentClipAdamW(model.named_parameters(), max_norm=max_norm, nonfinite=nonfinite)
            scaler = torch.amp.GradScaler(DEVICE, init_scale=4.0)
            if compiled:
                optimizer.step = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")
            for k in range(4):
                scaler.scale(torch.ones((), device=DEVICE))
                give(model, scaler.get_scale() * (100.0 if k == 1 else 1.0))
                if k == 1:
                    model.bias.grad.fill_(math.inf)
                scaler.step(optimizer)
                scaler.update()
            threshold = max_norm["*"] if isinstance(max_norm, dict) else max_norm
            learnt.append([t.clone() for t in threshold.state_tensors()] + [p.detach() for p in model.parameters()])
        assert len(learnt[0]) > 2
        for ours, eager in zip(*learnt, strict=True):
            torch.testing.assert_close(ours, eager, rtol=0.0, atol=0.0)

    def test_a_step_without_gradients(self):
        lasts = []
        for compiled in (True, False):
            model, max_norm = linear(), thresholds.EMA(warmup_steps=2)
            optimizer = ComponentClipAdamW(model.named_parameters(), max_norm=max_norm)
            optimizer.zero_grad()
            step = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager") if compiled else optimizer.step
            for _ in range(3):
                step()
            lasts.append((optimizer.last, [t.clone() for t in max_norm.state_tensors()]))
        (ours, own), (eager, theirs) = lasts
        assert ours.names == eager.names
        pairs = [(getattr(ours, name), getattr(eager, name)) for name in ("norms", "coefs", "caps")]
        for a, b in (*pairs, *zip(own, theirs, strict=True)):
            torch.testing.assert_close(a, b, rtol=0.0, atol=0.0)

    def test_numbers_that_change_from_call_to_call(self):
        model = linear()

        def step(inverse, eps):
            norms = component_norms(model, inv_scale=inverse)
            return norms, fused_component_clip_(model, 1.0, eps=eps, inv_scale=inverse)

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for inverse, eps in ((0.5, 1e-6), (0.25, 1e-3), (0.125, 0.5), (2.0, 0.0)):
            give(model)
            ours = compiled(inverse, eps)
            give(model)
            for a, b in zip(ours, step(inverse, eps), strict=True):
                torch.testing.assert_close(a, b, rtol=0.0, atol=0.0)
