"""The one native call of a steady training loop, which reads gradients itself: what it must notice, and leave to Python.

Calls of C++ and of Python that read torch's objects are both tried, on the CUDA backend's stand-in.
"""

import gc
import sys
import weakref
from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from cwclip_kernels import ComponentClipper, fused_component_clip_, thresholds
from cwclip_kernels.backends import native
from cwclip_kernels.core import run
from cwclip_kernels.core.formula import ClipRule
from helpers import DEVICE, assert_grads, copy_of, grads_of, parameter, parameters, random_grad, same_bits

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="about what lies before a launch, tried on CPU tensors")
CAP = 0.1


@pytest.fixture(params=("cpu", "cuda", "cuda-through-python"))
def backend(request, gpu):
    """Which one, and whether it calls torch's C++ functions or Python's."""
    name, _, through_python = request.param.partition("-")
    gpu.call_torch_through_python(bool(through_python))
    yield name
    gpu.call_torch_through_python(False)


@pytest.fixture
def general(monkeypatch):
    """Counts the calls that weren't served at once, but for those of the reference."""
    counted, clip_ = mock.Mock(), run.clip_

    def count(plan, *arguments):
        if all(bucket.backend != "reference" for bucket in plan.buckets):
            counted()
        return clip_(plan, *arguments)

    monkeypatch.setattr(run, "clip_", count)
    return counted


def clip_and_compare(clipper, params):
    """Clips as the reference does, and bumps each version once."""
    expected, versions = copy_of(params), [p.grad._version for p in params if p.grad is not None]
    result = clipper.clip_()
    norms = fused_component_clip_(expected, CAP, backend="reference")
    assert torch.allclose(result.norms, norms.to(result.norms.dtype), rtol=1e-6)
    assert_grads(params, expected)
    assert [p.grad._version for p in params if p.grad is not None] == [v + 1 for v in versions]
    return result


def steady(backend, shapes=((30,), (4, 4), (5,)), **options):
    """A clipper that has been called, and its parameters."""
    params = parameters(shapes)
    clipper = ComponentClipper(params, CAP, backend=backend, **options)
    clipper.clip_()
    for p in params:
        p.grad = random_grad(p.shape)
    return clipper, params


def assert_refused(clipper, params, error, message):
    """With no bit and no version changed, and clipped again once the gradient is as before."""
    present = [p for p in params if p.grad is not None]
    before = [p.grad.detach().clone() for p in present], [p.grad._version for p in present]
    with pytest.raises(error, match=message):
        clipper.clip_()
    assert all(same_bits(p.grad.detach(), grad) for p, grad in zip(present, before[0], strict=True))
    assert [p.grad._version for p in present] == before[1]


def test_a_steady_loop_is_served_at_once(backend, general):
    clipper, params = steady(backend)
    assert general.call_count == 1
    kept = []
    for step in range(6):
        if step % 2:
            for p in params:
                p.grad = random_grad(p.shape)
        kept.append(clip_and_compare(clipper, params))
    assert general.call_count == 1
    results = [tensor for result in kept for tensor in (result.norms, result.coefs)]
    assert len({tensor.untyped_storage().data_ptr() for tensor in results}) == len(results)
    assert all(tensor.is_contiguous() and tensor.nbytes == 12 for tensor in results)


def test_with_caps_of_all_kinds_and_a_loss_scale(backend, general):
    params = parameters([(30,), (4, 4)])
    caps = (0.1, torch.tensor(0.1), torch.tensor([0.1, 0.2]), {"0": 0.1, "1": 0.2}, thresholds.ParamRelative(0.01))
    for cap in caps:
        clipper, reference = (ComponentClipper(params, cap, backend=name) for name in (backend, "reference"))
        clipper.clip_()
        count = general.call_count
        for scale in (None, 0.5, torch.tensor(0.25)):
            found, expected_found = torch.zeros(1), torch.zeros(1)
            for p in params:
                p.grad = random_grad(p.shape)
            params[0].grad[0] = float("inf") if scale is None else 1.0
            before = grads_of(params)
            result = clipper.clip_(inv_scale=scale, found_inf=found)
            clipped = grads_of(params)
            for p, grad in zip(params, before, strict=True):
                p.grad = grad
            expected = reference.clip_(inv_scale=scale, found_inf=expected_found)
            assert torch.allclose(result.norms, expected.norms, rtol=1e-6, equal_nan=True)
            for p, grad in zip(params, clipped, strict=True):
                torch.testing.assert_close(p.grad, grad, equal_nan=True, rtol=1e-6, atol=0)
            assert torch.equal(found, expected_found)
        assert general.call_count == count


