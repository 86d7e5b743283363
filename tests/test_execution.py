"""Around the arithmetic: plans and caches, version counters, autograd, tracing, huge tensors."""

import copy
import gc
import math
import threading
import weakref

import pytest
import torch

from cwclip_kernels import ClipResult, ComponentClipper, component_norms, fused_component_clip_
from cwclip_kernels import api as api_module
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
    (grad,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
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
    planner = clipper._engine._planner

    def clip():
        expected = copy_of(params)
        clipper.clip_()
        fused_component_clip_(expected, 0.1, backend="reference")
        assert_grads(params, expected)
        return planner._plans[2.0, None]

    first = clip()
    for p in params:
        p.grad = random_grad(p.shape)
    assert clip() is first
    params[0].grad = None
    second = clip()
    assert second is not first
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


def test_the_cache_keeps_no_model_alive_and_stays_small():
    model = model_with_grads()
    fused_component_clip_(model, 0.1)
    fused_component_clip_(list(model.parameters()), 0.1, components=model.group_of)
    watch = weakref.ref(model[0].weight)
    del model
    gc.collect()
    assert watch() is None
    for _ in range(50):
        fused_component_clip_(parameters([(2,)]), 0.1)
    assert len(api_module._entries) <= 16


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
    assert clipper.clip_().norms[0] == pytest.approx(grad.norm().item())
    torch.testing.assert_close(model[0].weight.grad, grad * (0.1 / (grad.norm() + 1e-6)))


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


@pytest.mark.skipif(DEVICE != "cpu", reason="the native operators serve CPU tensors")
class TestOperators:
    def arguments(self):
        grads = [torch.randn(10), torch.randn(4, 3, dtype=torch.bfloat16), torch.randn(2, 2)]
        return grads, torch.tensor([0, 1, 0])

    def test_opcheck(self):
        component_norms(parameters([(1,)]), backend="cpu")  # loads the extension
        ops = torch.ops.cwclip_kernels
        grads, owners = self.arguments()
        torch.library.opcheck(ops.power_sums.default, (grads, owners, None, 2, 2.0))
        torch.library.opcheck(ops.scale_.default, (grads, owners, None, torch.rand(2).double(), False))
        caps = torch.tensor(0.5, dtype=torch.float64)
        torch.library.opcheck(ops.clip_.default, (grads, owners, None, 2, caps, None, None, 2.0, 1e-6, 0))
        # Two rows of the matrix apart, and a loss scale.
        pieces, cuts = torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1, 1, 0, 0, 2, 1, 1, 0, 2, 2])
        scale, found = torch.tensor(0.5, dtype=torch.float64), torch.zeros(())
        torch.library.opcheck(ops.power_sums.default, (grads, pieces, cuts, 2, 2.0))
        torch.library.opcheck(ops.clip_.default, (grads, pieces, cuts, 2, caps, scale, found, 2.0, 1e-6, 0))

    def test_compiles_into_one_graph(self):
        component_norms(parameters([(1,)]), backend="cpu")

        @torch.compile(fullgraph=True, backend="aot_eager")
        def step(a, b, owners, caps):
            a, b = a * 2.0, b + 1.0
            norms, coefs = torch.ops.cwclip_kernels.clip_([a, b], owners, None, 2, caps, None, None, 2.0, 1e-6, 0)
            return a, b, norms, coefs

        a, b = torch.randn(10), torch.randn(5)
        owners, caps = torch.tensor([0, 1]), torch.tensor(0.5, dtype=torch.float64)
        clipped_a, clipped_b, norms, coefs = step(a, b, owners, caps)
        torch.testing.assert_close(norms, torch.stack([(a * 2).norm(), (b + 1).norm()]))
        torch.testing.assert_close(clipped_a, a * 2 * coefs[0])
        torch.testing.assert_close(clipped_b, (b + 1) * coefs[1])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"owners": torch.tensor([0])}, "components: expected one for each of the 3 gradients"),
            ({"owners": torch.tensor([0, 1, 2])}, r"components\[2\] is outside \[0, 2\)"),
            ({"owners": torch.tensor([0, 1, -1])}, r"components\[2\] is outside"),
            ({"caps": torch.ones(3).double()}, r"caps: expected shape \[\] or \[2\]"),
            ({"caps": torch.ones(2)}, "caps: expected contiguous float64"),
            ({"norm_type": 3.0}, "norm_type: expected 1, 2 or inf"),
            ({"nonfinite": 3}, "nonfinite: expected 0, 1 or 2"),
            ({"cuts": torch.tensor([0, 0, 1, 0])}, "cuts: too short"),
            ({"cuts": torch.tensor([0, 0, 1, 0, 2, 0, 0])}, "cuts: too long"),
            ({"cuts": torch.tensor([0, 0, 1, 0, 3, 0])}, "cuts: there is no gradient 3"),
            ({"cuts": torch.tensor([0, 0, 1, 0, 1, 1, 0, 3, 2])}, r"cuts: a piece lies outside of grads\[1\]"),
            ({"cuts": torch.tensor([0, 0, 1, 0, 1, 1, 0, 2**62, 2**62])}, r"outside of grads\[1\]"),
            ({"cuts": torch.tensor([0, 0, 1, 0, 2, 0], dtype=torch.int32)}, "cuts: expected contiguous int64"),
            ({"inverse": torch.ones(2).double()}, "inverse: expected one element"),
            ({"inverse": torch.ones(())}, "inverse: expected contiguous float64"),
            ({"found_inf": torch.zeros((), dtype=torch.float64)}, "found_inf: expected one float32"),
        ],
    )
    def test_operators_check_what_they_get(self, change, message):
        component_norms(parameters([(1,)]), backend="cpu")
        grads, owners = self.arguments()
        given = {
            "owners": owners,
            "caps": torch.tensor(0.1).double(),
            "norm_type": 2.0,
            "nonfinite": 0,
            "cuts": None,
            "inverse": None,
            "found_inf": None,
            **change,
        }
        before = [g.clone() for g in grads]
        with pytest.raises(RuntimeError, match=message):
            torch.ops.cwclip_kernels.clip_(
                grads,
                given["owners"],
                given["cuts"],
                2,
                given["caps"],
                given["inverse"],
                given["found_inf"],
                given["norm_type"],
                1e-6,
                given["nonfinite"],
            )
        assert all(same_bits(g, b) for g, b in zip(grads, before, strict=True))


