"""Every way into the loop x every kind of cap x what happens to a model between two steps."""

import copy
import gc
import math
import warnings
import weakref

import pytest
import torch
from torch import nn

from cwclip_kernels import ComponentClipper, component_norms, fused_component_clip_, thresholds
from helpers import BACKENDS, DEVICE, same_bits
from ways import (
    CAP,
    CAPS,
    Function,
    InBackward,
    Model,
    backward,
    every_cap,
    every_way,
    gradients_of,
    skip_refused,
    trained,
)

# ------------------------------------------------------------------------------------------------------------
# Conversions and moves
# ------------------------------------------------------------------------------------------------------------


@every_way
@every_cap
def test_converted_between_two_steps(way, kind):
    """Another dtype under the same Parameter objects: results are those of a loop that never had the first."""
    skip_refused(way, kind)
    model = Model()
    loop = way(model, CAPS[kind]())
    loop.step(gradients_of(model))
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        model.zero_grad()
        model.to(dtype)
        gradients = [g.to(dtype) for g in gradients_of(model)]
        left = loop.step(gradients)
        assert {g.dtype for g in left} == {dtype}
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert component_norms(model).dtype == wide
        if hasattr(loop, "clipper"):
            assert loop.clipper.norms().dtype == wide
        if kind == "number":
            for g, before in zip(left, gradients, strict=True):
                assert g.norm().item() == pytest.approx(min(CAP, before.norm().item()), rel=1e-2)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("call", ["norms", "function", "clipper", "Percentile"])
def test_a_plan_notices_each_change(backend, call):
    model = nn.Linear(6, 4).to(DEVICE)

    def set_gradients(make):
        for p in model.parameters():
            p.grad = make(p)

    set_gradients(torch.randn_like)
    clipper = ComponentClipper(model, thresholds.Percentile() if call == "Percentile" else 0.1, backend=backend)
    clip = {
        "norms": lambda: component_norms(model, backend=backend),
        "function": lambda: fused_component_clip_(model, 0.1, backend=backend),
    }.get(call, lambda: clipper.clip_().norms)

    def check():
        expected = torch.stack([p.grad.to_dense().double().norm() for p in model.parameters()])
        found = clip()
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
        return found.dtype

    assert check() == torch.float32
    model.double()
    set_gradients(torch.randn_like)
    assert check() == torch.float64
    model.bfloat16()
    set_gradients(torch.randn_like)
    assert check() == torch.float32
    model.float()
    set_gradients(lambda p: torch.randn(p.shape[::-1], device=DEVICE).t() if p.ndim == 2 else torch.randn_like(p))
    check()
    set_gradients(lambda p: torch.randn_like(p).to_sparse())
    check()
    set_gradients(torch.randn_like)
    check()
    set_gradients(lambda p: torch.randn_like(p).requires_grad_())
    if call == "norms":
        check()
    else:
        with pytest.raises(ValueError, match="leaf that requires grad"):
            clip()
    model.weight = nn.Parameter(torch.zeros(9, 2, device=DEVICE))
    set_gradients(torch.randn_like)
    if call in ("norms", "function"):
        check()


@pytest.fixture
def _swapping():
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


@every_way
@every_cap
@pytest.mark.usefixtures("_swapping")
def test_a_model_can_still_be_moved(way, kind):
    """pytorch #187008: parameters that somebody has a weak reference to can't be swapped."""
    if kind in way.refused:
        pytest.skip("refused")
    model = Model()
    loop = way(model, CAPS[kind]())
    loop.step(gradients_of(model))
    fused_component_clip_(list(model.named_parameters()), loop.max_norm)
    component_norms(model)
    before = [id(p) for p in model.parameters()]
    model.double()
    loop.step(gradients_of(model))
    model.to_empty(device=DEVICE)
    model.float()
    assert [id(p) for p in model.parameters()] == before
    for p in model.parameters():
        assert not weakref.getweakrefs(p)
    loop.step(gradients_of(model))


