"""The native call that clips at once, called under modes of torch, on streams, and with wrong arguments."""

from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from at_once import CAP, clip_and_compare, steady
from cwclip_kernels import fused_component_clip_
from cwclip_kernels.backends import native
from cwclip_kernels.backends.memory import OnDevice
from cwclip_kernels.core import run
from helpers import DEVICE, assert_grads, copy_of, grads_of, random_grad, same_bits

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="about what lies before a launch, tried on CPU tensors")


# -------------------------------------------------------------------------------------------------------
# Modes of torch
# -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not torch.__version__.startswith(("2.11.", "2.13.")),
    reason="not called by name: csrc/common/tensor_calls.cpp, kTried",
)
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


def test_in_inference_mode_and_beside_other_modes(native_way):
    clipper, params = steady(native_way)
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


def test_beside_fake_tensors(native_way):
    clipper, params = steady(native_way)
    session, before = clipper._session, grads_of(params)
    policy, options = clipper._caps(), clipper._options
    with FakeTensorMode(allow_non_fake_inputs=True):  # results would have no address
        assert run.clip_at_once_(session.plans, tuple(params), policy, options.rule, native_way) is None
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
