"""Names: the same whatever wraps a model, and patterns that match none of them."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.nn.utils import parametrizations, parametrize

from cwclip_kernels import ComponentClipper, ComponentSpec, component_norms, fused_component_clip_
from cwclip_kernels.components import named_tensors
from cwclip_kernels.integrations._trainer_clipping import TrainerClipping
from cwclip_kernels.naming import are_same_names, layer_of, module_of, type_of
from cwclip_kernels.resolve import resolve
from cwclip_kernels.thresholds import EMA, Fixed
from helpers import random_grad


def small():
    return nn.Sequential(nn.Linear(3, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)))


NAMES = tuple(name for name, _ in small().named_parameters())


def compiled(module):
    return torch.compile(module, backend="eager")


def distributed(module):
    return nn.parallel.DistributedDataParallel(module)


def sharded(module, **arguments):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(module, use_orig_params=True, device_id=torch.device("cpu"), **arguments)


def fabric(module):
    return pytest.importorskip("lightning.fabric.wrappers")._FabricModule(distributed(module), None, module)


WRAPS = {
    "plain": lambda m: m,
    "compiled": compiled,
    "DP": nn.DataParallel,
    "DDP": distributed,
    "DDP of compiled": lambda m: distributed(compiled(m)),
    "compiled DDP": lambda m: compiled(distributed(m)),
    "checkpointed": checkpoint_wrapper,
    "offloaded": offload_wrapper,
    "compiled checkpointed": lambda m: compiled(checkpoint_wrapper(m)),
    "FSDP": sharded,
    "compiled FSDP of checkpointed": lambda m: compiled(sharded(checkpoint_wrapper(m))),
    "module by module": lambda m: nn.Sequential(compiled(m[0]), checkpoint_wrapper(m[1])),
    "DDP of module by module": lambda m: distributed(nn.Sequential(compiled(m[0]), checkpoint_wrapper(m[1]))),
    "deep inside": lambda m: nn.Sequential(
        m[0], nn.Sequential(sharded(m[1][0]), checkpoint_wrapper(compiled(m[1][1])))
    ),
    "Fabric": fabric,
}


@pytest.fixture
def process_group(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this torch has no distributed package")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
@pytest.mark.filterwarnings("ignore:.*NO_SHARD.*:FutureWarning")
@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS.keys())
@pytest.mark.parametrize("form", [lambda m: m, lambda m: m.named_parameters()], ids=["module", "pairs"])
def test_names_are_the_models_own_whatever_wraps_it(process_group, wrap, form):
    asked = []
    named = named_tensors(form(wrap(small())))
    assert named.names == NAMES
    assert named.aliases == ()
    resolve(named, lambda name, p: asked.append(name))
    assert tuple(asked) == NAMES
    assert resolve(named, "layer").names == ("0", "1.0", "1.1")


@pytest.mark.parametrize(
    "wrap", [WRAPS[key] for key in ("compiled", "DDP", "compiled DDP", "DDP of module by module")]
)
def test_patterns_and_learnt_thresholds_go_from_one_wrapping_to_another(process_group, wrap):
    model = small()

    def step(clipper, size):
        for p in clipper.parameters:
            p.grad = torch.full_like(p, size)
        return clipper.clip_()

    plain = ComponentClipper(model, EMA(warmup_steps=2))
    for size in (1.0, 2.0, 3.0):
        step(plain, size)
    expected = ComponentClipper(model, EMA(warmup_steps=2))
    expected.max_norm.load_state_dict(plain.max_norm.state_dict())
    wrapped = wrap(model)
    for form in (wrapped, list(wrapped.named_parameters())):
        clipper = ComponentClipper(form, EMA(warmup_steps=2))
        clipper.max_norm.load_state_dict(plain.max_norm.state_dict())
        caps = step(clipper, 100.0).caps
        assert caps.isfinite().all()
        expected.max_norm.load_state_dict(plain.max_norm.state_dict())
        assert torch.equal(caps, step(expected, 100.0).caps)
        # And back.
        expected.max_norm.load_state_dict(clipper.max_norm.state_dict())
        assert ComponentClipper(form, {"0.*": 0.1, "1.1.bias": 0.2}).names == NAMES


def test_a_trainer_reads_names_as_everyone_else():
    clipping = TrainerClipping({"0.weight": 0.1}, log_norms="1.*")
    clipping.check(nn.DataParallel(compiled(small())), None)
    model = nn.ModuleDict({"module": nn.Linear(2, 1)})
    model["module"].weight.grad = torch.ones(1, 2)
    assert TrainerClipping(0.1).clipper_for(model, None).names == ("module.weight", "module.bias")


class Holder(nn.Module):
    """Not a wrapper, though its attributes are called as those of wrappers."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(2, 1)
        self._orig_mod = nn.Linear(2, 1)