def test_cut_gradients_and_those_left_alone(backend, general):
    params = parameters([(6, 2), (7,), (3,)])
    spec = {"components": lambda name, _: None if name == "1" else name}
    clipper = ComponentClipper(params, CAP, backend=backend, **spec)
    clipper.clip_()
    for p in params:
        p.grad = random_grad(p.shape)
    params[1].grad = random_grad((7,)).as_subclass(Subclass)  # isn't looked at
    untouched, version = params[1].grad.clone(), params[1].grad._version
    expected = copy_of([params[0], params[2]])
    clipper.clip_()
    fused_component_clip_(expected, CAP, backend="reference")
    assert_grads([params[0], params[2]], expected)
    assert same_bits(params[1].grad, untouched)
    assert params[1].grad._version == version


# -------------------------------------------------------------------------------------------------------
# What changes under the plan
# -------------------------------------------------------------------------------------------------------


class Subclass(torch.Tensor):
    pass


class Own(nn.Parameter):
    """A parameter of another type, such as quantized ones."""


class Unreadable(nn.Parameter):
    """Has no gradient to be read."""

    is_broken = False

    @property
    def grad(self):
        if self.is_broken:
            raise KeyError("no gradient here")
        return None


def same_memory_another_dtype(params):
    memory = params[1].grad
    params[1].data = torch.zeros(4, 8, dtype=torch.bfloat16)
    params[1].grad = memory.view(torch.bfloat16)


def same_memory_other_strides(params):
    params[1].grad = params[1].grad.t()


def same_memory_another_shape(params):
    memory = params[1].grad
    params[1].data = torch.zeros(2, 8)
    params[1].grad = memory.view(2, 8)


def one_is_gone(params):
    params[1].grad = None


def another_shape(params):
    params[0].data = torch.zeros(31)
    params[0].grad = random_grad((31,))


def of_a_graph(params):
    x = params[0]
    (x.detach().requires_grad_() ** 2).sum()
    x.grad = None
    (x**3 + x).sum().backward(create_graph=True)


@pytest.mark.parametrize(
    "change",
    [
        same_memory_another_dtype,
        same_memory_other_strides,
        same_memory_another_shape,
        one_is_gone,
        another_shape,
        of_a_graph,
    ],
)
@pytest.mark.filterwarnings("ignore:Using backward")
def test_a_change_is_noticed(backend, general, change):
    clipper, params = steady(backend)
    change(params)
    if change is of_a_graph:
        before = params[0].grad.detach().clone()
        result = clipper.clip_()
        torch.testing.assert_close(params[0].grad.detach(), before * result.coefs[0], rtol=1e-6, atol=0)
        params[0].grad = None
        params[0].grad = random_grad(params[0].shape)
    else:
        clip_and_compare(clipper, params)
    assert general.call_count == 2


def test_a_gradient_appears(backend, general):
    params = parameters([(30,), (4, 4)])
    params[1].grad = None
    clipper = ComponentClipper(params, CAP, backend=backend)
    clipper.clip_()
    clip_and_compare(clipper, params)
    assert general.call_count == 1
    grad = random_grad((4, 4))
    for _ in range(3):  # both plans are kept, and serve at once
        params[1].grad = grad
        clip_and_compare(clipper, params)
        params[1].grad = None
        clip_and_compare(clipper, params)
    assert general.call_count == 2


def test_gradients_that_must_not_be_written_to(backend):
    clipper, params = steady(backend)
    before = params[1].grad
    params[1].grad = nn.Parameter(random_grad((4, 4)))
    assert_refused(clipper, params, ValueError, "itself a parameter")
    params[1].grad = random_grad((4, 4)).requires_grad_()
    assert_refused(clipper, params, ValueError, "leaf that requires grad")
    params[1].grad = random_grad((4, 4)).as_subclass(Subclass)
    assert_refused(clipper, params, TypeError, "is a Subclass")
    params[1].grad = before
    clip_and_compare(clipper, params)


def test_gradients_that_come_to_share_memory(backend):
    clipper, params = steady(backend, ((4, 4), (4, 4)))
    memory = random_grad((6, 4))
    params[0].grad, params[1].grad = memory[:4], memory[2:]
    assert_refused(clipper, params, ValueError, "share memory")
    params[1].grad = random_grad((4, 4))
    clip_and_compare(clipper, params)


