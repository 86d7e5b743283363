"""Around the arithmetic: plans and caches, version counters, autograd, tracing, huge tensors."""

import copy
import gc
import math
import sys
import threading
import time
import weakref
from collections import OrderedDict

import pytest
import torch

from cwclip_kernels import ClipResult, ComponentClipper, component_norms, fused_component_clip_
from cwclip_kernels.backends import native
from cwclip_kernels.core import cache
from helpers import (
    BACKENDS,
    DEVICE,
    FUSED,
    assert_grads,
    copy_of,
    grads_of,
    parameter,
    parameters,
    random_grad,
    same_bits,
)


class Grouper(torch.nn.Sequential):
    """A model whose own method groups its parameters: the callable holds the model."""

    def group_of(self, name, parameter):
        return name.partition(".")[0]


def model_with_grads():
    model = Grouper(torch.nn.Linear(6, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 2)).to(DEVICE)
    for p in model.parameters():
        p.grad = random_grad(p.shape)
    return model


@pytest.mark.parametrize("backend", BACKENDS)
def test_versions_are_bumped_so_that_autograd_sees_the_write(backend):
    params = parameters([(3,), (4,)])
    versions = [p.grad._version for p in params]
    fused_component_clip_(params, 0.01, backend=backend)
    assert all(p.grad._version > v for p, v in zip(params, versions, strict=True))
    param = parameter(random_grad((3,)))
    leaf = torch.ones(3, device=DEVICE, requires_grad=True)
    product = leaf * param.grad  # keeps the gradient for its own backward
    fused_component_clip_([param], 0.01, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_measuring_changes_nothing(backend):
    params = parameters([(3,), (40,)])
    before, versions = grads_of(params), [p.grad._version for p in params]
    norms = component_norms(params, backend=backend)
    assert torch.equal(norms, ComponentClipper(params, 0.1, backend=backend).norms())
    assert all(same_bits(p.grad, b) for p, b in zip(params, before, strict=True))
    assert versions == [p.grad._version for p in params]


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_carry_no_graph(backend):
    x = torch.randn(4, device=DEVICE, requires_grad=True)
    (grad,) = torch.autograd.grad((1e3 * x**3).sum(), x, create_graph=True)
    x.grad = grad
    before = grad.detach().clone()
    result = ComponentClipper([x], torch.tensor(0.1, requires_grad=True), backend=backend).clip_()
    assert not result.norms.requires_grad
    assert not result.coefs.requires_grad
    torch.testing.assert_close(x.grad.detach(), before * (0.1 / (before.norm() + 1e-6)))


def test_result_reads_as_it_is_named():
    params = [
        parameter(torch.tensor([3.0, 4.0], device=DEVICE)),
        parameter(torch.tensor([0.5], device=DEVICE)),
    ]
    result = ComponentClipper([("w", params[0]), ("b", params[1])], 1.0).clip_()
    assert isinstance(result, ClipResult)
    assert result.clipped.tolist() == [True, False]
    assert result.as_dict() == {"w": (5.0, pytest.approx(0.2)), "b": (0.5, 1.0)}


def test_a_plan_is_made_once_and_again_when_something_changes():
    params = parameters([(30,), (4, 5)])
    clipper = ComponentClipper(params, 0.1)
    planner = clipper._session.plans

    def clip():
        expected = copy_of(params)
        clipper.clip_()
        fused_component_clip_(expected, 0.1, backend="reference")
        assert_grads(params, expected)
        return planner._kept[2.0, None, True][0]

    first = clip()
    for p in params:
        p.grad = random_grad(p.shape)
    assert clip() is first
    params[0].grad = None
    second = clip()
    assert second is not first
    made = planner.made
    for _ in range(3):  # a gradient that comes and goes
        params[0].grad = random_grad((30,))
        assert clip() is first
        params[0].grad = None
        assert clip() is second
    assert planner.made == made
    params[0].grad = random_grad((30,))
    for p in params:  # as model.double() does, keeping the Parameter objects
        p.data, p.grad = p.data.double(), None
        p.grad = random_grad(p.shape, torch.float64)
    third = clip()
    assert third is not second
    assert clipper.norms().dtype == torch.float64
    params[1].grad = random_grad((5, 4), torch.float64).t()
    clip()


@pytest.mark.parametrize("backend", FUSED)
def test_shapes_that_change_under_the_same_parameters(backend):
    """FSDP and others swap p.data for another size."""
    param = parameter(random_grad((30,)))
    clipper = ComponentClipper([param], 0.1, backend=backend)
    for size in (30, 50, 2, 0, 1000):
        param.grad = None
        param.data = torch.zeros(size, device=DEVICE)
        param.grad = random_grad((size,))
        expected = copy_of([param])
        clipper.clip_()
        fused_component_clip_(expected, 0.1, backend="reference")
        assert_grads([param], expected)


def test_the_function_sees_changes_of_a_model():
    model = model_with_grads()
    assert fused_component_clip_(model, 0.1).shape == (6,)
    model.append(torch.nn.Linear(2, 1).to(DEVICE))
    assert fused_component_clip_(model, 0.1).shape == (8,)
    model[0].weight = torch.nn.Parameter(torch.zeros(5, 6, device=DEVICE))
    model[0].weight.grad = random_grad((5, 6), scale=9.0)
    fused_component_clip_(model, 0.1)
    assert model[0].weight.grad.norm() < 0.1001
    del model[3]
    assert fused_component_clip_(model, 0.1).shape == (6,)
    assert fused_component_clip_(copy.deepcopy(model), 0.1).shape == (6,)


def test_the_function_tells_groupings_apart():
    model = model_with_grads()
    assert fused_component_clip_(model, 0.1).shape == (6,)
    assert fused_component_clip_(model, 0.1, components="module").shape == (3,)
    assert fused_component_clip_(model, 0.1, components=lambda n, p: n.endswith("bias")).shape == (2,)
    assert fused_component_clip_(model, 0.1, components=lambda n, p: p.ndim).shape == (2,)
    assert fused_component_clip_([("x", model[0].weight)], {"x": 1.0}).shape == (1,)
    assert fused_component_clip_([("y", model[0].weight)], {"y": 1.0}).shape == (1,)


@pytest.mark.usefixtures("own_garbage")
def test_the_cache_keeps_no_model_alive_and_stays_small(monkeypatch):
    # What other tests have left in it isn't counted.
    monkeypatch.setattr(cache, "_entries", OrderedDict())
    monkeypatch.setattr(cache, "_until_purge", 8)
    model = model_with_grads()
    fused_component_clip_(model, 0.1)
    fused_component_clip_(list(model.parameters()), 0.1, components=model.group_of)
    watch = weakref.ref(model[0].weight)
    del model
    gc.collect()
    assert watch() is None
    for _ in range(50):
        fused_component_clip_(parameters([(2,)]), 0.1)
    assert len(cache._entries) <= 16


def test_generators_and_repeated_tensors():
    model = model_with_grads()
    before = grads_of(model.parameters())
    twice = [*model.parameters(), *model.parameters()]
    norms = fused_component_clip_(twice, 0.1)
    assert norms.shape == (6,)
    for p, b in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.grad, b * min(1.0, 0.1 / (b.norm().item() + 1e-6)))
    assert fused_component_clip_(model.parameters(), 0.1).shape == (6,)
    assert fused_component_clip_(model.named_parameters(), 0.1).shape == (6,)


