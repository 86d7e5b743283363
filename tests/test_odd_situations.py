"""Situations that went wrong once, or nearly: default devices, meta tensors, shared memory, names that change."""

import threading

import pytest
import torch

from cwclip_kernels import ComponentClipper, ComponentSpec, component_norms, fused_component_clip_
from cwclip_kernels.backends import native
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


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("raises", [False, True])
def test_a_default_device_changes_nothing(backend, raises):
    params = parameters([(30,), (4, 5)])
    clipper = ComponentClipper(params, {"0": 0.1, "1": 0.2}, 2.0, raises, backend=backend)
    for default in ("meta", "cpu"):
        for p in params:
            p.grad = random_grad(p.shape)
        expected = copy_of(params)
        with torch.device(default):
            clipper.clip_()
            norms = component_norms(params, backend=backend)
        assert norms.device.type == DEVICE
        fused_component_clip_(expected, {"0": 0.1, "1": 0.2}, backend="reference")
        assert_grads(params, expected)


@pytest.mark.skipif(DEVICE != "cpu", reason="about CPU tensors")
def test_gradients_that_become_meta_tensors_are_refused():
    params = parameters([(30,), (4,)])
    clipper = ComponentClipper([("a", params[0]), ("b", params[1])], 0.1)
    clipper.clip_()
    clipper._tensors = (params[0], torch.nn.Parameter(torch.zeros(4, device="meta")))
    clipper._tensors[1].grad = torch.zeros(4, device="meta")
    params[0].grad = random_grad((30,))
    before = params[0].grad.clone()
    with pytest.raises(ValueError, match="gradient of 'b' is on the meta device"):
        clipper.clip_()
    assert same_bits(params[0].grad, before)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("norm_type", [2.0, 3.0])
@pytest.mark.parametrize("cut", [slice(0, 8), slice(4, 12)])
def test_gradients_that_share_memory_are_refused(backend, norm_type, cut):
    if norm_type == 3.0 and backend in FUSED:
        backend = "foreach"
    base = random_grad((12,))
    params = [parameter(base[:8]), parameter(base[cut])]
    clipper = ComponentClipper([("a", params[0]), ("b", params[1])], 0.1, norm_type, backend=backend)
    params[0].grad, params[1].grad = random_grad((8,)), random_grad((8,))
    clipper.clip_()
    params[0].grad, params[1].grad = base[:8], base[cut]
    before = base.clone()
    fresh = ComponentClipper([("a", params[0]), ("b", params[1])], 0.1, norm_type, backend=backend)
    with pytest.raises(ValueError, match="gradients of 'a' and 'b' share memory"):
        fresh.clip_()
    if cut.start == 0 or (backend in (None, "cpu") and norm_type == 2.0 and DEVICE == "cpu"):
        with pytest.raises(ValueError, match="gradients of 'a' and 'b' share memory"):
            clipper.clip_()
    assert same_bits(base, before)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_sparse_values_that_overlap_are_refused_before_anything_is_written(backend):
    dense = parameter(random_grad((5,)))
    indices = torch.tensor([[0, 1, 2]], device=DEVICE)
    values = torch.ones(1, 1, device=DEVICE).expand(3, 3)
    sparse = parameter(
        torch.sparse_coo_tensor(indices, torch.ones(3, 3, device=DEVICE), (5, 3), check_invariants=True)
    )
    sparse.grad = torch.sparse_coo_tensor(indices, values, (5, 3), check_invariants=True)
    before = dense.grad.clone()
    with pytest.raises(ValueError, match="gradient of 'e' has several elements on one place"):
        fused_component_clip_([("w", dense), ("e", sparse)], 0.01, backend=backend)
    assert same_bits(dense.grad, before)


def test_modules_renamed_in_place_are_seen():
    model = torch.nn.Sequential()
    model.add_module("a", torch.nn.Linear(3, 2, device=DEVICE))
    model.a.weight.grad = random_grad((2, 3), scale=9.0)
    assert fused_component_clip_(model, {"a.*": 0.5}).shape == (2,)
    model._modules["b"] = model._modules.pop("a")
    assert fused_component_clip_(model, {"b.*": 0.5}).shape == (2,)
    with pytest.raises(ValueError, match="matches none of"):
        fused_component_clip_(model, {"a.*": 0.5})


def test_a_grouping_function_is_asked_at_every_call_of_the_function():
    frozen = set()
    model = torch.nn.Linear(3, 2, device=DEVICE)

    def group(name, param):
        return None if name in frozen else name

    assert fused_component_clip_(model, 1.0, components=group).shape == (2,)
    frozen.add("weight")
    assert fused_component_clip_(model, 1.0, components=group).shape == (1,)


def test_modules_that_refer_to_each_other():
    model = torch.nn.Module()
    model.child = torch.nn.Linear(2, 2, device=DEVICE)
    model.child.parent = model
    assert fused_component_clip_(model, 1.0).shape == (2,)
    assert ComponentClipper(model, 1.0).names == ("child.weight", "child.bias")