def test_attributes_that_are_called_as_a_wrappers_stay():
    names = ("module.weight", "module.bias", "_orig_mod.weight", "_orig_mod.bias")
    assert named_tensors(Holder()).names == names
    assert named_tensors(compiled(Holder())).names == names
    only = nn.ModuleDict({"module": nn.Linear(2, 1)})
    assert named_tensors(only).names == ("module.weight", "module.bias")
    assert named_tensors(nn.DataParallel(only)).names == ("module.weight", "module.bias")
    # Pairs: a leading "module." is a wrapper's if all names have it, once.
    pairs = list(only.named_parameters())
    assert named_tensors(pairs).names == ("weight", "bias")
    assert named_tensors(nn.DataParallel(only).named_parameters()).names == ("module.weight", "module.bias")
    assert named_tensors([*pairs, ("head", nn.Parameter(torch.ones(1)))]).names[0] == "module.weight"
    # As a parameter's own name, or a part of a longer word, it isn't a wrapper's either.
    odd = [("a._orig_mod", nn.Parameter(torch.ones(1))), ("my_orig_mod.b", nn.Parameter(torch.ones(1)))]
    assert named_tensors(odd).names == ("a._orig_mod", "my_orig_mod.b")


def test_names_that_would_become_equal_stay_as_they_are():
    one, other = small(), compiled(small())
    pairs = [*one.named_parameters(), *other.named_parameters()]
    assert named_tensors(pairs).names == (*NAMES, *(f"_orig_mod.{name}" for name in NAMES))

    class Scaled(nn.DataParallel):
        def __init__(self, module):
            super().__init__(module)
            self.weight = nn.Parameter(torch.ones(1))

    assert named_tensors(Scaled(nn.Linear(2, 1))).names == ("weight", "module.weight", "module.bias")
    # One parameter under both names is no reason to.
    assert named_tensors([*one.named_parameters(), *compiled(one).named_parameters()]).names == NAMES
    with pytest.raises(ValueError, match="two different tensors are named '0.weight'"):
        named_tensors([*small().named_parameters(), *small().named_parameters()])


def test_a_model_that_names_its_parameters_itself():
    class Own(nn.Linear):
        def named_parameters(self, *args, **kwargs):
            return ((f"_orig_mod.mine.{name}", p) for name, p in super().named_parameters(*args, **kwargs))

    assert named_tensors(Own(2, 1)).names == ("mine.weight", "mine.bias")


# ------------------------------------------------------------------------------------------------------------
# Pairs that all begin with "module.", a wrapper's or the model's own
# ------------------------------------------------------------------------------------------------------------


def only_child():
    return nn.ModuleDict({"module": small()})


BEGINNINGS = {"a wrapper's": lambda: nn.DataParallel(small()), "its own": only_child}


