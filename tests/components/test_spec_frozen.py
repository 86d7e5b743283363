"""A ComponentSpec where parameters are frozen, as in QLoRA: what is never trained is never cut badly, nor refused."""

import pytest
import torch
from torch import nn

from cwclip_kernels import ComponentClipper, ComponentSpec, fused_component_clip_
from cwclip_kernels.components.parameters import named_tensors
from cwclip_kernels.components.resolve import resolve
from helpers import DEVICE, random_grad


def frozen(*shape, dtype=torch.float32, device=DEVICE):
    return nn.Parameter(torch.zeros(shape, dtype=dtype, device=device), requires_grad=False)


def trained(*shape):
    p = nn.Parameter(torch.zeros(shape, device=DEVICE))
    p.grad = random_grad(shape)
    return p


class Unwilling(torch.Tensor):
    """A subclass as of a quantization library: nothing can be computed with it."""

    @staticmethod
    def __new__(cls, shape, dtype=torch.float32):
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device="cpu", requires_grad=False)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:  # for nn.Parameter
            return cls(args[0].shape, args[0].dtype)
        raise NotImplementedError(f"{func} of a quantized tensor")


class Guarded(torch.Tensor):
    """Another one, that answers what it is, and no function."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") != "__get__":
            raise NotImplementedError(f"{func} of a guarded tensor")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


KINDS = {
    "packed 4 bits": lambda: frozen(1 << 20, 1, dtype=torch.uint8),
    "int8": lambda: frozen(6, 4, dtype=torch.int8),
    "bool": lambda: frozen(6, 4, dtype=torch.bool),
    "torch's quantized": lambda: nn.Parameter(
        torch.quantize_per_tensor(torch.ones(6, 4), 0.1, 0, torch.qint8), requires_grad=False
    ),
    "float8": lambda: frozen(6, 4, dtype=torch.float8_e4m3fn),
    "meta": lambda: frozen(6, 4, device="meta"),
    "subclass": lambda: nn.Parameter(Unwilling((6, 4)), requires_grad=False),
    "integer subclass": lambda: nn.Parameter(Unwilling((6, 4), torch.int8), requires_grad=False),
    "guarded subclass": lambda: torch.ones(6, 4).as_subclass(Guarded),
    "sparse": lambda: nn.Parameter(torch.ones(6, 4).to_sparse(), requires_grad=False),
    "lazy": lambda: nn.UninitializedParameter(requires_grad=False),
    "plain tensor": lambda: torch.ones(6, 4),
}
WHOLE = {"packed 4 bits", "int8", "bool", "torch's quantized", "integer subclass", "lazy"}


@pytest.mark.filterwarnings("ignore:.*quantiz.*")
@pytest.mark.parametrize("kind", KINDS)
def test_frozen_tensors_of_any_kind_are_taken(kind):
    base, lora = KINDS[kind](), trained(2, 4)
    pairs = [("base.weight", base), ("lora.weight", lora)]
    assert named_tensors([base, lora]).tensors[0] is base
    for components in (None, "module", "layer", "type", "all"):
        assert len(resolve(named_tensors(pairs), components).tensor_names) == 2
    found = resolve(named_tensors(pairs), ComponentSpec().unitwise("*"))
    assert found.cut == ({1} if kind in WHOLE else {0, 1})
    assert len(found.names) == (1 if kind in WHOLE else 6) + 2
    assert [position for position, _ in found.problems] == ([0] if kind == "lazy" else [])


SPECS = [
    (
        ComponentSpec().split("*.weight", (2, 3)),
        r"dim 0 of 'base.weight' has length 6, but sizes=\(2, 3\) add up to 5",
    ),
    (ComponentSpec().split("*.weight", 5), "dim 0 of 'base.weight' has length 6, which is not a multiple of sizes=5"),
    (ComponentSpec().split("*.weight", 1, dim=2), r"'base.weight' has shape \[6, 4\], no dim 2"),
    (ComponentSpec().split("*.weight", 5, names=("a",)), "'base.weight' .* not a multiple of sizes=5"),
    (ComponentSpec().split("base.*", 3).split("*.weight", 6, dim=-2), "'base.weight' is cut along dim 0 twice"),
]


@pytest.mark.parametrize(("spec", "message"), SPECS)
def test_a_frozen_parameter_that_does_not_fit_stays_whole_and_is_remembered(spec, message):
    pairs = [("first.bias", trained(3)), ("base.weight", frozen(6, 4))]
    found = resolve(named_tensors(pairs), spec)
    assert found.names == ("first.bias", "base.weight")
    assert found.members == ((0, 0, ()), (1, 1, ()))
    ((position, problem),) = found.problems
    assert position == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(problem)
    clipper = ComponentClipper(pairs, 0.1, components=spec)
    assert clipper.clip_().norms[1] == 0.0
    # The same, trained: refused at once.
    pairs[1][1].requires_grad_()
    with pytest.raises(ValueError, match=message):
        ComponentClipper(pairs, 0.1, components=spec)


def test_a_frozen_parameter_that_fits_is_cut_as_any_other():
    spec = ComponentSpec().split("*.weight", (2, 4), names=("a", "b"))
    names = []
    for requires_grad in (False, True):
        found = resolve(named_tensors([("base.weight", frozen(6, 4).requires_grad_(requires_grad))]), spec)
        assert found.problems == ()
        names.append(found.names)
    assert names[0] == names[1] == ("base.weight[a]", "base.weight[b]")


def test_some_of_the_parameters_keep_their_problems():
    spec = ComponentSpec().split("*", 4)
    pairs = [("a", frozen(6)), ("b", trained(4)), ("c", frozen(7)), ("d", trained(8))]
    found = resolve(named_tensors([*pairs, ("e", pairs[1][1])]), spec)
    assert [position for position, _ in found.problems] == [0, 2]
    some = found.only([3, 2])
    assert [position for position, _ in some.problems] == [1]
    assert "'c' has length 7" in some.problems[0][1]
    assert some.names == found.names
    assert dict(some.aliases) == dict(found.aliases) == {"e[0]": "b[0]"}


def test_a_lazy_model_that_is_frozen():
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    for p in model[0].parameters():
        p.requires_grad = False
    assert ComponentClipper(model, 0.1, components=ComponentSpec().unitwise("*.weight")).names == (
        "0.weight",
        "0.bias",
        "1.weight[0]",
        "1.weight[1]",
        "1.bias",
    )


def test_an_unhashable_key_for_a_frozen_parameter_is_an_error_still():
    with pytest.raises(TypeError, match="unhashable list for 'base'"):
        resolve(named_tensors([("base", frozen(2))]), lambda name, p: [name])


def test_a_quantized_base_under_lora():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = frozen(8 * 4 // 2, 1, dtype=torch.uint8)
            self.lora_a, self.lora_b = trained(2, 4), trained(8, 2)

    model = nn.ModuleList(Layer() for _ in range(2))
    before = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    norms = fused_component_clip_(model, 0.1, components=ComponentSpec().unitwise("*"))
    assert norms.shape == (2 * (1 + 2 + 8),)
    rows = torch.cat([b.norm(dim=1) for b in before])
    torch.testing.assert_close(norms[norms != 0], rows)


def test_a_problem_in_a_compiled_function():
    model = nn.Module()
    model.base, model.lora = frozen(6, 4), trained(2, 4)
    spec = ComponentSpec().split("*", 2).split("base", 5, dim=1)

    def compiled():
        torch._dynamo.reset()
        return torch.compile(
            lambda: fused_component_clip_(model, 0.1, components=spec), backend="aot_eager", fullgraph=True
        )

    assert compiled()().tolist()[0] == 0.0
    assert model.lora.grad.norm() <= 0.1 + 1e-6
    before = model.lora.grad.clone()
    model.base.grad = torch.ones(6, 4, device=DEVICE)
    with pytest.raises(Exception, match="dim 1 of 'base' has length 4, which is not a multiple of sizes=5"):
        compiled()()
    assert torch.equal(model.lora.grad, before)
    assert torch.equal(model.base.grad, torch.ones(6, 4, device=DEVICE))
