"""The public calls under torch.compile(fullgraph=True): the same bits as without, and nothing compiled twice."""

import math

import pytest
import torch
import torch._inductor.config
from torch._dynamo.testing import CompileCounterWithBackend

from cwclip_kernels import ComponentClipper, component_norms, fused_component_clip_, thresholds
from helpers import BACKENDS, DEVICE, copy_of, grads_of, parameter, parameters, random_grad, same_bits

# Importing inductor does this, in some versions of torch.
pytestmark = [pytest.mark.builds, pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")]

COMPILERS = ("aot_eager", "inductor")
SIZES = [(30, 20), (30,), (5, 6), (1000,)]


@pytest.fixture(autouse=True)
def _forget():
    torch._dynamo.reset()
    with torch._inductor.config.patch(compile_threads=1):  # leaves no processes behind
        yield
    torch._dynamo.reset()


def compiled(function, compiler):
    counter = CompileCounterWithBackend(compiler)
    return torch.compile(function, fullgraph=True, backend=counter), counter


def model_with_grads():
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 2)).to(DEVICE)
    for p in model.parameters():
        p.grad = random_grad(p.shape)
    return model


def named(params):
    return [(f"layers.{i}.weight", p) for i, p in enumerate(params)]


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_function_step_after_step(compiler, backend):
    """New gradients at other addresses, new caps in the same tensor: one graph, the eager call's bits."""
    params = parameters(SIZES)
    caps = torch.ones(len(SIZES), device=DEVICE)
    step, counter = compiled(lambda: fused_component_clip_(params, caps, backend=backend) * 2.0, compiler)
    kept = []
    for _ in range(3):
        caps.copy_(torch.rand(len(SIZES)) * 20.0)
        for p in params:
            kept.append(p.grad)
            p.grad = random_grad(p.shape)
        expected, versions = copy_of(params), [p.grad._version for p in params]
        norms = step()
        assert same_bits(norms, fused_component_clip_(expected, caps, backend=backend) * 2.0)
        assert all(same_bits(a, b) for a, b in zip(grads_of(params), grads_of(expected), strict=True))
        assert all(p.grad._version > v for p, v in zip(params, versions, strict=True))
    assert counter.frame_count == 1


@pytest.mark.parametrize("given", [list, named, torch.nn.ParameterList], ids=["tensors", "names", "module"])
@pytest.mark.parametrize(
    "changes",
    [
        {"max_norm": 0.3, "components": "all"},
        {"max_norm": {"*": 0.3}, "components": "parameter"},
        {"max_norm": 0.3, "norm_type": math.inf, "nonfinite": "zero"},
        {"max_norm": 30.0, "norm_type": 1.0, "error_if_nonfinite": True},
        {"max_norm": 0.3, "norm_type": 3.0, "eps": 0.0, "nonfinite": "skip"},
    ],
    ids=["all", "mapping", "zero", "error", "skip"],
)
def test_arguments(given, changes):
    params = parameters(SIZES)
    if changes.get("nonfinite"):
        params[1].grad[3] = math.nan
    expected = copy_of(params)
    source = given(params)
    step, _ = compiled(lambda: fused_component_clip_(source, **changes), "aot_eager")
    norms = step()
    assert torch.equal(norms.nan_to_num(7.0), fused_component_clip_(given(expected), **changes).nan_to_num(7.0))
    assert all(same_bits(a, b) for a, b in zip(grads_of(params), grads_of(expected), strict=True))


