"""Bounds around thresholds, and caps by the root mean square."""

import copy
import math

import pytest
import torch

from cwclip_kernels import ComponentClipper, clip_in_backward, fused_component_clip_
from cwclip_kernels.thresholds import EMA, RMS, Bounded, ByPattern, FromGlobal, Schedule, Threshold
from helpers import BACKENDS, DEVICE, parameter, parameters, random_grad, same_bits
from no_sync import NoSync


class Given(Threshold):
    """Caps that the test sets."""

    def __init__(self, *caps):
        super().__init__()
        self.values = torch.tensor(caps, dtype=torch.float64, device=DEVICE)

    def caps(self, device, norms):
        return self.values


def number(value):
    return value


def tensor(value):
    return torch.tensor(value, dtype=torch.float32, device=DEVICE)


@pytest.mark.parametrize("kind", [number, tensor])
class TestBounded:
    def test_caps_lie_between(self, kind):
        given = Given(0.1, 0.5, 3.0, math.inf, math.nan, -1.0, 0.0)
        params = parameters([(3,)] * 7)
        caps = ComponentClipper(params, Bounded(given, kind(0.25), kind(2.0))).clip_().caps.tolist()
        assert caps[:4] == [0.25, 0.5, 2.0, 2.0]
        assert all(map(math.isnan, caps[4:6]))  # faults of the threshold, which a bound doesn't hide
        assert caps[6] == 0.25
        # None at all: the same bits.
        for bounded in (Bounded(given), Bounded(given, kind(0.0))):
            found = ComponentClipper(params, bounded).clip_().caps
            assert found.tolist()[:4] == [0.1, 0.5, 3.0, math.inf]

    def test_numbers_mappings_and_schedules(self, kind):
        params = parameters([(3,), (4,), (2,)], scale=10.0)
        for inner, wanted in (
            (5.0, [1.0] * 3),
            ({"0": 0.1, "1": 0.5}, [0.25, 0.5, 1.0]),
            ({"0": Schedule(lambda step: 0.1), "1": 0.5, "2": FromGlobal(9.0)}, [0.25, 0.5, 1.0]),
            (torch.tensor([0.1, 0.5, 7.0], device=DEVICE), [0.25, 0.5, 1.0]),
        ):
            clipper = ComponentClipper(params, Bounded(inner, kind(0.25), kind(1.0)), eps=0.5)
            for p in params:
                p.grad = random_grad(p.shape, scale=10.0)
            result = clipper.clip_()
            assert result.caps.expand(3).tolist() == pytest.approx(wanted)
            # All of them add eps, as without bounds.
            coefs = result.caps / (result.norms.double() + 0.5)
            torch.testing.assert_close(result.coefs.double(), coefs.clamp(max=1.0), rtol=1e-5, atol=0)

    def test_follows_what_it_is_around(self, kind):
        """A floor that is never reached changes no bit, and the threshold learns the clipped norms."""
        ours = parameters([(3,), (4,)])
        theirs = [parameter(p.grad.clone()) for p in ours]
        clippers = [
            ComponentClipper(ours, Bounded(EMA(warmup_steps=2), kind(0.0), kind(1e9))),
            ComponentClipper(theirs, EMA(warmup_steps=2)),
        ]
        for _ in range(5):
            for a, b in zip(ours, theirs, strict=True):
                a.grad = random_grad(a.shape)
                b.grad = a.grad.clone()
            ours_now, theirs_now = (one.clip_() for one in clippers)
            assert same_bits(ours_now.coefs, theirs_now.coefs)
        states = [one.state_dict()["max_norm"] for one in clippers]
        assert states[0]["policy"] == "EMA"
        assert same_bits(states[0]["tensors"]["gamma"], states[1]["tensors"]["gamma"])
        # Bounds may be added to a run, and left out.
        clippers[0].load_state_dict(clippers[1].state_dict())
        clippers[1].load_state_dict(clippers[0].state_dict())
        with pytest.raises(ValueError, match="not of a EMA"):
            clippers[0].load_state_dict({"max_norm": {**states[0], "policy": "ZScore"}})

    def test_learns_the_norms_that_bounds_leave(self, kind):
        p = parameter(tensor([8.0]))
        clipper = ComponentClipper([p], Bounded(EMA(warmup_steps=0), high=kind(2.0)))
        clipper.clip_()
        assert p.grad.item() == pytest.approx(2.0)
        gamma = clipper.state_dict()["max_norm"]["tensors"]["gamma"]
        assert gamma.item() == pytest.approx(2.0)

    def test_low_above_high(self, kind):
        if kind is number or DEVICE == "cpu":
            with pytest.raises(ValueError, match="low: expected at most high=1, not 2"):
                Bounded(EMA(), kind(2.0), kind(1.0))
            with pytest.raises(ValueError, match="low: expected a number >= 0, not -1"):
                Bounded(EMA(), kind(-1.0))
        if kind is tensor:  # read at every call
            low = tensor(0.5)
            p = parameter(tensor([8.0]))
            clipper = ComponentClipper([p], Bounded(Given(0.1), low, 1.0))
            assert clipper.clip_().caps.item() == 0.5
            low.fill_(0.75)
            assert clipper.clip_().caps.item() == 0.75
            low.fill_(2.0)
            if DEVICE == "cpu":
                with pytest.raises(ValueError, match="low: expected at most high=1, not 2"):
                    clipper.clip_()
            else:
                assert clipper.clip_().caps.isnan()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Bounded("EMA"), TypeError, "threshold: expected a number"),
        (lambda: Bounded(EMA(), low=None), TypeError, "low: expected a number"),
        (lambda: Bounded(EMA(), high=torch.ones(2)), ValueError, r"high: expected a tensor of shape \[\], not \[2\]"),
        (
            lambda: Bounded(EMA(), high=torch.ones((), dtype=torch.int64)),
            TypeError,
            "high: expected a floating-point",
        ),
        (lambda: RMS(-1.0), ValueError, "max_rms: expected a number >= 0"),
        (lambda: RMS(True), TypeError, "max_rms: expected a number, not bool"),
    ],
)
def test_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_bounds_wait_for_no_device_and_are_traced():
    params = parameters([(3,), (4,)])
    bounded = Bounded({"0": EMA(warmup_steps=0), "1": RMS(0.1)}, tensor(0.1), 2.0)
    clipper = ComponentClipper(params, bounded, eps=0.25)
    step = torch.compile(lambda: clipper.clip_().caps, fullgraph=True, backend="aot_eager")
    clipper.clip_()
    torch._dynamo.reset()
    for _ in range(2):
        caps = step()
    assert caps[1].item() == pytest.approx(0.2)
    assert 0.1 <= caps[0].item() <= 2.0
    numbers = Bounded({"0": EMA(warmup_steps=0), "1": RMS(0.1)}, 0.1, 2.0)
    ComponentClipper(params, numbers)
    with NoSync():  # tensors on the host are looked at
        numbers.caps(params[0].device, None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
def test_root_mean_squares_are_capped(backend, p):
    """As optax's ``clip_by_block_rms``: u / max(1, rms(u) / threshold), for p = 2."""
    if p == 3.0 and backend in ("cpu", "cuda", "triton"):
        pytest.skip("this backend has norms 1, 2 and inf")
    params = parameters([(50,), (3, 2), (), (1,)], torch.float64)
    before = [q.grad.clone() for q in params]
    clipper = ComponentClipper(params, RMS(0.3), p, eps=0.0, backend=backend)
    assert not clipper._caps().needs_norms
    clipper.clip_()
    for q, grad in zip(params, before, strict=True):
        rms = grad.abs().amax() if p == math.inf else (grad.abs() ** p).mean() ** (1 / p)
        torch.testing.assert_close(q.grad, grad / (rms / 0.3).clamp(min=1.0))


def test_sizes_are_those_of_what_is_trained():
    params = parameters([(3,), (5,), (8,)])
    params[1].requires_grad_(False).grad = None
    clipper = ComponentClipper(params, RMS(1.0), components=lambda name, p: "both" if name in "01" else name)
    assert clipper.clip_().caps.tolist() == pytest.approx([math.sqrt(3), math.sqrt(8)])
    params[1].requires_grad_(True)
    assert clipper.clip_().caps.tolist() == pytest.approx([math.sqrt(8), math.sqrt(8)])
    with pytest.raises(ValueError, match="RMS needs norm_type > 0"):
        fused_component_clip_(params, RMS(1.0), 0.0)


def test_unfrozen_in_the_backward_pass():
    params = parameters([(4,), (9,)])
    params[1].requires_grad_(False)
    for p in params:
        p.grad = None
    with clip_in_backward(params, {"*": RMS(0.5)}) as handle:
        params[1].requires_grad_(True)
        sum(100 * p.sum() for p in params).backward()
        assert handle.last.caps.tolist() == [1.0, 1.5]
        assert [p.grad.norm().item() for p in params] == pytest.approx([1.0, 1.5])


@pytest.mark.parametrize(
    "make",
    [
        lambda ema: ema,
        Bounded,
        lambda ema: ByPattern({"w": ema, "*": ema}),
        lambda ema: Bounded({"*": Bounded(ema)}),
    ],
)
def test_a_copy_learns_by_itself(make):
    def taught(clipper, value):
        p = clipper.parameters[0]
        p.grad = torch.full_like(p, value)
        return clipper.clip_().caps.item()

    policy = make(EMA(warmup_steps=0))
    one, other = (
        ComponentClipper([("w", torch.nn.Parameter(torch.zeros(2)))], p) for p in (policy, copy.copy(policy))
    )
    taught(one, 1.0)
    before = taught(one, 1.0)
    for _ in range(50):
        taught(other, 0.01)
    assert taught(one, 1.0) == pytest.approx(before, rel=0.1)
    assert taught(other, 0.01) < before / 5


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ({}, [0.5] * 3),
        ({"a": EMA}, [1.0, 0.5, 0.5]),
        ({"a": EMA, "c": number}, [1.0, 0.5, 0.5]),
        ({"*": EMA}, [1.0] * 3),
    ],
)
def test_eps_of_one_component_does_not_depend_on_the_others(others, expected):
    """b has no cap but the bound, which is a number, and numbers add eps."""
    made = {EMA: lambda: EMA(warmup_steps=0), number: lambda: 1.0}
    caps = {
        **{pattern: made[kind]() for pattern, kind in others.items()},
        **({} if "*" in others else {"b": math.inf}),
    }
    params = [(name, parameter(torch.ones(1, device=DEVICE))) for name in "abc"]
    clipper = ComponentClipper(params, Bounded(caps, high=1.0), eps=1.0)
    assert clipper.clip_().coefs.tolist() == pytest.approx(expected)
