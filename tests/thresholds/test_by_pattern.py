"""A mapping of patterns to thresholds: each does for its own components what it would do alone."""

import math

import pytest
import torch

from cwclip_kernels import (
    ComponentClipper,
    fused_component_clip_,
    thresholds,
)
from cwclip_kernels.thresholds import (
    EMA,
    Bounded,
    ByPattern,
    Fixed,
    FromGlobal,
    ParamRelative,
    Percentile,
    Schedule,
    ZScore,
)
from helpers import BACKENDS, DEVICE, random_grad, same_bits
from named_pairs import NAMES, model_of, twin_of

A, B = [0, 2], [1, 3]  # the components under two patterns; the last is in neither


def recorded(**flags):
    """A threshold that keeps what it was told."""

    class Recorded(thresholds.Threshold):
        def caps(self, device, norms):
            self.seen = norms
            self.weights = self.setting.parameter_norms() if flags.get("reads_parameters") else None
            return torch.full((), 0.5, dtype=torch.float64, device=device)

        def update_(self, norms, coefs):
            self.learnt = norms, coefs

    for name, value in flags.items():
        setattr(Recorded, name, value)
    return Recorded()


MIXES = {
    "one pass": lambda: (EMA(warmup_steps=0), ParamRelative(0.3)),
    "with eps": lambda: (Schedule(lambda step: 1.0 / (1 + step)), Fixed(torch.tensor(0.2, device=DEVICE))),
    "both": lambda: (EMA(warmup_steps=2), 0.3),
    "nested": lambda: (Bounded({"a.*": EMA(warmup_steps=0), "*": 0.3}, high=1.0), 0.2),
    "two passes": lambda: (ZScore(warmup_steps=2), Bounded(Percentile(40.0), 0.5, 2.0)),
    "twice the same kind": lambda: (EMA(warmup_steps=2, warmup_norm=0.5), EMA(warmup_steps=3, warmup_norm=2.0)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mix", MIXES)
def test_each_does_what_it_would_do_alone(mix, backend):
    ours = model_of()
    parts = [twin_of([ours[i] for i in own]) for own in (A, B)]
    options = {"eps": 0.25, "backend": backend}
    (x, y), alone = MIXES[mix](), MIXES[mix]()
    clipper = ComponentClipper(ours, {"*.weight": x, "*.bias": y}, **options)
    clippers = [ComponentClipper(part, cap, **options) for part, cap in zip(parts, alone, strict=True)]
    assert (clipper._caps().eps is not None) == (mix in ("both", "nested"))
    for step in range(5):
        for i, p in enumerate(ours):
            p[1].grad = None if (step, i) == (3, 0) else random_grad(p[1].shape, scale=20.0 if step == 4 else 1.0)
        for part, own in zip(parts, (A, B), strict=True):
            for (_, twin), i in zip(part, own, strict=True):
                twin.grad = None if ours[i][1].grad is None else ours[i][1].grad.clone()
        head = ours[4][1].grad.clone()
        result = clipper.clip_()
        for part, own, other in zip(parts, (A, B), clippers, strict=True):
            expected = other.clip_()
            torch.testing.assert_close(result.norms[own], expected.norms)
            torch.testing.assert_close(result.caps[own], expected.caps.expand(2), rtol=1e-6, atol=0)
            torch.testing.assert_close(result.coefs[own], expected.coefs)
            for (_, twin), i in zip(part, own, strict=True):
                if twin.grad is not None:
                    torch.testing.assert_close(ours[i][1].grad, twin.grad)
        assert result.caps[4] == math.inf
        assert same_bits(ours[4][1].grad, head)
    assert result.clipped.any()


def test_eps_is_added_under_numbers_alone_by_the_formula():
    pairs = model_of()
    norms = torch.stack([p.grad.double().norm() for _, p in pairs])
    caps = {"*.weight": EMA(warmup_steps=0, ratio=0.5), "*.bias": 0.25, "*": Schedule(lambda step: 0.5)}
    clipper = ComponentClipper(pairs, caps, eps=1.0)
    clipper.clip_()
    for _, p in pairs:
        p.grad.copy_(random_grad(p.shape))
    before = torch.stack([p.grad.double().norm() for _, p in pairs])
    result = clipper.clip_()
    wanted = [norms[0] / 2, 0.25, norms[2] / 2, 0.25, 0.5]
    for i, (n, c, eps) in enumerate(zip(before.tolist(), wanted, (0.0, 1.0, 0.0, 1.0, 1.0), strict=True)):
        assert result.coefs[i].item() == pytest.approx(min(1.0, float(c) / (n + eps)), rel=1e-5)


def test_a_mapping_of_numbers_is_what_it_was():
    pairs = model_of()
    clipper = ComponentClipper(pairs, {"*.weight": 0.1, "*": 1})
    assert clipper.max_norm == {"*.weight": 0.1, "*": 1}
    assert clipper._fixed.eps is None
    assert clipper._fixed.update_ is None
    assert not clipper._fixed.needs_norms
    assert clipper.state_dict() == {}
    twins = twin_of(pairs)
    clipper.clip_()
    fused_component_clip_(twins, ByPattern({"*.weight": 0.1, "*": 1}))
    assert all(same_bits(a.grad, b.grad) for (_, a), (_, b) in zip(pairs, twins, strict=True))


def test_a_threshold_is_told_of_its_own_components_alone():
    pairs = model_of([f"module.{name}" for name in NAMES])
    pairs[0][1].requires_grad_(False).grad = None
    weights, rest = recorded(needs_norms=True, reads_parameters=True), recorded()
    clipper = ComponentClipper(pairs, {"module.*.weight": weights, "*": rest}, components="parameter")
    result = clipper.clip_()
    setting = weights.setting
    assert setting.names == ("a.weight", "b.weight")
    assert setting.spellings == ("module.a.weight", "module.b.weight")
    assert setting.numels == (0, 8)
    assert setting.sizes == (12, 8)
    assert setting.trained == (False, True)
    assert setting.members == ((0,), (1,))
    assert rest.setting.names == ("a.bias", "b.bias", "head")
    assert rest.setting.trained == ()
    assert weights.seen.tolist() == result.norms[A].tolist()
    assert rest.seen is None
    assert weights.weights.tolist() == pytest.approx([0.0, pairs[2][1].norm().item()])
    for one, own in ((weights, A), (rest, [1, 3, 4])):
        assert [t.tolist() for t in one.learnt] == [result.norms[own].tolist(), result.coefs[own].tolist()]
    pairs[0][1].requires_grad_(True)
    clipper.clip_()
    assert weights.setting.numels == (12, 8)


def test_components_of_several_parameters():
    weights = recorded()
    setting = ComponentClipper(model_of(), {"b": weights}, components="module").max_norm.setting
    assert setting.members == ((0, 1), (2, 3), (4,))
    assert weights.setting.members == ((0, 1),)
    assert weights.setting.numels == (10,)


def test_patterns_are_those_of_numbers():
    pairs, first, second = model_of(), recorded(), recorded()
    with pytest.raises(ValueError, match=r"max_norm: the pattern 'a.wieght' matches none .* did you mean 'a.weight'"):
        ComponentClipper(pairs, {"a.wieght": first, "*": 1.0})
    result = ComponentClipper(pairs, {"a.*": first, "a.bias": 0.01, "*weight": second, "b.*": math.inf}).clip_()
    assert result.caps.tolist() == [0.5, 0.5, 0.5, math.inf, math.inf]
    assert first.setting.names == ("a.weight", "a.bias")
    # One that earlier patterns leave nothing.
    late = EMA()
    clipper = ComponentClipper(pairs, {"*": 0.1, "head": late})
    clipper.clip_()
    assert clipper._caps().needs_norms is False
    clipper.load_state_dict(clipper.state_dict())


def test_one_object_under_two_patterns_makes_the_caps_of_both_together():
    pairs = model_of()
    budget = FromGlobal(1.0, "numel")
    result = ComponentClipper(pairs, {"a.weight": budget, "a.bias": 0.5, "b.*": budget}).clip_()
    expected = [math.sqrt(n / 22) for n in (12, 8, 2)]
    assert result.caps[[0, 2, 3]].tolist() == pytest.approx(expected)
    assert budget.setting.names == ("a.weight", "b.weight", "b.bias")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: {"*": EMA(), 3: 0.1}, TypeError, "max_norm: expected strings as patterns, not int"),
        (lambda: {"*": EMA(), "x": True}, TypeError, r"max_norm\['x'\]: expected a number or one of thresholds"),
        (lambda: {"*": EMA(), "x": -1}, ValueError, r"max_norm\['x'\]: expected a number >= 0"),
        (
            lambda: {"*": EMA(), "x": torch.ones(())},
            TypeError,
            r"max_norm\['x'\]: .*Fixed for a tensor\), not Tensor",
        ),
        (lambda: {"*": {"a": EMA()}}, TypeError, r"max_norm\['\*'\]: expected a number or one of thresholds"),
        (lambda: {"*": torch.ones(())}, TypeError, r"max_norm\['\*'\]: expected a number or one of thresholds"),
        (lambda: ByPattern(EMA()), TypeError, "by_pattern: expected a mapping"),
    ],
)
def test_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        fused_component_clip_(model_of(), make())