@pytest.mark.parametrize("begin", BEGINNINGS.values(), ids=BEGINNINGS.keys())
@pytest.mark.parametrize("beginning", ["", "module."])
@pytest.mark.parametrize(
    ("components", "pattern", "hits"),
    [
        (None, "0.weight", [0]),
        (None, "1.*", [2, 3, 4, 5]),
        ("module", "1.[01]", [1, 2]),
        ("layer", "1.0", [1]),
        ("type", "[*].bias", [1]),
        (ComponentSpec("module").group("1.1.*", None), "1.1.bias", [3]),
        (ComponentSpec().split("1.0.weight", 1), "1.0.weight[1]", [3]),
    ],
)
@pytest.mark.parametrize("cap", [lambda caps: caps, Fixed], ids=["mapping", "Fixed"])
def test_patterns_for_pairs_with_the_prefix_and_without(begin, beginning, components, pattern, hits, cap):
    pairs = list(begin().named_parameters())
    for _, p in pairs:
        p.grad = torch.ones_like(p)
    clipper = ComponentClipper(pairs, cap({beginning + pattern: 1e-3}), components=components)
    result = clipper.clip_()
    assert result.clipped.nonzero().flatten().tolist() == hits
    assert not any(name.startswith("module") for name in clipper.names)


@pytest.mark.parametrize("begin", BEGINNINGS.values(), ids=BEGINNINGS.keys())
@pytest.mark.parametrize("beginning", ["", "module."])
@pytest.mark.parametrize("part", [lambda pairs: pairs, lambda pairs: pairs[:3]], ids=["all", "some"])
def test_patterns_of_a_spec_with_the_prefix_and_without(begin, beginning, part):
    pairs = part(list(begin().named_parameters()))
    spec = ComponentSpec().group(f"{beginning}0.*", "all").split(f"{beginning}1.0.weight", 1)
    clipper = ComponentClipper(pairs, 0.1, components=spec)
    assert clipper.names[:3] == (f"{beginning}0.*", "1.0.weight[0]", "1.0.weight[1]")
    rows = ComponentClipper(pairs, 0.1, components=ComponentSpec().unitwise(f"{beginning}0.weight"))
    assert rows.names[:2] == ("0.weight[0]", "0.weight[1]")


def test_the_prefix_of_the_outermost_module_itself():
    pairs = list(nn.DataParallel(nn.Linear(2, 1)).named_parameters())
    for components in ("module", "layer"):
        clipper = ComponentClipper(pairs, {"module": 0.1}, components=components)
        assert clipper.names == ("",)
    ComponentClipper(pairs, {"all": 0.1}, components="all")
    with pytest.raises(ValueError, match="matches none of the 2 components"):
        ComponentClipper(pairs, {"module": 0.1})
    keys = {"weight": "w", "bias": "module.w"}
    assert ComponentClipper(pairs, {"module.w": 0.1}, components=lambda name, p: keys[name]).names == (
        "w",
        "module.w",
    )


def test_a_pattern_that_means_other_things_with_the_prefix_is_refused():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.linear = nn.Linear(2, 2)

    pairs = list(nn.DataParallel(Block()).named_parameters())
    message = (
        "may mean two things: all names .* begin with 'module.', .* 'weight' matches only with it; pass the Module"
    )
    with pytest.raises(ValueError, match=rf"max_norm: the pattern '\*.weight' {message}"):
        ComponentClipper(pairs, {"*.weight": 0.1})
    with pytest.raises(ValueError, match=rf"components: the pattern of unitwise '\*.weight' {message}"):
        ComponentClipper(pairs, 0.1, components=ComponentSpec().unitwise("*.weight"))
    # Where nothing depends on it, it isn't.
    ComponentClipper(pairs, {"weight": 0.2, "*.weight": 0.1})
    ComponentClipper(pairs, {"*.bias": 0.1, "*": 0.2})
    nested = [("module.module.weight", nn.Parameter(torch.ones(2))), ("module.weight", nn.Parameter(torch.ones(2)))]
    with pytest.raises(ValueError, match="the pattern 'module.weight' may mean two things"):
        ComponentClipper(nested, {"module.weight": 0.1})
    with pytest.raises(ValueError, match="the pattern 'module.[*]' may mean two things"):
        ComponentClipper(nested, {"module.*": 0.1})


