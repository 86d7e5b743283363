"""Cap policies against plain transcriptions of their sources, one float at a time; state; no sync; tracing."""

import io
import math
import random

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from cwclip_kernels import ComponentClipper, ComponentSpec, component_norms, fused_component_clip_, thresholds
from cwclip_kernels.thresholds import EMA, Fixed, FromGlobal, ParamRelative, Percentile, Schedule, Setting, ZScore
from helpers import BACKENDS, DEVICE, parameter, random_grad, same_bits
from no_sync import NoSync

EPS = 1e-6
ADAPTIVE = {
    "EMA": lambda: EMA(warmup_steps=7),
    "ZScore": lambda: ZScore(warmup_steps=5),
    "Percentile": lambda: Percentile(30.0, window=16),
}


def norms_of_steps(steps, count):
    """Norms that drift, with spikes, non-finite values and missing gradients: float64 [steps, count]."""
    norms = torch.rand(steps, count, dtype=torch.float64) + 0.5
    chance = torch.rand(steps, count)
    norms[chance < 0.06] *= 30
    norms[(chance > 0.06) & (chance < 0.09)] = math.inf
    norms[(chance > 0.09) & (chance < 0.12)] = math.nan
    norms[(chance > 0.12) & (chance < 0.2)] = 0.0
    return norms


def bound(threshold, count, norm_type=2.0, numels=None):
    names = tuple(f"c{i}" for i in range(count))
    numels = (1,) * count if numels is None else numels
    threshold.bind(Setting(names, numels, norm_type, EPS, torch.device(DEVICE), lambda: torch.ones(count)))
    return threshold


def coefs_of(norms, caps):
    coefs = torch.where(norms <= caps, 1.0, caps / norms)
    return torch.where((caps == math.inf) | (norms == 0), 1.0, coefs)


def run(threshold, norms):
    """Caps of every step: float64 [steps, count]."""
    caps = []
    for row in norms.to(DEVICE):
        cap = threshold.caps(row.device, row if threshold.needs_norms else None).expand(len(row))
        caps.append(cap.clone())
        threshold.update_(row, coefs_of(row, cap))
    return torch.stack(caps).cpu()


def tells(norm):
    return math.isfinite(norm) and norm > 0


def coef_of(norm, cap):
    return 1.0 if norm <= cap else cap / norm