def test_tied_weights_count_once():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)).to(DEVICE)
    model[1].weight = model[0].weight
    model(torch.randn(3, 4, device=DEVICE)).sum().backward()
    grad = model[0].weight.grad.clone()
    clipper = ComponentClipper(model, 0.1)
    assert clipper.names == ("0.weight", "0.bias", "1.bias")
    assert clipper.clip_().norms[0].item() == pytest.approx(grad.norm().item())
    torch.testing.assert_close(model[0].weight.grad, grad * (0.1 / (grad.norm() + 1e-6)))


@pytest.mark.usefixtures("needs_extension")
def test_threads_with_models_of_their_own():
    failures = []

    def work(seed):
        try:
            for _ in range(30):
                params = [parameter(torch.full((50, 30), float(seed), device=DEVICE)) for _ in range(4)]
                fused_component_clip_(params, 1.0, backend=BACKENDS[0] if BACKENDS[0] != "triton" else None)
                assert all(abs(p.grad.norm().item() - 1.0) < 1e-4 for p in params)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2, 3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


@pytest.mark.usefixtures("needs_extension")
def test_explain_names_backend_and_reason():
    model = model_with_grads()
    text = ComponentClipper(model, 1.0).explain()
    assert "6 components over 6 tensors" in text
    assert "6 float32" in text
    assert "in one fused call" in text
    for p in model.parameters():
        p.grad = None
    assert "6 float32" in ComponentClipper(model, 1.0, backend="foreach").explain()
    assert "'foreach' (asked for by name)" in ComponentClipper(model, 1.0, backend="foreach").explain()