def test_a_tied_name_with_the_prefix():
    pairs = list(nn.DataParallel(Tied()).named_parameters(remove_duplicate=False))
    with pytest.raises(ValueError, match=TIED):
        ComponentClipper(pairs, {"module.lm_head.weight": 0.1})
    with pytest.warns(UserWarning, match=f"{TIED}, which no pattern matches"):
        ComponentClipper(pairs, {"module.lm_head.*": 0.1})


@pytest.mark.parametrize("components", [None, "module", "layer", "type", "all"])
@pytest.mark.parametrize("make", [only_child, lambda: nn.ModuleDict({"module": nn.Linear(2, 1)})])
@pytest.mark.parametrize("is_bound", [True, False])
def test_what_a_threshold_has_learnt_goes_from_a_module_to_pairs_and_back(components, make, is_bound):
    model = make()
    module, pairs = (
        ComponentClipper(form, EMA(warmup_steps=1), components=components)
        for form in (model, list(model.named_parameters()))
    )
    assert components == "all" or module.names != pairs.names
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for one, other in ((module, list(model.named_parameters())), (pairs, model)):
        one.clip_()
        one.clip_()
        threshold = EMA(warmup_steps=1)
        if is_bound:
            clipper = ComponentClipper(other, threshold, components=components)
            threshold.load_state_dict(one.max_norm.state_dict())
        else:
            threshold.load_state_dict(one.max_norm.state_dict())
            clipper = ComponentClipper(other, threshold, components=components)
        assert torch.equal(clipper.clip_().caps, one.clip_().caps)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (("module.a", "module.b"), ("a", "b"), True),
        (("module", "module.b"), ("", "b"), True),
        (("module[0]", "module.b[1]"), ("[0]", "b[1]"), True),
        (("a", "b"), ("a", "b"), True),
        ((), (), True),
        (("module.a", "b"), ("a", "b"), False),
        (("module.a", "b"), ("a", "module.b"), False),
        (("module.a", "module.b"), ("b", "a"), False),
        (("module.module.a",), ("a",), False),
        (("modulea",), ("a",), False),
        (("module.a",), ("a", "b"), False),
    ],
)
def test_which_names_are_the_same(one, other, same):
    assert are_same_names(one, other) == are_same_names(other, one) == same


def test_patterns_with_the_prefix_in_a_compiled_function():
    model, twin = nn.DataParallel(small()), nn.DataParallel(small())
    for p, t in zip(model.parameters(), twin.parameters(), strict=True):
        p.grad = random_grad(p.shape)
        t.grad = p.grad.clone()
    pairs, twins = list(model.named_parameters()), list(twin.named_parameters())
    spec = ComponentSpec("module").split("module.1.0.weight", 1).group("module.*.bias", "all")
    caps = {"module.1.*": 0.1, "0": 0.2}
    torch._dynamo.reset()
    step = torch.compile(
        lambda: fused_component_clip_(pairs, caps, components=spec), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(step(), fused_component_clip_(twins, caps, components=spec))
    assert all(torch.equal(p.grad, t.grad) for p, t in zip(model.parameters(), twin.parameters(), strict=True))


# ------------------------------------------------------------------------------------------------------------
# Parametrizations
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "module", "layer", "kind"),
    [
        ("enc.lin.parametrizations.weight.original0", "enc.lin", "enc.lin", None),
        ("enc.lin.parametrizations.weight.original", "enc.lin", "enc.lin", None),
        ("h.3.lin.parametrizations.weight.0.lora_A", "h.3.lin", "h.3", "h.*.lin.parametrizations.weight.0.lora_A"),
        ("h.3.parametrizations.weight.1.net.2.bias", "h.3", "h.3", "h.*.parametrizations.weight.1.net.2.bias"),
        ("parametrizations.weight.original1", "", "", None),
        # A module of that name which is none of torch's.
        ("parametrizations.weight", "parametrizations", "parametrizations", None),
        ("parametrizations.lin.weight", "parametrizations.lin", "parametrizations.lin", None),
    ],
)
def test_name_rules_of_parametrizations(name, module, layer, kind):
    assert (module_of(name), layer_of(name), type_of(name)) == (module, layer, kind or name)


