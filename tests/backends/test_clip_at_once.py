"""The one native call of a steady training loop, which reads gradients itself: what it notices, and leaves to Python.

Calls of C++ and of Python that read torch's objects are both tried, on the CUDA backend's stand-in.
"""

import gc
import sys
import weakref

import pytest
import torch
from torch import nn

from at_once import CAP, clip_and_compare, steady
from cwclip_kernels import ComponentClipper, fused_component_clip_, thresholds
from helpers import DEVICE, assert_grads, copy_of, grads_of, parameter, parameters, random_grad, same_bits

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="about what lies before a launch, tried on CPU tensors")


def assert_refused(clipper, params, error, message):
    """With no bit and no version changed, and clipped again once the gradient is as before."""
    present = [p for p in params if p.grad is not None]
    before = [p.grad.detach().clone() for p in present], [p.grad._version for p in present]
    with pytest.raises(error, match=message):
        clipper.clip_()
    assert all(same_bits(p.grad.detach(), grad) for p, grad in zip(present, before[0], strict=True))
    assert [p.grad._version for p in present] == before[1]


def test_a_steady_loop_is_served_at_once(native_way, general):
    clipper, params = steady(native_way)
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


def test_with_caps_of_all_kinds_and_a_loss_scale(native_way, general):
    params = parameters([(30,), (4, 4)])
    caps = (0.1, torch.tensor(0.1), torch.tensor([0.1, 0.2]), {"0": 0.1, "1": 0.2}, thresholds.ParamRelative(0.01))
    for cap in caps:
        clipper, reference = (ComponentClipper(params, cap, backend=name) for name in (native_way, "reference"))
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


def test_cut_gradients_and_those_left_alone(native_way, general):
    params = parameters([(6, 2), (7,), (3,)])
    spec = {"components": lambda name, _: None if name == "1" else name}
    clipper = ComponentClipper(params, CAP, backend=native_way, **spec)
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
    params[1].grad = memory.view(torch.bfloat16).copy_(random_grad((4, 8)))


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
def test_a_change_is_noticed(native_way, general, change):
    clipper, params = steady(native_way)
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


def test_a_gradient_appears(native_way, general):
    params = parameters([(30,), (4, 4)])
    params[1].grad = None
    clipper = ComponentClipper(params, CAP, backend=native_way)
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


def test_gradients_that_must_not_be_written_to(native_way):
    clipper, params = steady(native_way)
    before = params[1].grad
    params[1].grad = nn.Parameter(random_grad((4, 4)))
    assert_refused(clipper, params, ValueError, "itself a parameter")
    params[1].grad = random_grad((4, 4)).requires_grad_()
    assert_refused(clipper, params, ValueError, "leaf that requires grad")
    params[1].grad = random_grad((4, 4)).as_subclass(Subclass)
    assert_refused(clipper, params, TypeError, "is a Subclass")
    params[1].grad = before
    clip_and_compare(clipper, params)


def test_gradients_that_come_to_share_memory(native_way):
    clipper, params = steady(native_way, ((4, 4), (4, 4)))
    memory = random_grad((6, 4))
    params[0].grad, params[1].grad = memory[:4], memory[2:]
    assert_refused(clipper, params, ValueError, "share memory")
    params[1].grad = random_grad((4, 4))
    clip_and_compare(clipper, params)


def test_parameters_of_other_types(native_way, general):
    own = Own(torch.zeros(4))
    own.grad = random_grad((4,))
    frozen = Own(torch.zeros(3), requires_grad=False)
    unreadable = Unreadable(torch.zeros(2))
    params = [*parameters([(30,)]), own, frozen, unreadable]
    clipper = ComponentClipper(params, CAP, backend=native_way)
    clipper.clip_()
    for p in params[:2]:
        p.grad = random_grad(p.shape)
    clip_and_compare(clipper, params)
    assert general.call_count == 1
    unreadable.is_broken = True
    with pytest.raises(KeyError, match="no gradient here"):
        clipper.clip_()


def test_sparse_gradients_go_on_as_they_were(native_way, general):
    clipper, params = steady(native_way)
    params[1].grad = random_grad((4, 4)).to_sparse()
    clipper.clip_()
    clipper.clip_()
    assert general.call_count == 3


# -------------------------------------------------------------------------------------------------------
# References
# -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_garbage")
def test_no_reference_is_kept_or_lost(native_way):
    clipper, params = steady(native_way)
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


def test_gradients_are_read_as_python_reads_them(gpu, native_way):
    del native_way
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