def test_parameters_of_other_types(backend, general):
    own = Own(torch.zeros(4))
    own.grad = random_grad((4,))
    frozen = Own(torch.zeros(3), requires_grad=False)
    unreadable = Unreadable(torch.zeros(2))
    params = [*parameters([(30,)]), own, frozen, unreadable]
    clipper = ComponentClipper(params, CAP, backend=backend)
    clipper.clip_()
    for p in params[:2]:
        p.grad = random_grad(p.shape)
    clip_and_compare(clipper, params)
    assert general.call_count == 1
    unreadable.is_broken = True
    with pytest.raises(KeyError, match="no gradient here"):
        clipper.clip_()


def test_sparse_gradients_go_on_as_they_were(backend, general):
    clipper, params = steady(backend)
    params[1].grad = random_grad((4, 4)).to_sparse()
    clipper.clip_()
    clipper.clip_()
    assert general.call_count == 3


# -------------------------------------------------------------------------------------------------------
# References
# -------------------------------------------------------------------------------------------------------


def test_no_reference_is_kept_or_lost(backend):
    clipper, params = steady(backend)
    grads = [p.grad for p in params]

    def counts():
        objects = [*grads, *params, None, clipper._tensors, *(p.grad for p in params)]
        return [sys.getrefcount(thing) for thing in objects if thing is not None]

    before = counts()
    for _ in range(50):
        clipper.clip_()
    assert counts() == before
    for _ in range(50):  # refused half-way
        params[2].grad = grads[0][:5]
        with pytest.raises(ValueError, match="share memory"):
            clipper.clip_()
        params[2].grad = grads[2]
    gc.collect()
    assert counts() == before
    gone = weakref.ref(grads[1])
    params[1].grad = None
    del grads[1]
    gc.collect()
    assert gone() is None


def test_gradients_are_read_as_python_reads_them(gpu, backend):
    del backend
    params = [*parameters([(3,), (2, 2)]), Own(torch.zeros(2)), parameter(None), torch.zeros(2)]
    found = gpu.gradients_of(tuple(params))
    assert all(one is p.grad for one, p in zip(found, params, strict=True))
    assert gpu.gradients_of(()) == []
    nothing = sys.getrefcount(None)
    for _ in range(1000):
        gpu.gradients_of(tuple(params))
    assert abs(sys.getrefcount(None) - nothing) < 500
    with pytest.raises(AttributeError):
        gpu.gradients_of((params[0], 7))
    with pytest.raises(TypeError, match="expected a tuple"):
        gpu.gradients_of(params)
    broken = Unreadable(torch.zeros(1))
    broken.is_broken = True
    with pytest.raises(KeyError):
        gpu.gradients_of((*params, broken))


def test_torchs_functions_are_found_and_tried(gpu):
    """Of the torch that is tested here; where this fails, Python's functions serve, and clipping takes longer."""
    gpu.call_torch_through_python(True)
    assert not gpu.calls_torch_directly()
    gpu.call_torch_through_python(False)
    for mode in (torch.inference_mode(), FakeTensorMode()):
        with mode:
            assert not gpu.calls_torch_directly()  # can't be told
    with torch.device("meta"):
        assert gpu.calls_torch_directly()


# -------------------------------------------------------------------------------------------------------
# Modes of torch
# -------------------------------------------------------------------------------------------------------


def test_in_inference_mode_and_beside_other_modes(backend):
    clipper, params = steady(backend)
    expected = copy_of(params)
    with torch.inference_mode():
        clipper.clip_()
    fused_component_clip_(expected, CAP, backend="reference")
    assert_grads(params, expected)
    for p in params:
        p.grad = random_grad(p.shape)
    with torch.overrides.BaseTorchFunctionMode():
        clip_and_compare(clipper, params)
    for p in params:
        p.grad = random_grad(p.shape)
    with torch.enable_grad():
        result = clip_and_compare(clipper, params)
    assert not result.norms.requires_grad
    with torch.inference_mode():  # has no version; refused where a plan is made, not at each call
        params[0].grad = torch.ones(30)
    versions = [p.grad._version for p in params[1:]]
    clipper.clip_()
    assert [p.grad._version for p in params[1:]] == [v + 1 for v in versions]


def test_beside_fake_tensors(backend):
    clipper, params = steady(backend)
    session, before = clipper._session, grads_of(params)
    policy, options = clipper._caps(), clipper._options
    with FakeTensorMode(allow_non_fake_inputs=True):  # results would have no address
        assert run.clip_at_once_(session.plans, tuple(params), policy, options.rule, backend) is None
    assert all(map(same_bits, before, grads_of(params)))
    clip_and_compare(clipper, params)