class TestAgainstTheSources:
    def test_adagc(self):
        ratio, decay, start, absolute = 1.05, 0.98, 30, 1.5
        norms = norms_of_steps(150, 4)
        caps = run(bound(EMA(ratio, decay, start, absolute), 4), norms)
        gamma = [math.inf] * 4
        for t, row in enumerate(norms.tolist()):
            together = math.sqrt(sum(n * n for n in row if tells(n)))
            for i, norm in enumerate(row):
                if not tells(norm):
                    continue
                if t < start:
                    h = min(absolute / together, 1.0)
                    gamma[i] = min(gamma[i], h * norm)
                else:
                    h = coef_of(norm, ratio * gamma[i])
                    new = decay * gamma[i] + (1 - decay) * h * norm
                    gamma[i] = new if gamma[i] < math.inf else h * norm
                assert coef_of(norm, caps[t, i].item()) == pytest.approx(h, rel=1e-12)

    def test_zclip(self):
        decay, limit, start = 0.97, 2.5, 25
        norms = norms_of_steps(200, 3)
        caps = run(bound(ZScore(decay, limit, start), 3), norms)
        for i in range(3):
            seen, mean, variance = [], 0.0, 0.0
            for t, norm in enumerate(norms[:, i].tolist()):
                if not tells(norm):
                    continue
                if len(seen) < start:
                    assert caps[t, i] == math.inf
                    seen.append(norm)
                    mean = sum(seen) / len(seen)
                    variance = sum((x - mean) ** 2 for x in seen) / len(seen)
                    continue
                deviation = math.sqrt(variance)
                z = (norm - mean) / (deviation + 1e-6 * mean)
                clipped = norm
                if z > limit:
                    cap = mean + limit * deviation / (z / limit)
                    assert caps[t, i].item() == pytest.approx(cap, rel=1e-9)
                    clipped = norm * coef_of(norm, cap)
                else:
                    assert caps[t, i] == math.inf
                mean = decay * mean + (1 - decay) * clipped
                variance = decay * variance + (1 - decay) * (clipped - mean) ** 2

    @pytest.mark.parametrize("percentile", [0.0, 10.0, 37.5, 100.0])
    def test_autoclip(self, percentile):
        numpy = pytest.importorskip("numpy")
        norms = norms_of_steps(60, 3)
        caps = run(bound(Percentile(percentile, window=20), 3), norms)
        for i in range(3):
            history = []
            for t, norm in enumerate(norms[:, i].tolist()):
                if tells(norm):
                    history.append(norm)
                    assert caps[t, i].item() == pytest.approx(numpy.percentile(history[-20:], percentile), rel=1e-12)

    def test_agc_unit_by_unit(self):
        # The paper's own rule on every row of every matrix, vectors whole.
        params = [parameter(random_grad(shape, scale=0.05)) for shape in [(5, 7), (4, 3, 2, 2), (9,), ()]]
        for p in params:
            p.data.copy_(torch.randn(p.shape) * torch.randint(0, 2, p.shape[:1] + (1,) * (p.ndim - 1)))
        expected = []
        for p in params:
            axes = tuple(range(1, p.ndim)) if p.ndim > 1 else None
            w = p.detach().double().pow(2).sum(axes or [], keepdim=axes is not None).sqrt().clamp(min=1e-3) * 0.01
            g = p.grad.double().pow(2).sum(axes or [], keepdim=axes is not None).sqrt()
            expected.append(torch.where(g > w, p.grad.double() * (w / g.clamp(min=1e-6)), p.grad.double()))
        spec = ComponentSpec().unitwise("*")
        named = [(f"w{i}", p) for i, p in enumerate(params)]
        fused_component_clip_(named, ParamRelative(), components=spec, eps=0.0)
        for p, e in zip(params, expected, strict=True):
            torch.testing.assert_close(p.grad.double(), e, rtol=2e-6, atol=1e-12)

    def test_agc_by_tensor_follows_the_parameters(self):
        p = parameter(torch.tensor([3.0, 4.0], device=DEVICE))
        clipper = ComponentClipper([p], ParamRelative(0.5, eps=1e-3))
        for size in (0.0, 2.0, 20.0):
            p.data.fill_(size)
            p.grad = torch.tensor([3.0, 4.0], device=DEVICE)
            cap = 0.5 * max(math.sqrt(2) * size, 1e-3)
            assert clipper.clip_().caps.item() == pytest.approx(cap)
            assert p.grad.norm().item() == pytest.approx(min(5.0, cap), rel=1e-5)

    @pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
    @pytest.mark.parametrize("split", ["uniform", "numel"])
    def test_a_budget_is_never_exceeded(self, split, p):
        params = [parameter(random_grad(shape, scale=10.0)) for shape in [(100,), (3, 3), (1,)]]
        caps = ComponentClipper(params, FromGlobal(2.0, split), p).clip_().caps
        together = component_norms(params, p, components="all")
        assert together <= 2.0 * (1 + 1e-6)
        power = caps.max() if p == math.inf else (caps**p).sum() ** (1 / p)
        assert power.item() == pytest.approx(2.0)
        if split == "numel" and p == 2.0:
            assert caps.tolist() == pytest.approx([2 * math.sqrt(n / 110) for n in (100, 9, 1)])

    def test_a_budget_needs_powers_that_add_up(self):
        with pytest.raises(ValueError, match="norm_type > 0"):
            ComponentClipper([parameter(random_grad((3,)))], FromGlobal(1.0), 0.0)

    def test_schedule(self):
        p = parameter(torch.tensor([8.0], device=DEVICE))
        asked = []

        def fn(step):
            asked.append(step)
            return 4.0 / (1 + step)

        clipper = ComponentClipper([p], Schedule(fn))
        caps = []
        for _ in range(3):
            p.grad = torch.tensor([8.0], device=DEVICE)
            caps.append(clipper.clip_().caps.item())
        assert caps == [4.0, 2.0, 4.0 / 3]
        assert asked == [0, 1, 2]
        clipper.max_norm.at(7)
        assert clipper.clip_().caps.item() == 0.5

    def test_fixed_is_what_it_wraps(self):
        for cap in (0.3, {"1": 0.2}, torch.tensor([0.1, 0.7], device=DEVICE)):
            params = [parameter(random_grad((5,))) for _ in range(2)]
            twins = [parameter(p.grad.clone()) for p in params]
            fused_component_clip_(params, Fixed(cap))
            fused_component_clip_(twins, cap)
            assert all(same_bits(a.grad, b.grad) for a, b in zip(params, twins, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ADAPTIVE)
def test_through_every_backend(kind, backend):
    """A clipper with a policy leaves what a clipper with the caps that the policy reports leaves."""
    threshold = ADAPTIVE[kind]()
    shapes = [(33,), (4, 5), (2,)]
    params = [parameter(random_grad(shape)) for shape in shapes]
    clipper = ComponentClipper(params, threshold, backend=backend)
    for step in range(12):
        for p in params:
            p.grad = random_grad(p.shape, scale=50.0 if step == 10 else 1.0)
        if step == 8:
            params[1].grad[0, 0] = math.inf
        if step == 9:
            params[2].grad = None
        twins = [parameter(p.grad if p.grad is None else p.grad.clone(), p.shape) for p in params]
        result = clipper.clip_()
        again = ComponentClipper(twins, result.caps, backend=backend, eps=0.0).clip_()
        torch.testing.assert_close(result.coefs, again.coefs, equal_nan=True)
        for p, t in zip(params, twins, strict=True):
            if p.grad is not None:
                torch.testing.assert_close(p.grad, t.grad, equal_nan=True)
        assert not result.caps.isnan().any()
    assert (result.caps < math.inf).all() or kind == "ZScore"


@pytest.mark.parametrize("kind", [*ADAPTIVE, "Schedule"])
class TestState:
    def make(self, kind):
        return Schedule(lambda step: 1.0 + step) if kind == "Schedule" else ADAPTIVE[kind]()

    def test_going_on_from_a_checkpoint_is_the_same_to_the_bit(self, kind):
        norms = norms_of_steps(60, 5)
        for stop in (0, 3, random.randrange(8, 50)):
            straight = run(bound(self.make(kind), 5), norms)
            first = bound(self.make(kind), 5)
            if stop:
                run(first, norms[:stop])
            file = io.BytesIO()
            torch.save(first.state_dict(), file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
            before, after = self.make(kind), bound(self.make(kind), 5)
            run(after, norms[20:30])  # what it learnt here is forgotten
            before.load_state_dict(state)  # before the components are known
            after.load_state_dict(state)
            for second in (bound(before, 5), after):
                assert same_bits(run(second, norms[stop:]), straight[stop:])

    def test_state_dict_is_a_copy(self, kind):
        threshold = bound(self.make(kind), 3)
        state = threshold.state_dict()
        kept = {name: tensor.clone() for name, tensor in state["tensors"].items()}
        run(threshold, norms_of_steps(10, 3))
        assert all(same_bits(state["tensors"][name], kept[name]) for name in kept)

    def test_other_components_are_refused_by_name(self, kind):
        state = bound(self.make(kind), 3).state_dict()
        with pytest.raises(ValueError, match=r"other components \(no 'c3', 'c4'\)"):
            bound(self.make(kind), 5).load_state_dict(state)
        early = self.make(kind)
        early.load_state_dict(state)
        with pytest.raises(ValueError, match=r"but 'c2'\)"):
            bound(early, 2)
        with pytest.raises(ValueError, match="in use for other components"):
            bound(bound(self.make(kind), 3), 4)
        with pytest.raises(ValueError, match="of a Other"):
            self.make(kind).load_state_dict({**state, "policy": "Other"})
        with pytest.raises(TypeError, match="state: expected"):
            self.make(kind).load_state_dict({})


def test_a_state_of_another_window_is_refused():
    saved = bound(Percentile(50.0, window=8), 3)
    run(saved, norms_of_steps(10, 3))
    state = saved.state_dict()
    late, early = bound(Percentile(50.0, window=4), 3), Percentile(50.0, window=4)
    kept = late.state_dict()["tensors"]
    message = r"state: 'history' has shape \[8, 3\], not \[4, 3\]: of a Percentile with other arguments"
    with pytest.raises(ValueError, match=message):
        late.load_state_dict(state)
    assert all(same_bits(tensor, kept[name]) for name, tensor in late.state_dict()["tensors"].items())
    early.load_state_dict(state)
    with pytest.raises(ValueError, match=message):
        bound(early, 3)


@pytest.mark.parametrize("kind", ADAPTIVE)
def test_never_waits_for_the_device(kind):
    norms = norms_of_steps(12, 4).to(DEVICE)
    threshold = bound(ADAPTIVE[kind](), 4)
    places = {name: tensor.data_ptr() for name, tensor in threshold._state.items()}
    with NoSync():
        run_on_device = [threshold.caps(row.device, row if threshold.needs_norms else None) for row in norms]
        for row, caps in zip(norms, run_on_device, strict=True):
            threshold.update_(row, coefs_of(row, caps))
    # In place, so that a captured graph goes on reading and writing it.
    assert {name: tensor.data_ptr() for name, tensor in threshold._state.items()} == places


@pytest.mark.parametrize("kind", ADAPTIVE)
def test_traced_without_recompilation(kind):
    params = [parameter(random_grad(shape)) for shape in [(6,), (3, 2)]]
    twins = [parameter(p.grad.clone()) for p in params]
    traced, eager = ComponentClipper(params, ADAPTIVE[kind]()), ComponentClipper(twins, ADAPTIVE[kind]())
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(lambda: traced.clip_().norms, backend=counter, fullgraph=True)
    for _ in range(12):
        for p, t in zip(params, twins, strict=True):
            p.grad.copy_(random_grad(p.shape))
            t.grad.copy_(p.grad)
        step()
        eager.clip_()
        for p, t in zip(params, twins, strict=True):
            torch.testing.assert_close(p.grad, t.grad)
    assert counter.frame_count == 1


class TestArguments:
    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (lambda: EMA(ratio=True), TypeError, "ratio: expected a number, not bool"),
            (lambda: EMA(ratio=0), ValueError, "ratio: expected a finite number > 0, not 0"),
            (lambda: EMA(decay=1.5), ValueError, "decay: expected a finite number >= 0 and <= 1"),
            (lambda: EMA(warmup_steps=1.5), TypeError, "warmup_steps: expected a whole number, not float"),
            (lambda: EMA(warmup_steps=-1), ValueError, "warmup_steps: expected a whole number >= 0"),
            (lambda: EMA(warmup_norm=math.nan), ValueError, "warmup_norm: expected a number > 0, not nan"),
            (lambda: ZScore(threshold="2"), TypeError, "threshold: expected a number, not str"),
            (lambda: ZScore(warmup_steps=0), ValueError, "warmup_steps: expected a whole number >= 1"),
            (lambda: Percentile(101), ValueError, "percentile: expected a finite number >= 0 and <= 100"),
            (lambda: Percentile(window=0), ValueError, "window: expected a whole number >= 1"),
            (lambda: ParamRelative(-1.0), ValueError, "factor: expected"),
            (lambda: ParamRelative(eps=None), TypeError, "eps: expected"),
            (lambda: FromGlobal(1.0, "half"), ValueError, "split: expected 'uniform' or 'numel'"),
            (lambda: FromGlobal(-1.0), ValueError, "total: expected"),
            (lambda: Schedule(3), TypeError, "fn: expected a function"),
            (lambda: Fixed("1"), TypeError, "cap: expected"),
        ],
    )
    def test_are_named(self, make, error, message):
        with pytest.raises(error, match=message):
            make()

    def test_what_a_schedule_returns_is_checked(self):
        p = parameter(random_grad((3,)))
        before = p.grad.clone()
        for value, error in ((-1.0, ValueError), ("1", TypeError), (math.nan, ValueError)):
            with pytest.raises(error, match=r"max_norm: fn\(0\)"):
                fused_component_clip_([p], Schedule(lambda step, value=value: value))
        assert same_bits(p.grad, before)

    def test_unbound(self):
        with pytest.raises(RuntimeError, match="before a clipper has bound it"):
            EMA().caps(torch.device(DEVICE), None)