@pytest.mark.parametrize("compiler", COMPILERS)
def test_clipper_in_a_whole_step(compiler):
    """Clip, look at the result, update: one graph, and the model that an eager run arrives at."""
    models = [model_with_grads()]
    models.append(torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 2)).to(DEVICE))
    models[1].load_state_dict(models[0].state_dict())
    clippers = [ComponentClipper(model, {"*.weight": 0.05, "*.bias": 0.5}) for model in models]

    def update(model, clipper):
        before = clipper.norms()
        result = clipper.clip_()
        for p in model.parameters():
            with torch.no_grad():
                p.sub_(p.grad, alpha=0.1)
        return before, result.norms, (result.coefs < 1).sum(), clipper.total_norm(before)

    step, counter = compiled(update, compiler)
    for _ in range(3):
        inputs = torch.randn(4, 6, device=DEVICE)
        outcomes = []
        for model, clipper, run in zip(models, clippers, (step, update), strict=True):
            for p in model.parameters():
                p.grad = None
            model(inputs).square().sum().backward()
            outcomes.append(run(model, clipper))
        # Inductor may contract the update's multiplication and addition, so that the models' last bits part ways.
        for ours, eager in zip(*outcomes, strict=True):
            torch.testing.assert_close(ours, eager)
        assert same_bits(outcomes[0][0], outcomes[0][1])
    assert counter.frame_count == 1
    for ours, eager in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, eager)