class LowRank(nn.Module):
    def __init__(self, rows, columns):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(rows, 1)), nn.Parameter(torch.ones(1, columns))

    def forward(self, weight):
        return weight + self.a @ self.b


def with_low_rank(linear):
    parametrize.register_parametrization(linear, "weight", LowRank(*linear.weight.shape))
    return linear


@pytest.mark.parametrize("change", [parametrizations.weight_norm, parametrizations.spectral_norm, with_low_rank])
def test_a_parametrized_weight_goes_with_its_bias(change):
    model = small()
    expected = resolve(named_tensors(model), "module").names
    change(model[0])
    change(change(model[1][0]))
    named = named_tensors(model)
    assert resolve(named, "module").names == resolve(named, "layer").names == expected
    for p in model.parameters():
        p.grad = random_grad(p.shape)
    together = torch.cat([p.grad.flatten() for p in model[0].parameters()])
    norms = component_norms(model, components="module")
    torch.testing.assert_close(norms[0], together.norm())


# ------------------------------------------------------------------------------------------------------------
# Tied parameters
# ------------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.body = nn.Linear(3, 3)
        self.shared = self.body
        self.lm_head = nn.Linear(3, 4)
        self.lm_head.weight = self.embed.weight


@pytest.mark.parametrize(
    "form",
    [
        lambda m: m,
        compiled,
        lambda m: nn.DataParallel(compiled(m)),
        lambda m: list(compiled(m).named_parameters(remove_duplicate=False)),
        lambda m: list(nn.DataParallel(m).named_parameters(remove_duplicate=False)),
    ],
    ids=["module", "compiled", "DP of compiled", "pairs", "pairs of DP"],
)
def test_other_names_of_tied_parameters_are_known(form):
    named = named_tensors(form(Tied()))
    assert named.names == ("embed.weight", "body.weight", "body.bias", "lm_head.bias")
    assert dict(named.aliases) == {
        "lm_head.weight": "embed.weight",
        "shared.weight": "body.weight",
        "shared.bias": "body.bias",
    }


TIED = "'lm_head.weight' is tied to 'embed.weight' and goes by that name"


@pytest.mark.parametrize(
    ("max_norm", "components", "message"),
    [
        ({"lm_head.weight": 0.1}, None, f"max_norm: the pattern 'lm_head.weight' matches none of .*{TIED}"),
        ({"lm_head.w*": 0.1}, "parameter", TIED),
        ({"shared.*": 0.1}, None, "'shared.weight' is tied to 'body.weight'"),
        ({"shared": 0.1}, "module", "'shared' is tied to 'body' and goes by that name"),
        (0.1, ComponentSpec().split("lm_head.weight", 1), rf"components: split\('lm_head.weight'\) .*{TIED}"),
        (0.1, ComponentSpec().unitwise("lm_head.w*"), rf"unitwise\('lm_head.w\*'\) .*{TIED}"),
        (0.1, ComponentSpec().group("lm_head.weight", "all"), rf"group\('lm_head.weight'\) .*{TIED}"),
        # A slice of a tied parameter.
        (
            {"lm_head.weight[a]": 0.1},
            ComponentSpec().split("embed.weight", (1, 3), names=("a", "b")),
            r"'lm_head.weight\[a\]' is tied to 'embed.weight\[a\]'",
        ),
    ],
)
def test_a_pattern_for_a_tied_name_is_told_the_other(max_norm, components, message):
    model = Tied()
    for p in model.parameters():
        p.grad = random_grad(p.shape)
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        ComponentClipper(model, max_norm, components=components)
    with pytest.raises(ValueError, match=message):
        fused_component_clip_(compiled(model), max_norm, components=components)
    assert all(torch.equal(p.grad, b) for p, b in zip(model.parameters(), before, strict=True))