def test_a_leaf_after_a_gradient_with_a_graph_is_refused():
    x = torch.randn(4, device=DEVICE, requires_grad=True)
    clipper = ComponentClipper([x], 0.1)
    (x.grad,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
    clipper.clip_()
    leaf = random_grad((4,)).requires_grad_()
    before = leaf.detach().clone()
    x.grad = leaf
    with pytest.raises(ValueError, match="itself a parameter"):
        clipper.clip_()
    assert same_bits(leaf.detach(), before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_error_leaves_versions_alone_too(backend):
    param = parameter(random_grad((4,)))
    param.grad[0] = float("nan")
    version = param.grad._version
    with pytest.raises(RuntimeError, match="non-finite"):
        fused_component_clip_([param], 0.1, error_if_nonfinite=True, backend=backend)
    assert param.grad._version == version


def test_explain_passes_over_what_never_has_a_gradient():
    model = torch.nn.Linear(2, 2, device=DEVICE)
    model.table = torch.nn.Parameter(torch.zeros(3, dtype=torch.int8, device=DEVICE), requires_grad=False)
    model.lazy = torch.nn.LazyLinear(3)
    model.ghost = torch.nn.Parameter(torch.zeros(3, device="meta"))
    assert "2 float32" in ComponentClipper(model, 1.0).explain()


@pytest.mark.usefixtures("needs_extension")
@pytest.mark.skipif(DEVICE != "cpu", reason="about the extension")
def test_the_extension_is_loaded_once_by_many_threads():
    native._load.cache_clear()
    answers = []
    barrier = threading.Barrier(8)

    def load():
        barrier.wait()
        answers.append(native.unavailable())

    threads = [threading.Thread(target=load) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert answers == [None] * 8


def test_plans_of_several_kinds_of_call_live_side_by_side():
    params = parameters([(30,), (4, 5)])
    clipper = ComponentClipper(params, 0.1)
    planner = clipper._session.plans
    clipper.clip_()
    (plan,) = planner._kept[2.0, None, True]
    clipper._session.norms(params, 1.0, None)
    clipper.clip_()
    assert planner._kept[2.0, None, True] == [plan]
    for order in range(3, 20):
        clipper._session.norms(params, float(order), None)
    assert len(planner._kept) <= 8


def test_a_call_for_each_parameter_is_as_one_for_all():
    params = parameters([(n + 1,) for n in range(40)])
    expected = copy_of(params)
    for p in params:
        fused_component_clip_(p, 0.1)
    fused_component_clip_(expected, 0.1)
    assert all(same_bits(a, b) for a, b in zip(grads_of(params), grads_of(expected), strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm_type": 10**400}, "norm_type: .* too large for a float"),
        ({"eps": 10**400}, "eps: .* too large for a float"),
        ({"max_norm": torch.ones((), device="meta")}, "max_norm: is on the meta device"),
    ],
)
def test_numbers_and_tensors_without_a_usable_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        fused_component_clip_(parameters([(2,)]), **{"max_norm": 1.0, **arguments})


def test_a_mapping_that_only_looks_the_same_is_checked_too():
    params = [("a", parameter(random_grad((4,)))), ("b", parameter(random_grad((4,))))]
    fused_component_clip_(params, {"a": 1.0, "b": 1})
    for value in (True, torch.ones(2), "1"):
        with pytest.raises(TypeError, match=r"max_norm\['b'\]: expected a number or one of thresholds"):
            fused_component_clip_(params, {"a": 1.0, "b": value})


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_are_views_of_one_buffer_stay_where_they_are(backend):
    """As in a bucket of DistributedDataParallel: changed in place, never replaced, and nothing beside them."""
    flat = random_grad((100,))
    before = flat.clone()
    params = [parameter(flat[3:33].view(5, 6)), parameter(flat[33:70]), parameter(flat[71:91].view(4, 5).t())]
    grads, places = [p.grad for p in params], [p.grad.data_ptr() for p in params]
    named = [(str(i), p) for i, p in enumerate(params)]
    fused_component_clip_(named, 0.1, components=ComponentSpec().split("0", 1).unitwise("2"), backend=backend)
    assert all(p.grad is g for p, g in zip(params, grads, strict=True))
    assert [p.grad.data_ptr() for p in params] == places
    assert all(g._base is flat for g in grads)
    assert same_bits(flat[[0, 1, 2, 70, *range(91, 100)]], before[[0, 1, 2, 70, *range(91, 100)]])
    assert (flat[3:70] != before[3:70]).all()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_gradients_in_the_buckets_of_data_parallel_training(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1))
        parallel = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        clipper = ComponentClipper(model, 1e-3)
        for _ in range(3):
            parallel.zero_grad(set_to_none=False)
            parallel(torch.randn(5, 4)).square().sum().backward()
            places = [p.grad.data_ptr() for p in model.parameters()]
            clipper.clip_()
            assert [p.grad.data_ptr() for p in model.parameters()] == places
            assert all(p.grad.norm() <= 1.001e-3 for p in model.parameters())
    finally:
        torch.distributed.destroy_process_group()