@pytest.mark.usefixtures("own_garbage")
def test_an_address_that_another_tensor_has_now():
    """The function's cache goes by ids, which are reused; what is told apart is what the tensors look like."""
    for size in (3, 50, 7, 50, 3):
        model = nn.Module()
        model.weight = nn.Parameter(torch.zeros(size, device=DEVICE))
        model.weight.grad = torch.ones(size, device=DEVICE)
        spec = {"weight": thresholds.FromGlobal(1.0, "numel")}["weight"]
        assert fused_component_clip_([("weight", model.weight)], spec).item() == pytest.approx(math.sqrt(size))
        del model
        gc.collect()


# ------------------------------------------------------------------------------------------------------------
# Frozen
# ------------------------------------------------------------------------------------------------------------


@every_way
@pytest.mark.parametrize("split", ["uniform", "numel"])
def test_a_budget_is_for_what_is_trained(way, split):
    model = Model()
    loop = way(model, thresholds.FromGlobal(1.0, split))

    def norm_of_all():
        left = loop.step(gradients_of(model, size=100.0))
        return torch.stack([g.norm() for g in left]).norm().item()

    assert norm_of_all() == pytest.approx(1.0, rel=1e-4)
    if way is InBackward:  # whose hooks are on what was trained when it was set up
        return
    model.first.requires_grad_(False)
    assert norm_of_all() == pytest.approx(1.0, rel=1e-4)
    model.first.requires_grad_(True)
    assert norm_of_all() == pytest.approx(1.0, rel=1e-4)


class Packed(torch.Tensor):
    """As a quantized tensor: whatever is asked of its data is an error."""

    @staticmethod
    def __new__(cls, shape):
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32, device=DEVICE)

    def __init__(self, shape):
        pass

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]
        raise AssertionError(f"the data of a frozen parameter was asked for: {function}")


@every_way
@every_cap
@pytest.mark.parametrize("frozen", ["uint8", "subclass", "meta", "csr"])
def test_what_is_frozen_is_neither_measured_nor_refused(way, kind, frozen):
    skip_refused(way, kind)
    csr = None
    if frozen == "csr":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sparse CSR, once a process
            csr = nn.Parameter(torch.eye(4, device=DEVICE).to_sparse_csr(), requires_grad=False)
    made = {
        "uint8": lambda: nn.Parameter(torch.zeros(80, 1, dtype=torch.uint8, device=DEVICE), requires_grad=False),
        "subclass": lambda: nn.Parameter(Packed((4, 40)), requires_grad=False),
        "meta": lambda: nn.Parameter(torch.zeros(4, 40, device="meta"), requires_grad=False),
        "csr": lambda: csr,
    }
    plain = Model()
    plain.base = nn.Module()
    model = copy.deepcopy(plain)
    model.base.weight = made[frozen]()
    loops = [way(plain, CAPS[kind]()), way(model, CAPS[kind]())]
    for _ in range(4):
        gradients = gradients_of(plain)
        left, expected = loops[1].step(gradients), loops[0].step(gradients)
        assert all(same_bits(a, b) for a, b in zip(left, expected, strict=True))


def test_a_frozen_parameter_is_not_read():
    """A float base of a LoRA model: as many bytes as all the rest a hundred times over."""
    model = Model()
    model.base.weight.data.fill_(math.nan)
    threshold = thresholds.ParamRelative()
    clipper = ComponentClipper(model, threshold, components="all")
    model.zero_grad()
    backward(model, gradients_of(model))
    expected = 0.01 * torch.cat([p.detach().flatten() for p in trained(model)]).double().norm().item()
    assert clipper.clip_().caps.item() == pytest.approx(expected, rel=1e-5)


def test_what_is_only_measured_may_share_memory():
    storage = torch.randn(12, device=DEVICE)
    params = [nn.Parameter(storage.view(3, 4)), nn.Parameter(storage.view(12))]
    for p in params:
        p.grad = torch.randn_like(p)
    caps = ComponentClipper(params, thresholds.ParamRelative(1.0)).clip_().caps
    assert caps.tolist() == pytest.approx([storage.norm().item()] * 2, rel=1e-5)
    params[0].grad, params[1].grad = storage.view(3, 4), storage
    assert component_norms(params).tolist() == pytest.approx([storage.norm().item()] * 2, rel=1e-5)
    with pytest.raises(ValueError, match="share memory"):
        fused_component_clip_(params, 0.1)
    params[1].grad = torch.ones(1, device=DEVICE).expand(12)
    assert component_norms(params)[1].item() == pytest.approx(math.sqrt(12))


