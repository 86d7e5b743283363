"""Pairs that all begin with "module.", which may be a wrapper's or the model's own."""

import pytest
import torch
from torch import nn

from cwclip_kernels import ComponentClipper, ComponentSpec, fused_component_clip_
from cwclip_kernels.components.naming import are_same_names
from cwclip_kernels.thresholds import EMA, Fixed
from helpers import random_grad
from naming_models import TIED, Tied, small


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
    with pytest.raises(ValueError, match=rf"components: unitwise\('\*.weight'\) {message}"):
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