def test_a_policy_of_your_own():
    class Halving(thresholds.Threshold):
        def caps(self, device, norms):
            return torch.full((), 8.0, dtype=torch.float64, device=device) * self.state("share", device, fill=1.0)

        def update_(self, norms, coefs):
            self.state("share", norms.device).mul_(0.5)

    p = parameter(torch.tensor([100.0], device=DEVICE))
    clipper = ComponentClipper([p], Halving())
    found = []
    for _ in range(3):
        p.grad = torch.tensor([100.0], device=DEVICE)
        found.append(clipper.clip_().caps.item())
    assert found == [8.0, 4.0, 2.0]


def test_the_function_keeps_a_policys_state_too():
    params = [parameter(random_grad((4,)))]
    threshold = ZScore(warmup_steps=2)
    for _ in range(3):
        params[0].grad = random_grad((4,))
        fused_component_clip_(params, threshold)
    assert threshold.state_dict()["tensors"]["seen"].tolist() == [3.0]


def test_one_policy_for_two_models_of_the_same_names_reads_the_right_parameters():
    threshold = ParamRelative(0.1)
    params = [parameter(random_grad((4,))) for _ in range(2)]
    clippers = [ComponentClipper([("w", p)], threshold) for p in params]
    for p, size in zip(params, (1.0, 5.0), strict=True):
        p.data.fill_(size)
    assert [c.clip_().caps.item() for c in clippers] == pytest.approx([0.2, 1.0])
    for p, cap in zip(params, (0.2, 1.0), strict=True):
        fused_component_clip_([("w", p)], threshold)
        assert p.grad.norm().item() <= cap * 1.0001