# ------------------------------------------------------------------------------------------------------------
# Without data
# ------------------------------------------------------------------------------------------------------------


@every_cap
@pytest.mark.parametrize("fake", [True, False])
def test_without_data(kind, fake):
    """What estimates memory runs a step on fake tensors or the meta device; nothing of it stays behind."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    cap = CAPS[kind]()
    with FakeTensorMode() if fake else torch.device("meta"):
        model = nn.Module()
        model.first, model.last = nn.Linear(5, 4, dtype=torch.float64), nn.Linear(4, 3, dtype=torch.float64)
        model.last(model.first(torch.randn(2, 5, dtype=torch.float64))).sum().backward()
        own = CAP if kind == "tensor" else cap
        norms = fused_component_clip_(model, own)
        assert norms.shape == (4,)
        assert norms.dtype == torch.float64
        assert component_norms(model, components="all").shape == (1,)
        result = ComponentClipper(model, own).clip_()
        assert result.coefs.shape == (4,)
        assert norms.is_meta != fake
        assert (type(norms) is not torch.Tensor) == fake
    real = Model()
    del real.base
    loops = [Function(real, cap), Function(copy.deepcopy(real), CAPS[kind]())]
    for _ in range(2):
        gradients = gradients_of(real)
        left, expected = (loop.step(gradients) for loop in loops)
        assert all(same_bits(a, b) for a, b in zip(left, expected, strict=True))


def test_nested_tensors_are_refused_by_name():
    with pytest.warns(UserWarning, match="nested tensors is in prototype stage"):
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], requires_grad=True)
    nested.to_padded_tensor(0.0).sum().backward()
    for call in (component_norms, lambda p: fused_component_clip_(p, 1.0)):
        with pytest.raises(TypeError, match="the gradient of 'w' is a nested tensor"):
            call([("w", nested)])


# ------------------------------------------------------------------------------------------------------------
# Replaced
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["to_empty", "assign", "one"])
def test_parameters_that_have_been_replaced(how):
    model = nn.Sequential(nn.Linear(3, 2, device="meta" if how == "to_empty" else DEVICE), nn.ReLU())
    clipper = ComponentClipper(model, CAP)
    if how == "to_empty":
        model.to_empty(device=DEVICE)
    elif how == "assign":
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    else:
        model[0].bias = nn.Parameter(torch.zeros(2, device=DEVICE))
    backward(model, gradients_of(model))
    with pytest.warns(
        UserWarning, match="'0.(weight|bias)' of the model has been replaced.* Make the clipper anew"
    ) as seen:
        clipper.clip_()
    assert len(seen) == 1
    assert seen[0].filename == __file__
    clipper.clip_()  # said once
    ComponentClipper(model, CAP).clip_()


def test_parameters_that_are_replaced_under_a_plan_that_is_known():
    """The old ones keep their gradients, so that nothing else is new."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).to(DEVICE)
    clipper = ComponentClipper(model, CAP)
    for _ in range(2):
        backward(model, gradients_of(model))
        clipper.clip_()
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    backward(model, gradients_of(model))
    with pytest.warns(UserWarning, match="Make the clipper anew"):
        clipper.clip_()
    model[0] = nn.Linear(3, 2).to(DEVICE)
    clipper = ComponentClipper(model, CAP)
    copied = copy.deepcopy((model, clipper))
    copied[0][1].weight = nn.Parameter(torch.zeros(2, 2, device=DEVICE))
    backward(copied[0], gradients_of(model))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(4):
            copied[1].clip_()
    assert ["'1.weight' of the model has been replaced" in str(w.message) for w in said] == [True]
    model[1].weight = None  # removed, not replaced
    clipper.clip_()


def test_parameters_without_a_gradient_are_not_taken_for_replaced():
    model = Model()
    clipper = ComponentClipper(model, CAP)
    for _ in range(3):
        model.zero_grad()
        (model.first.weight.sum() * 2).backward()
        clipper.clip_()
        model.double()
        model.float()
