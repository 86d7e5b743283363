"""Names: the same whatever wraps a model, and patterns that match none of them."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper

from cwclip_kernels import ComponentClipper, ComponentSpec, fused_component_clip_
from cwclip_kernels.components.parameters import named_tensors
from cwclip_kernels.components.resolve import resolve
from cwclip_kernels.thresholds import EMA
from helpers import random_grad
from naming_models import TIED, Tied, small

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
    pytest.importorskip("transformers")
    from cwclip_kernels.integrations.transformers.clipping import TrainerClipping

    clipping = TrainerClipping({"0.weight": 0.1}, log_norms="1.*")
    clipping.check(nn.DataParallel(compiled(small())), None)
    model = nn.ModuleDict({"module": nn.Linear(2, 1)})
    model["module"].weight.grad = torch.ones(1, 2)
    clipping = TrainerClipping(0.1)
    clipping.clip_(model)
    assert clipping.last.names == ("module.weight", "module.bias")


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
# Tied parameters
# ------------------------------------------------------------------------------------------------------------


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
    pytest.importorskip("transformers")
    from cwclip_kernels.integrations.transformers.clipping import TrainerClipping

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
