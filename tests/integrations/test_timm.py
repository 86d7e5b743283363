"""timm's call: its signature, its modes."""

import ast
import importlib.util
import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

from cwclip_kernels import fused_component_clip_
from cwclip_kernels.integrations.timm import dispatch_clip_grad
from helpers import assert_grads, copy_of, grads_of, parameters, same_bits
from stand_ins import agc

SHAPES = [(3, 4), (7,), (), (2, 5, 2), (4, 3, 2, 2)]


def test_signature_is_the_one_of_timm():
    shown = [
        p for p in inspect.signature(dispatch_clip_grad).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    empty = inspect.Parameter.empty
    assert [(p.name, p.default) for p in shown] == [
        ("parameters", empty),
        ("value", empty),
        ("mode", "norm"),
        ("norm_type", 2.0),
    ]


def test_signature_is_the_one_of_an_installed_timm():
    found = importlib.util.find_spec("timm")
    if found is None:
        pytest.skip("no timm")
    source = Path(found.submodule_search_locations[0]) / "utils" / "clip_grad.py"  # timm needs torchvision: not run
    (theirs,) = (n for n in ast.parse(source.read_text()).body if isinstance(n, ast.FunctionDef))
    names = [
        p.name for p in inspect.signature(dispatch_clip_grad).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    assert [argument.arg for argument in theirs.args.args] == names
    assert [ast.literal_eval(default) for default in theirs.args.defaults] == ["norm", 2.0]


def with_values(params):
    """Parameters that aren't zero, some of them smaller than AGC's floor."""
    for i, p in enumerate(params):
        p.data.normal_().mul_(10.0 ** (i - 3))
    return params


def test_norm_is_by_component():
    ours = parameters(SHAPES)
    theirs = copy_of(ours)
    assert dispatch_clip_grad(iter(ours), value=0.5, mode="norm") is None
    fused_component_clip_(theirs, 0.5)
    assert all(map(same_bits, grads_of(ours), grads_of(theirs)))


def test_one_norm_of_all_is_what_timm_does():
    ours = parameters(SHAPES)
    theirs = copy_of(ours)
    dispatch_clip_grad(ours, 0.5, norm_type=1.0, components="all")
    nn.utils.clip_grad_norm_(theirs, 0.5, norm_type=1.0)
    assert_grads(ours, theirs, torch.float32)


def test_value_is_torchs():
    ours = parameters(SHAPES)
    theirs = copy_of(ours)
    dispatch_clip_grad(ours, 0.1, mode="value")
    nn.utils.clip_grad_value_(theirs, 0.1)
    assert all(map(same_bits, grads_of(ours), grads_of(theirs)))


def test_agc_is_by_output_unit_and_follows_the_parameters():
    ours = with_values(parameters(SHAPES))
    other = with_values(parameters([(2, 2)]))
    for factor in (0.01, 0.01, 0.3):
        for params in (ours, other):
            theirs = copy_of(params)
            for p, copy in zip(params, theirs, strict=True):
                copy.data.copy_(p)
            dispatch_clip_grad(params, factor, mode="agc")
            agc(theirs, factor)
            assert_grads(params, theirs, torch.float32)
            for p in params:
                p.data.mul_(1.5)
                p.grad = torch.randn_like(p)


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-5, 0.0])
def test_agc_of_small_gradients_is_timms(scale):
    """Of a parameter of zeros the cap is 1e-5, of which an eps of 1e-6 would take a part."""
    ours = parameters(SHAPES)
    for p in ours:
        p.data.zero_()
        p.grad.mul_(scale)
    theirs = copy_of(ours)
    before = max(p.grad.norm().item() for p in ours if p.ndim <= 1)  # small ones by chance, too
    dispatch_clip_grad(ours, 0.01, mode="agc")
    agc(theirs, 0.01)
    assert_grads(ours, theirs, torch.float32)
    norms = torch.stack([p.grad.norm() for p in ours if p.ndim <= 1])
    assert norms.max().item() == pytest.approx(min(1e-5, before), rel=1e-6)


def test_nothing_is_taken_for_something_else():
    with pytest.raises(ValueError, match="mode: expected one of norm, value, agc, not 'global'"):
        dispatch_clip_grad(parameters(SHAPES), 0.5, mode="global")
    with pytest.raises(ValueError, match="components: 'agc' has its own"):
        dispatch_clip_grad(parameters(SHAPES), 0.5, mode="agc", components="layer")
    with pytest.raises(ValueError, match="eps: 'agc' adds nothing to a norm"):
        dispatch_clip_grad(parameters(SHAPES), 0.5, mode="agc", eps=1e-6)
    with pytest.raises(ValueError, match="nonfinite"):
        dispatch_clip_grad(parameters(SHAPES), 0.5, nonfinite="ignore")
    for mode in ("norm", "value", "agc"):
        with pytest.raises(TypeError, match="unexpected keyword argument 'epsilon'; the options are .*eps"):
            dispatch_clip_grad(parameters(SHAPES), 0.5, mode, epsilon=1e-6)


def test_eps():
    ours = parameters(SHAPES)
    theirs = copy_of(ours)
    dispatch_clip_grad(ours, 0.5, eps=0.1)
    fused_component_clip_(theirs, 0.5, eps=0.1)
    assert all(map(same_bits, grads_of(ours), grads_of(theirs)))
