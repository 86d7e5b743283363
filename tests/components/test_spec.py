"""ComponentSpec: names, and slices of tensors against the same slices as parameters of their own."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cwclip_kernels import ComponentClipper, ComponentSpec, component_norms, fused_component_clip_
from helpers import (
    BACKENDS,
    DEVICE,
    DTYPES,
    FUSED,
    assert_grads,
    assert_norms,
    copy_of,
    parameter,
    parameters,
    random_grad,
    same_bits,
)


def named(params):
    return [(f"w{i}", p) for i, p in enumerate(params)]


def apart(params, slices):
    """Every slice as a parameter of its own, cloned: list of (tensor, box) -> parameters."""
    pieces = []
    for i, box in slices:
        piece = params[i].grad
        for dim, start, size in box:
            piece = piece.narrow(dim, start, size)
        pieces.append(parameter(piece.clone()))
    return pieces


def check(params, spec, slices, backend, max_norm=0.7, norm_type=2.0):
    """Clips by spec, and the slices one by one with the definition: same norms, same gradients."""
    expected = apart(params, slices)
    norms = fused_component_clip_(named(params), max_norm, norm_type, components=spec, backend=backend)
    wanted = fused_component_clip_(expected, max_norm, norm_type, backend="reference")
    assert_norms(norms, wanted, torch.float64 if params[0].grad.dtype == torch.float64 else torch.float32)
    assert_grads(apart(params, slices), expected, torch.float32)


# A row of heads that are no whole number of vectors; columns; both ways; 3 dims.
CASES = [
    ((12, 5), [("split", {"sizes": (3, 4, 5)})]),
    ((12, 5), [("split", {"sizes": 4})]),
    ((6, 14), [("split", {"sizes": (5, 9), "dim": 1})]),
    ((6, 14), [("split", {"sizes": 7, "dim": -1}), ("split", {"sizes": 2, "dim": 0})]),
    ((4, 6, 5), [("split", {"sizes": 1}), ("split", {"sizes": (2, 4), "dim": 1, "names": ("up", "gate")})]),
    ((4, 6, 5), [("split", {"sizes": (2, 3), "dim": 2})]),
    ((5, 3, 2, 2), [("unitwise", {})]),
    ((5, 3), [("unitwise", {"dim": 1})]),
    ((3, 4, 2, 2), [("unitwise", {"dim": (0, -3)})]),
    ((3, 4, 5), [("unitwise", {"dim": [2, 0]}), ("split", {"sizes": 2, "dim": 1})]),
    ((0, 3), [("split", {"sizes": 1, "dim": 1})]),
]


def spec_of(calls, pattern="w0"):
    spec = ComponentSpec()
    for method, arguments in calls:
        spec = getattr(spec, method)(pattern, **arguments)
    return spec


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_slices_are_clipped_as_if_apart(backend, dtype, norm_type):
    for shape, calls in CASES:
        params = parameters([shape, (3, 3)], dtype)
        spec = spec_of(calls)
        slices = [(0, box) for _, box in spec.slices_of("w0", params[0])] + [(1, ())]
        check(params, spec, slices, backend, norm_type=norm_type)


@pytest.mark.parametrize("backend", BACKENDS)
def test_slices_of_any_memory_layout(backend):
    for grad in (
        random_grad((12, 5)).t().contiguous().t(),
        random_grad((4, 6, 5, 3)).to(memory_format=torch.channels_last),
        random_grad((12, 10))[:, ::2],
        random_grad((12, 5), torch.bfloat16)[1:],
        random_grad((8, 5), torch.complex64),
    ):
        for calls in ([("unitwise", {})], [("unitwise", {"dim": 1})]):
            p = parameter(grad.clone(memory_format=torch.preserve_format))
            spec = spec_of(calls)
            check([p], spec, [(0, box) for _, box in spec.slices_of("w0", p)], backend)


@pytest.mark.parametrize("backend", [b for b in FUSED if b != "triton" or DEVICE != "cpu"])
def test_slices_longer_than_a_tile(backend):
    params = parameters([(3, 70_001), (40_000, 5)])
    spec = ComponentSpec().split("w0", 1).split("w1", (13_333, 26_667))
    boxes = [(0, ((0, i, 1),)) for i in range(3)] + [(1, ((0, 0, 13_333),)), (1, ((0, 13_333, 26_667),))]
    check(params, spec, boxes, backend)


@pytest.mark.parametrize("backend", [b for b in FUSED if b != "triton" or DEVICE != "cpu"])
def test_thousands_of_rows(backend):
    params = parameters([(5000, 7), (300, 2)], torch.bfloat16)
    spec = ComponentSpec().unitwise("*")
    boxes = [(0, ((0, i, 1),)) for i in range(5000)] + [(1, ((0, i, 1),)) for i in range(300)]
    check(params, spec, boxes, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_slices_of_several_tensors_in_one_component(backend):
    # All queries together, all keys together: the components' tiles do not lie in the order of the tensors.
    params = parameters([(4, 6), (4, 6), (4, 6)])
    spec = ComponentSpec(lambda name, p: "layers").split("w*", (1, 3), names=("q", "k"))
    before = [p.grad.clone() for p in params]
    norms = component_norms(named(params), components=spec, backend=backend)
    clipper = ComponentClipper(named(params), 0.1, components=spec, backend=backend)
    assert clipper.names == ("layers[q]", "layers[k]")
    together = [torch.cat([b[:1] for b in before]), torch.cat([b[1:] for b in before])]
    assert_norms(norms, torch.stack([t.double().norm() for t in together]), torch.float32)
    coefs = clipper.clip_().coefs
    for p, b in zip(params, before, strict=True):
        torch.testing.assert_close(p.grad, torch.cat([b[:1] * coefs[0], b[1:] * coefs[1]]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_slice_leaves_its_neighbours_alone(backend):
    for policy, left in (("skip", math.nan), ("zero", 0.0), ("propagate", math.nan)):
        p = parameter(random_grad((6, 4), scale=0.001))
        p.grad[3, 1] = math.nan
        before = p.grad.clone()
        fused_component_clip_(
            named([p]), 1.0, nonfinite=policy, components=ComponentSpec().unitwise("*"), backend=backend
        )
        rest = [0, 1, 2, 4, 5]
        assert same_bits(p.grad[rest], before[rest])
        torch.testing.assert_close(p.grad[3, 1].item(), left, equal_nan=True)


class LargestTensorMade(TorchDispatchMode):
    """Elements of the largest tensor that is made."""

    def __init__(self, *known):
        super().__init__()
        self.known = {k.untyped_storage().data_ptr() for k in known}
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("backend", FUSED)
def test_no_gradient_is_copied(backend, dim):
    p = parameter(random_grad((300, 400)))
    clipper = ComponentClipper(named([p]), 0.1, components=ComponentSpec().split("w0", 100, dim=dim), backend=backend)
    clipper.clip_()  # whatever is made once
    with LargestTensorMade(p, p.grad) as made:
        clipper.clip_()
    assert made.numel < 1000


# ------------------------------------------------------------------------------------------------------------
# Names
# ------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, d=4):
        super().__init__()
        self.ln = nn.LayerNorm(d)
        self.attn = nn.MultiheadAttention(d, 2)


@pytest.fixture
def model():
    return nn.ModuleDict({"h": nn.ModuleList([Block(), Block()])}).to(DEVICE)


def names_of(model, spec):
    return ComponentClipper(model, 1.0, components=spec).names


def test_words_groups_and_slices_compose(model):
    spec = ComponentSpec("layer").split("*.in_proj_weight", 4, names=("q", "k", "v"))
    assert names_of(model, spec)[:4] == ("h.0", "h.0[q]", "h.0[k]", "h.0[v]")
    spec = ComponentSpec("type").split("*.in_proj_weight", 4, names=("q", "k", "v"))
    assert "h.*.attn.in_proj_weight[k]" in names_of(model, spec)
    spec = ComponentSpec("layer").group("*.bias", "all").group("h.0.ln.*", "module")
    assert names_of(model, spec) == ("h.0.ln", "h.0", "*.bias", "h.1")
    spec = ComponentSpec().group("h.1.*", lambda name, p: None)
    assert all(name.startswith("h.0") for name in names_of(model, spec))
    assert names_of(model, ComponentSpec("all")) == ("all",)
    assert names_of(model, ComponentSpec()) == tuple(name for name, _ in model.named_parameters())


def test_a_cap_for_a_slice_by_its_name(model):
    spec = ComponentSpec().split("*.in_proj_weight", 4, names=("q", "k", "v"))
    clipper = ComponentClipper(
        model, {"h.0.attn.in_proj_weight[k]": 0.1, "*.in_proj_weight[q]": 0.2}, components=spec
    )
    caps = dict(zip(clipper.names, clipper.clip_().caps.tolist(), strict=True))
    assert caps["h.0.attn.in_proj_weight[k]"] == 0.1
    assert caps["h.0.attn.in_proj_weight[q]"] == caps["h.1.attn.in_proj_weight[q]"] == 0.2
    assert caps["h.1.attn.in_proj_weight[k]"] == math.inf


def test_bare_tensors_are_named_by_position():
    params = parameters([(4, 2), (3,)])
    assert names_of(params, ComponentSpec().split("0", 2)) == ("0[0]", "0[1]", "1")


def test_specs_are_values():
    spec = ComponentSpec("layer")
    more = spec.split("*", 2)
    assert spec == ComponentSpec("layer")
    assert spec != more
    assert more == ComponentSpec("layer").split("*", 2)
    assert hash(more) == hash(ComponentSpec("layer").split("*", 2))


# ------------------------------------------------------------------------------------------------------------
# Models as they are
# ------------------------------------------------------------------------------------------------------------


def real_gradients(model, *inputs, **named_inputs):
    output = model(*inputs, **named_inputs)
    (output if isinstance(output, torch.Tensor) else output[0]).square().sum().backward()


def check_model(model, spec, expected):
    """The components of ``expected`` ({name: slice of a gradient}) against torch's own norm and scaling."""
    before = {name: piece().clone() for name, piece in expected.items()}
    result = ComponentClipper(model, 1e-3, components=spec).clip_()
    found = result.as_dict()
    for name, piece in expected.items():
        norm, coef = found[name]
        assert norm == pytest.approx(before[name].double().norm().item(), rel=1e-6)
        torch.testing.assert_close(piece(), before[name] * coef)
        assert piece().norm() <= 1e-3 * (1 + 1e-5)