# -------------------------------------------------------------------------------------------------------
# Streams
# -------------------------------------------------------------------------------------------------------


def workspaces_of(clipper):
    ((plan,),) = clipper._session.plans._kept.values()
    return plan.buckets[0].state.workspaces


def test_a_stream_that_has_the_handle_of_one_that_is_gone(gpu, general):
    """Work of the first may still run on its workspace: a number, unlike a handle, is never used again."""
    handle = 0x5EED
    gpu.set_stream(handle, 7, False)
    clipper, params = steady("cuda")
    clip_and_compare(clipper, params)
    first = workspaces_of(clipper)[7]
    waited = mock.Mock()
    ((plan,),) = clipper._session.plans._kept.values()
    with mock.patch.object(type(plan.buckets[0].state.tables), "wait", lambda self, number: waited(number)):
        gpu.set_stream(handle, 8, False)
        clip_and_compare(clipper, params)
    waited.assert_called_once_with(8)
    assert set(workspaces_of(clipper)) == {7, 8}
    assert workspaces_of(clipper)[8].data_ptr() != first.data_ptr()
    assert general.call_count == 2
    for number in (7, 8, 7):
        gpu.set_stream(handle, number, False)
        clip_and_compare(clipper, params)
    assert general.call_count == 2
    assert gpu.cuda_stream(0) == (handle, 7, False)


def test_the_same_stream_with_its_number_waits_once(monkeypatch):
    """``OnDevice`` for streams, of which there are none here."""
    from cwclip_kernels.backends.memory import OnDevice

    table = OnDevice(torch.zeros(3), torch.device("cpu"))
    table._arrived, table.tensor = mock.Mock(), mock.Mock()
    current = mock.Mock()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    for number in (7, 7, 8, 7, 8):
        table.wait(number)
    assert current.wait_event.call_count == 2


def test_a_captured_call_and_a_failed_launch(gpu, general):
    clipper, params = steady("cuda")
    gpu.set_stream(1, 0, True)
    clip_and_compare(clipper, params)
    assert general.call_count == 2
    assert set(workspaces_of(clipper)) == {0}
    gpu.set_stream(0, 0, False)
    clip_and_compare(clipper, params)
    assert general.call_count == 2
    with (
        mock.patch.object(gpu, "cuda_clip_at_once", side_effect=RuntimeError("CUDA, launching")),
        pytest.raises(RuntimeError, match="CUDA, launching"),
    ):
        clipper.clip_()
    assert not workspaces_of(clipper)  # which may not have been left zeros
    clip_and_compare(clipper, params)


# -------------------------------------------------------------------------------------------------------
# Arguments
# -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cpu_clip_at_once", "cuda_clip_at_once"])
def test_arguments_are_checked(gpu, name):
    clipper, params = steady(name.partition("_")[0])
    ((plan,),) = clipper._session.plans._kept.values()
    bucket = plan.buckets[0]
    first = (bucket.state.program, bucket.state.workspaces) if name[1] == "u" else (bucket.state.program,)
    rule, caps = native._rule(2.0, 1e-6, "propagate"), torch.tensor(CAP, dtype=torch.float64)
    signature, last = bucket.addresses.signature, bucket.addresses.last[True]
    rest = [tuple(params), signature, last, rule, caps, None, None, torch.empty(3), torch.empty(3)]
    call = getattr(native._C, name)
    assert isinstance(call(*first, *rest), bytes)
    versions = [p.grad._version for p in params]
    before = grads_of(params)
    for place, wrong in (
        (0, params),
        (0, None),
        (1, "signature"),
        (2, 7),
        (3, None),
        (3, bucket.state.program),
    ):
        with pytest.raises((TypeError, ValueError)):
            call(*first, *rest[:place], wrong, *rest[place + 1 :])
    with pytest.raises((TypeError, ValueError)):
        call(None, *first[1:], *rest)
    with pytest.raises(TypeError, match=name):
        call(*first)
    for place, other in (
        (0, (*params, params[0])),
        (0, tuple(params[:2])),
        (0, ()),
        (0, (*params[:2], 7)),
        (1, signature[:-8]),
        (1, b""),
        (4, torch.zeros((), device="meta")),
        (4, None),
        (7, None),
        (8, "coefs"),
    ):
        assert call(*first, *rest[:place], other, *rest[place + 1 :]) is None
    assert all(map(same_bits, before, grads_of(params)))
    assert versions == [p.grad._version for p in params]
    assert ClipRule().norm_type == 2.0
    del gpu