@pytest.mark.usefixtures("needs_extension")
@pytest.mark.skipif(DEVICE != "cpu", reason="the native functions serve CPU tensors")
class TestNativeCalls:
    def program(self, **change):
        component_norms(parameters([(1,)]), backend="cpu")  # loads the extension
        grads = [torch.randn(10), torch.randn(4, 3, dtype=torch.bfloat16), torch.randn(2, 2)]
        given = {"components": [0, 1, 0], "cuts": None, "count": 2, **change}
        packed = None if given["cuts"] is None else native.packed(given["cuts"])
        layout = native._C.signature_of(grads)
        return native._C.cpu_program(layout, native.packed(given["components"]), packed, given["count"], False)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"components": [0]}, "components: expected one for each of the 3 gradients"),
            ({"components": [0, 1, 2]}, r"components\[2\] is outside \[0, 2\)"),
            ({"components": [0, 1, -1]}, r"components\[2\] is outside"),
            ({"count": -1}, "count: expected a number from 0"),
            ({"count": 2**31}, "count: expected a number from 0"),
            ({"cuts": [0, 0, 1, 0]}, "cuts: too short"),
            ({"cuts": [0, 0, 1, 0, 2, 0, 0]}, "cuts: too long"),
            ({"cuts": [0, 0, 1, 0, 3, 0]}, "cuts: there is no gradient 3"),
            ({"cuts": [0, 0, 1, 0, 1, 1, 0, 3, 2]}, r"cuts: a piece lies outside of grads\[1\]"),
            ({"cuts": [0, 0, 1, 0, 1, 1, 0, 2**62, 2**62]}, r"outside of grads\[1\]"),
        ],
    )
    def test_a_program_that_cant_be(self, change, message):
        with pytest.raises(RuntimeError, match=message):
            self.program(**change)

    def test_calls_check_what_they_get(self):
        extension, program, sums = native._C, self.program(), torch.zeros(2, dtype=torch.float64)
        for addresses in (b"", bytes(16), bytes(25)):
            with pytest.raises(ValueError, match="addresses: expected one for each gradient"):
                extension.cpu_power_sums(program, addresses, 2.0, sums.data_ptr())
        with pytest.raises(ValueError, match="norm_type: expected 1, 2 or inf"):
            extension.cpu_power_sums(program, bytes(24), 3.0, sums.data_ptr())
        with pytest.raises(ValueError, match="PyCapsule"):
            extension.cpu_power_sums(None, bytes(24), 2.0, sums.data_ptr())
        with pytest.raises(TypeError, match="cpu_scale"):
            extension.cpu_scale(program)

    @pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # of torch 2.10
    def test_a_profiler_sees_a_range(self):
        params = parameters([(30,), (4, 5)])
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            fused_component_clip_(params, 0.1, backend="cpu")
            fused_component_clip_(params, 0.1, backend="cpu", error_if_nonfinite=True)
            component_norms(params, backend="cpu")
        names = {event.key for event in profile.key_averages()}
        assert {f"cwclip_kernels::{name}" for name in ("clip_", "power_sums", "scale_")} <= names

    def test_other_threads_run_meanwhile(self):
        """A call lets go of the GIL: what counts in another thread goes on counting."""
        params = parameters([(1 << 25,)])
        clipper = ComponentClipper(params, math.inf, backend="cpu")
        clipper.clip_()
        state = clipper._session.plans._kept[2.0, "cpu", True][0].buckets[0].state
        addresses = state.addresses.of([p.grad for p in params], writes=False)
        sums = torch.zeros(1, dtype=torch.float64)
        counted, stop = 0, False

        def count():
            nonlocal counted
            while not stop:
                counted += 1
                time.sleep(0)  # lets go of the GIL

        before = sys.getswitchinterval()
        sys.setswitchinterval(1000.0)  # so that no thread loses the GIL that doesn't let go of it
        thread = threading.Thread(target=count)
        thread.start()
        try:
            time.sleep(0.01)
            seen = counted
            for _ in range(1000):  # on a busy machine the other thread may not run at once
                native._C.cpu_power_sums(state.program, addresses, 2.0, sums.data_ptr())
                if counted > seen:
                    break
            assert counted > seen
        finally:
            stop = True
            sys.setswitchinterval(before)
            thread.join()


@pytest.mark.usefixtures("needs_extension")
def test_few_frames_between_a_clipper_and_the_kernel():
    """What Python does at every call: counted, so that nothing creeps in."""
    params = parameters([(3,)] * 5)
    clipper = ComponentClipper(params, 0.1)
    clipper.clip_()
    calls = []

    def look(frame, event, argument):
        if event == "call" and "cwclip_kernels" in frame.f_code.co_filename:
            calls.append(frame.f_code.co_qualname if hasattr(frame.f_code, "co_qualname") else frame.f_code.co_name)

    sys.setprofile(look)
    try:
        clipper.clip_()
    finally:
        sys.setprofile(None)
    assert len(calls) <= 11, calls