def test_gpt2_block():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=24, n_layer=2, n_head=3, vocab_size=50, n_positions=16)
    model = transformers.GPT2Model(config).to(DEVICE)
    real_gradients(model, torch.randint(0, 50, (2, 7), device=DEVICE))
    # Conv1D keeps its weight as [in, out]: query, key and value are columns.
    spec = (
        ComponentSpec()
        .split("h.*.attn.c_attn.weight", 24, names=("q", "k", "v"), dim=1)
        .split("h.*.attn.c_attn.bias", 24, names=("q", "k", "v"))
    )
    grads = dict(model.named_parameters())
    expected = {}
    for layer in range(2):
        for i, label in enumerate("qkv"):
            for kind in ("weight", "bias"):
                name = f"h.{layer}.attn.c_attn.{kind}"
                expected[f"{name}[{label}]"] = lambda n=name, i=i: grads[n].grad.narrow(-1, 24 * i, 24)
    check_model(model, spec, expected)


def test_encoder_with_fused_qkv_head_by_head():
    torch.manual_seed(3)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2).to(DEVICE)
    real_gradients(encoder, torch.randn(2, 5, 16, device=DEVICE))
    # 3 x 4 heads of 4 rows each.
    labels = [f"{part}{head}" for part in "qkv" for head in range(4)]
    spec = ComponentSpec().split("*.in_proj_weight", 4, names=labels)
    grads = dict(encoder.named_parameters())
    name = "layers.1.self_attn.in_proj_weight"
    expected = {f"{name}[{x}]": lambda i=i: grads[name].grad[4 * i : 4 * i + 4] for i, x in enumerate(labels)}
    check_model(encoder, spec, expected)