def test_logged_norms_of_a_tied_name():
    with pytest.raises(ValueError, match=f"log_norms: 'lm_head.weight' matches none of the 4 components.*{TIED}"):
        TrainerClipping(0.1, log_norms="lm_head.weight").check(Tied(), None)
    TrainerClipping(0.1, components=ComponentSpec().split("embed.weight", 1), log_norms="embed.weight[0]").check(
        Tied(), None
    )


def test_bare_tensors_that_come_twice():
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="'2' is tied to '0' and goes by that name"):
        ComponentClipper([first, second, first], {"2": 0.1})


def test_a_callable_is_not_asked_about_other_names():
    asked = []
    named = named_tensors(Tied())
    assert resolve(named, lambda name, p: asked.append(name) or name).aliases == ()
    assert tuple(asked) == named.names


def test_a_tied_parameter_that_a_pattern_misses_by_its_first_name_is_said():
    with pytest.warns(UserWarning, match=f"{TIED}, which no pattern matches: it will not be clipped") as caught:
        ComponentClipper(Tied(), {"lm_head.*": 0.1, "body.*": 0.1})
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ComponentClipper(Tied(), {"lm_head.*": 0.1, "embed.*": math.inf})
        ComponentClipper(Tied(), {"*.weight": 0.1})
        ComponentClipper(Tied(), {"body.*": 0.1})


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("_orig_mod.body.*", r"\); names are those of the model itself, without what wraps it: 'body.\*'$"),
        ("module.body.bias", r"\); names are those of the model itself, without what wraps it: 'body.bias'$"),
        ("body.wieght", r"\); did you mean 'body.weight'\?$"),
        ("decoder.*", r"\)$"),
        ("q", r"\)$"),
    ],
)
def test_hints_for_a_pattern_that_matches_nothing(pattern, hint):
    with pytest.raises(ValueError, match=hint):
        ComponentClipper(Tied(), {pattern: 0.1})


def test_modules_shared_many_times_over_and_in_circles():
    model = nn.Linear(1, 1)
    for _ in range(40):  # 2**40 paths
        model = nn.ModuleDict({"a": model, "b": model})
    named = named_tensors(model)
    assert named.names == (f"{'a.' * 40}weight", f"{'a.' * 40}bias")
    assert (f"{'a.' * 39}b.weight", named.names[0]) in named.aliases
    assert len(named.aliases) < 2000
    circle = Tied()
    circle.body.owner = circle
    assert len(named_tensors(circle).names) == 4


def test_patterns_of_a_spec_in_a_compiled_function():
    model, twin = small(), small()
    for p, t in zip(model.parameters(), twin.parameters(), strict=True):
        p.grad = random_grad(p.shape)
        t.grad = p.grad.clone()
    spec = ComponentSpec("module").split("1.*.weight", 1).group("*.bias", "all")
    torch._dynamo.reset()
    wrapped = compiled(model)
    step = torch.compile(
        lambda: fused_component_clip_(wrapped, 0.1, components=spec), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(step(), fused_component_clip_(twin, 0.1, components=spec))
    tied = Tied()
    tied.body.bias.grad = torch.ones(3)
    torch._dynamo.reset()
    step = torch.compile(lambda: fused_component_clip_(tied, {"lm_head.weight": 0.1}), backend="aot_eager")
    with pytest.raises(ValueError, match=TIED):
        step()
    assert all(torch.equal(p.grad, t.grad) for p, t in zip(model.parameters(), twin.parameters(), strict=True))
