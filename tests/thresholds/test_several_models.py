"""One threshold and several models whose components have the same names."""

import pytest

from cwclip_kernels import ComponentClipper, fused_component_clip_, thresholds
from cwclip_kernels.optim import ComponentClipAdamW
from helpers import grads_of, parameters, same_bits

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
    way(first, max_norm)()
    go_on = way(second, max_norm)
    go_on()
    go_on()
    before = grads_of(first)
    with pytest.raises(ValueError, match="learns from two sets of parameters in turn"):
        way(first, max_norm)()
    assert all(same_bits(a, b) for a, b in zip(grads_of(first), before, strict=True))
    go_on()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["RMS", "FromGlobal", "ParamRelative"])
def test_two_models_in_turn_share_what_does_not_learn(kind, way):
    max_norm = getattr(thresholds, kind)(0.1)
    models = [parameters([(4,), (3, 2)]) for _ in range(2)]
    for model in models * 2:
        way(model, max_norm)()


def test_another_model_after_the_first_is_gone():
    """As where a trainer makes the model anew, and where many of them follow each other."""
    ema = thresholds.EMA()
    for _ in range(5):
        fused_component_clip_(parameters([(4,)]), ema)
    assert len(ema._former) <= 1