@pytest.mark.parametrize("backend", [None, *FUSED])
def test_a_compiled_model_trains(backend):
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1)).to(DEVICE)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(torch.randn(5, 4, device=DEVICE)).square().sum().backward()
    fused_component_clip_(compiled, 1e-3, backend=backend)
    assert all(p.grad.norm() < 1.01e-3 for p in model.parameters())


def _free_memory() -> int:
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


@pytest.mark.slow
@pytest.mark.skipif(_free_memory() < 12 << 30, reason="needs 12 GiB of free memory")
@pytest.mark.parametrize("backend", FUSED if DEVICE == "cuda" else ("cpu",))
def test_more_than_two_to_the_31_elements(backend):
    """Index arithmetic in 64 bits, with and without gaps. Untouched zero pages cost little memory."""
    count = 2**31 + 12345
    grad = torch.zeros(count, dtype=torch.bfloat16, device=DEVICE)
    grad[7], grad[2**31 - 1], grad[2**31 + 12344] = 3.0, 4.0, 12.0
    # One value of storage: the parameter itself takes no memory.
    param = torch.zeros(1, dtype=torch.bfloat16, device=DEVICE).expand(count).requires_grad_()
    param.grad = grad
    clipper = ComponentClipper([param], 6.5, backend=backend)
    assert clipper.clip_().norms.item() == 13.0
    assert [grad[i].item() for i in (7, 2**31 - 1, 2**31 + 12344)] == [1.5, 2.0, 6.0]
    if backend == "cpu":
        grad[0], grad[2**30] = 8.0, 4.5
        gapped = torch.zeros(3, dtype=torch.bfloat16, requires_grad=True)
        gapped.grad = grad[:: 2**30]
        grad[2**31] = 6.0
        assert component_norms([gapped]).item() == pytest.approx(math.sqrt(8.0**2 + 4.5**2 + 6.0**2))


def test_norm_of_a_cap_like_torch_reports_it():
    """The README's first lines."""
    model = model_with_grads()
    norms = fused_component_clip_(model, 0.05)
    assert norms.shape == (6,)
    assert (component_norms(model) <= 0.05 * (1 + 1e-6)).all()
    assert math.isfinite(norms.sum().item())
