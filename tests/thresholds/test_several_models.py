"""One threshold and several models whose components have the same names."""

import pytest
import torch
from torch import nn

from cwclip_kernels import (
    ComponentClipper,
    clip_in_backward,
    component_clip_with_norms_,
    fused_component_clip_,
    thresholds,
)
from cwclip_kernels.optim import ComponentClipAdamW
from helpers import DEVICE, grads_of, parameters, same_bits

LEARN = {
    "EMA": thresholds.EMA,
    "ZScore": thresholds.ZScore,
    "Percentile": thresholds.Percentile,
    "Bounded": lambda: thresholds.Bounded(thresholds.EMA(), high=1.0),
    "ByPattern": lambda: {"*": thresholds.EMA()},
}


def clip_by_function(params, max_norm):
    return lambda: fused_component_clip_(params, max_norm)


def clip_by_clipper(params, max_norm):
    return ComponentClipper(params, max_norm).clip_


def step_of_optimizer(params, max_norm):
    return ComponentClipAdamW(params, max_norm=max_norm).step


WAYS = [clip_by_function, clip_by_clipper, step_of_optimizer]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", LEARN)
def test_two_models_in_turn_are_refused_by_what_learns(kind, way):
    """Names are the same; the second model may go on with what the first has taught, unless the first returns."""
    max_norm = LEARN[kind]()
    first, second = parameters([(4,), (3, 2)]), parameters([(4,), (3, 2)])
    begin = way(first, max_norm)
    begin()
    go_on = way(second, max_norm)
    go_on()
    go_on()
    before = grads_of(first)
    with pytest.raises(ValueError, match="learns from two sets of parameters in turn"):
        begin()
    assert all(same_bits(a, b) for a, b in zip(grads_of(first), before, strict=True))
    go_on()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["RMS", "FromGlobal", "ParamRelative"])
def test_two_models_in_turn_share_what_does_not_learn(kind, way):
    max_norm = getattr(thresholds, kind)(0.1)
    models = [parameters([(4,), (3, 2)]) for _ in range(2)]
    for model in models * 2:
        way(model, max_norm)()


def clip_by_a_new_clipper(params, max_norm):
    return lambda: ComponentClipper(params, max_norm).clip_()


def clip_by_a_grouping(params, max_norm):
    return lambda: fused_component_clip_(params, max_norm, components=lambda name, _: name)


@pytest.mark.parametrize("way", [*WAYS, clip_by_a_new_clipper, clip_by_a_grouping])
@pytest.mark.parametrize("shared", [False, True])
def test_two_models_in_turn_are_refused_in_each_way(way, shared):
    """Also where they share their first parameter, as two heads on one encoder."""
    ema = thresholds.EMA()
    first, second = parameters([(4,), (3, 2)]), parameters([(4,), (3, 2)])
    if shared:
        second[0] = first[0]
    one = way(first, ema)
    one()
    way(second, ema)()
    with pytest.raises(ValueError, match="learns from two sets of parameters in turn"):
        one()


def test_models_one_after_another_whose_ids_come_again():
    """As folds of a cross-validation, with parameters small enough that Python gives their places to the next."""
    ema, known, again = thresholds.EMA(), [], 0
    for _ in range(1000):
        (p,) = parameters([(4, 4)])
        for _ in range(2):
            fused_component_clip_([p], ema)
        again += id(p) in known[:-1]
        known.append(id(p))
        del p
        if again == 3:
            break
    assert again, "no id came again, so that nothing was shown"


@pytest.mark.parametrize("kind", LEARN)
def test_one_model_in_several_ways(kind):
    """By the function, by clippers, from several places: it is the same model."""
    max_norm, params = LEARN[kind](), parameters([(4,), (3, 2)])
    calls = [way(params, max_norm) for way in (*WAYS, *WAYS)]
    for call in calls * 2:
        call()
    threshold = ComponentClipper(params, max_norm).max_norm
    assert len(threshold._former) <= len(calls)


def test_models_that_follow_each_other():
    """As where a trainer makes the model anew: it begins with what is known."""
    ema = thresholds.EMA(warmup_steps=10)
    for _ in range(5):
        fused_component_clip_(parameters([(4,)]), ema)
    assert ema.state_dict()["host"] == {"steps": 5}


SHARED = {
    "RMS": lambda: thresholds.RMS(0.01),
    "Bounded": lambda: thresholds.Bounded(thresholds.RMS(0.01), high=5.0),
    "ByPattern": lambda: {"*": thresholds.RMS(0.01)},
    "by size": lambda: thresholds.FromGlobal(0.1, split="numel"),
}


def models_of_two_sizes():
    return [nn.Linear(100, 20, device=DEVICE), nn.Linear(3, 2, device=DEVICE)]


def backward(model):
    model.zero_grad()
    (model(torch.ones(1, model.in_features, device=DEVICE)).sum() * 100.0).backward()


@pytest.mark.parametrize("kind", SHARED)
def test_caps_in_the_backward_pass_are_of_the_model_itself(kind):
    """Also where the threshold was bound to another model last."""
    max_norm, models = SHARED[kind](), models_of_two_sizes()
    handles = [clip_in_backward(model, max_norm) for model in models]
    for model, handle in list(zip(models, handles, strict=True)) * 2:
        backward(model)
        found = handle.last.caps
        model.zero_grad()
        torch.testing.assert_close(found, ComponentClipper(model, SHARED[kind]()).clip_().caps, rtol=0.0, atol=0.0)


def test_two_models_in_turn_are_refused_in_the_backward_pass():
    max_norm, models = thresholds.EMA(warmup_steps=0), models_of_two_sizes()
    for model in models:
        clip_in_backward(model, max_norm)
    with pytest.raises(ValueError, match="learns from two sets of parameters in turn"):
        backward(models[0])


def clip_compiled(model, max_norm):
    return ComponentClipper(model, max_norm).clip_


def clip_with_norms_compiled(model, max_norm):
    ComponentClipper(model, max_norm)  # binds the threshold
    norms = torch.ones(2, device=DEVICE)
    return lambda: component_clip_with_norms_(model, max_norm, norms)


def function_compiled(model, max_norm):
    ComponentClipper(model, max_norm)
    return lambda: fused_component_clip_(model, max_norm)


@pytest.mark.builds
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # of importing inductor
@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("way", [clip_compiled, clip_with_norms_compiled, function_compiled, step_of_optimizer])
def test_compiled_functions_refuse_a_threshold_of_another_model(kind, way):
    """Binding can't be traced: without a look at it the caps were those of the model that was bound last."""
    torch._dynamo.reset()
    max_norm, models = SHARED[kind](), models_of_two_sizes()
    steps = []
    for model in models:
        backward(model)
        source = model if way is not step_of_optimizer else list(model.named_parameters())
        steps.append(way(source, max_norm))
    first, second = (torch.compile(step, fullgraph=True, backend="aot_eager") for step in steps)
    second()
    before = grads_of(models[0].parameters())
    with pytest.raises(Exception, match="used for other parameters since"):  # one of Dynamo's, around ours
        first()
    assert all(same_bits(a, b) for a, b in zip(grads_of(models[0].parameters()), before, strict=True))
    steps[0]()  # outside
    first()
    torch._dynamo.reset()