LAYOUTS = {
    "transposed": lambda: random_grad((20, 30)).t(),
    "every other column": lambda: random_grad((30, 40))[:, ::2],
    "permuted": lambda: random_grad((4, 20, 30)).permute(2, 0, 1),
    "a row of a buffer": lambda: random_grad((3, 30, 20))[1],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_unlike_the_parameters(layout):
    params = [parameter(None, tuple(LAYOUTS[layout]().shape)), *parameters([(7,)])]
    step, _ = compiled(lambda: fused_component_clip_(params, 0.1), "aot_eager")
    for _ in range(2):
        params[0].grad = LAYOUTS[layout]()
        expected = copy_of(params)
        assert same_bits(step(), fused_component_clip_(expected, 0.1))
        assert all(same_bits(a, b) for a, b in zip(grads_of(params), grads_of(expected), strict=True))
    params[0].grad = random_grad((1,)).expand(params[0].shape)
    with pytest.raises(Exception, match="several elements on one place"):  # one of Dynamo's, around ours
        step()


def test_gradients_that_come_and_go():
    params = parameters(SIZES)
    step, counter = compiled(lambda: fused_component_clip_(params, 0.1), "aot_eager")
    step()
    params[1].grad = None
    norms = step()
    assert norms.shape == (4,)
    assert norms[1] == 0.0
    for p in params:
        p.grad = None
    assert step().tolist() == [0.0] * 4
    assert counter.frame_count <= 3


@pytest.mark.parametrize("max_norm", [0.3, {"0": 0.3}, "tensor", "EMA"])
@pytest.mark.parametrize("norm_type", [2.0, 0.0, -1.0])
def test_without_gradients(max_norm, norm_type):
    """Caps are those of the step all the same, and thresholds are told."""
    outcomes = []
    for mode in ("eager", "compiled"):
        params = [parameter(None, n) for n in SIZES]
        cap = {"tensor": torch.arange(1.0, 1 + len(SIZES), device=DEVICE), "EMA": thresholds.EMA(warmup_steps=1)}
        clipper = ComponentClipper(params, cap.get(str(max_norm), max_norm), norm_type)
        step = clipper.clip_ if mode == "eager" else compiled(clipper.clip_, "aot_eager")[0]
        step()
        result = step()
        outcomes.append((result.norms, result.coefs, result.caps))
    for ours, eager in zip(outcomes[1], outcomes[0], strict=True):
        torch.testing.assert_close(ours, eager, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("max_norm", [0.3, "EMA"])
def test_orders_one_after_another(max_norm):
    """From the second on Dynamo takes the order for a variable."""
    for norm_type in (2.0, math.inf, 3.0, 1.0, 0.0, -1.0, -math.inf):
        params = parameters(SIZES)
        expected = copy_of(params)
        caps = [thresholds.EMA(warmup_steps=5) if max_norm == "EMA" else max_norm for _ in range(2)]
        clippers = [ComponentClipper(p, c, norm_type) for p, c in zip((params, expected), caps, strict=True)]

        def step(clipper):
            result = clipper.clip_()
            return result.norms, result.coefs, result.caps, clipper.total_norm(result.norms)

        ours, eager = torch.compile(step, fullgraph=True, backend="aot_eager")(clippers[0]), step(clippers[1])
        for a, b in zip(ours, eager, strict=True):
            torch.testing.assert_close(a, b, rtol=0.0, atol=0.0)
        assert all(same_bits(a, b) for a, b in zip(grads_of(params), grads_of(expected), strict=True))


def test_norms_alone_write_nothing():
    params = parameters(SIZES)
    before = grads_of(params)
    step, _ = compiled(lambda: component_norms(params, components="all"), "aot_eager")
    assert same_bits(step(), component_norms(params, components="all"))
    assert all(same_bits(p.grad, b) for p, b in zip(params, before, strict=True))


def test_bad_input_is_refused_and_nothing_changed():
    params = parameters(SIZES)
    before = grads_of(params)
    shared = random_grad((30,))
    cases = [
        (lambda: fused_component_clip_(params, -1.0), "max_norm: expected a number >= 0"),
        (lambda: fused_component_clip_(params, {"no.such": 1.0}), "no.such"),
        (lambda: fused_component_clip_(params, 1.0, backend="cudnn"), "backend: expected None or one of"),
        (lambda: fused_component_clip_(params, 1.0, nonfinite="ignore"), "nonfinite: expected one of"),
        (
            lambda: fused_component_clip_(params, torch.ones(3, device=DEVICE)),
            r"max_norm: expected shape \[\] or \[4\]",
        ),
        (lambda: fused_component_clip_([parameter(shared), parameter(shared)], 1.0), "share memory"),
    ]
    for function, message in cases:
        torch._dynamo.reset()
        with pytest.raises(Exception, match=message):
            compiled(function, "aot_eager")[0]()
    assert all(same_bits(p.grad, b) for p, b in zip(params, before, strict=True))


def test_a_bad_norm_is_an_error_by_name_before_anything_is_written():
    params = parameters(SIZES)
    params[2].grad[1, 1] = math.inf
    before = grads_of(params)
    step, _ = compiled(lambda: fused_component_clip_(named(params), 0.1, error_if_nonfinite=True), "aot_eager")
    with pytest.raises(RuntimeError, match=r"non-finite for 1 of 4 components: 'layers\.2\.weight'"):
        step()
    assert all(same_bits(p.grad, b) for p, b in zip(params, before, strict=True))


def test_opcheck():
    """Schema, fake implementation, autograd registration, tracing: torch's own judgement of both operators."""
    component_norms(parameters([(1,)]))  # loads what is loaded at first use
    ops = torch.ops.cwclip_kernels
    names = repr((("a", "b"), ("x", "y", "z"), ((0, 0, ()), (1, 1, ()), (2, 0, ()))))
    grads = [random_grad((4, 3)), random_grad((5,), torch.bfloat16), random_grad((2, 2))]
    caps = torch.tensor(0.5, device=DEVICE)
    for *arguments, exempt in ((caps, "", [], []), (None, "", [0.3], [1]), (None, "['a']", [0.3], [])):
        torch.library.opcheck(
            ops.component_clip_.default, (grads, names, *arguments, None, None, 2.0, 1e-6, exempt, "propagate", None)
        )
    torch.library.opcheck(ops.component_norms.default, (grads, names, 2.0, None, None))
    # The matrix in two slices, and a loss scale.
    members = (0, 0, ((0, 0, 1),)), (0, 1, ((0, 1, 3),)), (1, 1, ()), (2, 0, ())
    cut = repr((("a", "b"), ("x", "y", "z"), members))
    scale, found = torch.tensor(0.5, device=DEVICE), torch.zeros((), device=DEVICE)
    torch.library.opcheck(
        ops.component_clip_.default, (grads, cut, caps, "", [], scale, found, 2.0, 1e-6, [], "propagate", None)
    )