def test_stacked_experts():
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=2, vocab_size=30, max_position_embeddings=16,
    )  # fmt: skip
    model = transformers.MixtralModel(config).to(DEVICE)
    names = [name for name, p in model.named_parameters() if name.endswith("experts.gate_up_proj")]
    if not names:
        pytest.skip("this version of transformers does not stack experts")
    real_gradients(model, torch.randint(0, 30, (2, 8), device=DEVICE))
    spec = (
        ComponentSpec().split("*.experts.*", 1).split("*.experts.gate_up_proj", (12, 12), names=("gate", "up"), dim=1)
    )
    weight = dict(model.named_parameters())[names[0]]
    assert weight.shape == (4, 24, 8)
    expected = {}
    for e in range(4):
        expected[f"{names[0]}[{e}][gate]"] = lambda e=e: weight.grad[e, :12]
        expected[f"{names[0]}[{e}][up]"] = lambda e=e: weight.grad[e, 12:]
    # An expert that no token was sent to has no gradient worth clipping.
    expected = {name: piece for name, piece in expected.items() if piece().any()}
    assert expected
    check_model(model, spec, expected)


# ------------------------------------------------------------------------------------------------------------
# Errors
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ComponentSpec("layers"), ValueError, "expected one of parameter, module, .* not 'layers'"),
        (lambda: ComponentSpec(3), TypeError, "a callable or a ComponentSpec, not int"),
        (lambda: ComponentSpec().group("*", "word"), ValueError, "not 'word'"),
        (lambda: ComponentSpec().group(1, "all"), TypeError, "pattern: expected a string, not int"),
        (lambda: ComponentSpec().split("*", ()), ValueError, "sizes: expected at least one"),
        (lambda: ComponentSpec().split("*", (1, 0)), ValueError, "sizes: expected a whole number >= 1, not 0"),
        (lambda: ComponentSpec().split("*", 1.5), TypeError, "sizes: expected a whole number"),
        (lambda: ComponentSpec().split("*", True), TypeError, "sizes: .* not bool"),
        (lambda: ComponentSpec().split("*", "12"), TypeError, "sizes: .* not str"),
        (lambda: ComponentSpec().split("*", (1, 2), names=("a",)), ValueError, "names: expected 2"),
        (lambda: ComponentSpec().split("*", (1, 2), names=("a", "a")), ValueError, "names: expected distinct"),
        (lambda: ComponentSpec().split("*", (1, 2), names="ab"), TypeError, "names: expected a sequence"),
        (lambda: ComponentSpec().split("*", 2, dim=None), TypeError, "dim: expected a whole number"),
        (lambda: ComponentSpec().unitwise("*", dim=1.0), TypeError, "dim: expected a whole number"),
        (
            lambda: ComponentSpec().unitwise("*", dim=(0, None)),
            TypeError,
            "dim: expected a whole number or a sequence",
        ),
        (lambda: ComponentSpec().unitwise("*", dim="01"), TypeError, "dim: .* or a sequence"),
        (lambda: ComponentSpec().unitwise("*", dim=()), ValueError, "dim: expected at least one"),
        (lambda: ComponentSpec().unitwise("*", dim=(1, 1)), ValueError, r"dim: expected distinct ones, not \(1, 1\)"),
    ],
)
def test_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (ComponentSpec().split("w7", 1), r"split\('w7'\) matches none of the 2 parameters \('w0', 'w1'\)"),
        (ComponentSpec().unitwise("x*"), r"unitwise\('x\*'\) matches none"),
        (ComponentSpec().group("x*", "all"), r"group\('x\*'\) matches none"),
        (ComponentSpec().split("w0", (2, 3)), r"dim 0 of 'w0' has length 6, but sizes=\(2, 3\) add up to 5"),
        (ComponentSpec().split("w0", 4), "dim 0 of 'w0' has length 6, which is not a multiple of sizes=4"),
        (ComponentSpec().split("w0", 1, dim=2), r"'w0' has shape \[6, 4\], no dim 2"),
        (ComponentSpec().split("w*", 2, dim=1), r"'w1' has shape \[3\], no dim 1"),
        (ComponentSpec().split("w0", 3, names=list("abc")), "'w0' has 2 slices along dim 0, but there are 3 names"),
        (ComponentSpec().split("w0", 3).split("*", 1, dim=-2), "no dim -2|cut along dim 0 twice"),
        (ComponentSpec().group("w1", lambda n, p: "w0[0]").split("w0", 3), r"both written 'w0\[0\]'"),
    ],
)
def test_specs_that_do_not_fit(spec, message):
    params = parameters([(6, 4), (3,)])
    before = [p.grad.clone() for p in params]
    with pytest.raises(ValueError, match=message):
        fused_component_clip_(named(params), 0.1, components=spec)
    assert all(same_bits(p.grad, b) for p, b in zip(params, before, strict=True))


def test_a_sparse_gradient_stays_whole():
    embedding = nn.Embedding(5, 3, sparse=True, device=DEVICE)
    embedding(torch.tensor([1, 2], device=DEVICE)).sum().backward()
    with pytest.raises(TypeError, match="'weight' is sparse and can't be clipped slice by slice"):
        fused_component_clip_(embedding, 0.1, components=ComponentSpec().unitwise("weight"))
    fused_component_clip_(embedding, 0.1, components=ComponentSpec("all"))


def test_a_lazy_parameter_has_no_slices_yet():
    with pytest.raises(ValueError, match="can't be cut before its shape is known"):
        ComponentClipper(nn.LazyLinear(3), 1.0, components=ComponentSpec().unitwise("weight"))


def test_compiled_whole():
    params = parameters([(6, 4), (3,)])
    twins = copy_of(params)
    spec = ComponentSpec().split("w0", (2, 4), names=("a", "b"))
    clipper = ComponentClipper(named(params), 0.1, components=spec)
    torch._dynamo.reset()
    step = torch.compile(lambda: clipper.clip_().norms, backend="aot_eager", fullgraph=True)
    assert same_bits(step(), fused_component_clip_(named(twins), 0.1, components=spec))
    assert all(same_bits(p.grad, t.grad) for p, t in zip(params, twins, strict=True))
