"""A mapping of patterns to thresholds in every way into a loop, and in checkpoints and copies."""

import copy
import gc
import io
import math
import pickle
import weakref

import pytest
import torch

from cwclip_kernels import (
    ComponentClipGradScaler,
    ComponentClipper,
    ComponentSpec,
    clip_gradients,
    clip_gradients_,
    clip_in_backward,
    component_clip_with_norms_,
    component_norms,
    fused_component_clip_,
)
from cwclip_kernels.optim import ComponentClipAdamW
from cwclip_kernels.thresholds import (
    EMA,
    Bounded,
    ByPattern,
    FromGlobal,
    ParamRelative,
    Percentile,
    ZScore,
)
from helpers import DEVICE, random_grad, same_bits
from named_pairs import give_gradients, model_of, twin_of


class TestTheFunction:
    def test_learns_on_under_a_new_mapping_at_every_call(self):
        ours, ema, z = model_of(), EMA(warmup_steps=2), ZScore(warmup_steps=3)
        theirs = twin_of(ours)
        clipper = ComponentClipper(theirs, {"*.weight": EMA(warmup_steps=2), "*": ZScore(warmup_steps=3)})
        made = set()
        for step in range(6):
            give_gradients(ours, theirs, scale=1.0 if step < 5 else 30.0)
            fused_component_clip_(ours, {"*.weight": ema, "*": z})
            clipper.clip_()
            made.add(id(ema.within))
            assert all(same_bits(a.grad, b.grad) for (_, a), (_, b) in zip(ours, theirs, strict=True))
        assert len(made) == 1
        # Another number, and then other components.
        fused_component_clip_(ours, {"*.weight": ema, "*.bias": 0.5})
        assert ema.state_dict()["host"] == {"steps": 7}
        with pytest.raises(ValueError, match=r"this EMA is in use for other components \(but 'b.weight'\)"):
            fused_component_clip_(ours, {"a.weight": ema, "*": z})

    def test_a_refusal_binds_none(self):
        pairs, fresh, used = model_of(), EMA(), EMA()
        fused_component_clip_(pairs, {"a.*": used})
        with pytest.raises(ValueError, match="in use for other components"):
            fused_component_clip_(pairs, {"a.*": fresh, "*": used})
        fused_component_clip_(pairs, {"b.*": fresh, "a.*": used})

    def test_nothing_keeps_a_threshold_alive(self, own_garbage):
        pairs, ema = model_of(), EMA()
        fused_component_clip_(pairs, {"*": ema})
        watch = weakref.ref(ema)
        del ema
        gc.collect()
        assert watch() is None

    def test_two_models_in_turn(self):
        ema = ParamRelative(0.1)
        models = [model_of(), model_of()]
        for pairs in models * 2:
            norms = torch.stack([p.detach().norm() for _, p in pairs])
            fused_component_clip_(pairs, {"*.weight": ema, "*": 0.1})
            for i in (0, 2):
                assert pairs[i][1].grad.norm().item() <= norms[i].item() * 0.1 * 1.0001


class TestState:
    def make(self):
        return {"*.weight": EMA(warmup_steps=2), "*.bias": 0.1, "head": Bounded(ZScore(warmup_steps=2), high=3.0)}

    def test_going_on_is_the_same_to_the_bit(self):
        ours = model_of()
        clipper = ComponentClipper(ours, self.make())
        for _ in range(4):
            give_gradients(ours)
            clipper.clip_()
        file = io.BytesIO()
        torch.save(clipper.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        twins = [twin_of(ours) for _ in range(3)]
        late = ComponentClipper(twins[0], self.make())
        late.clip_()
        late.load_state_dict(state)
        early = ByPattern(self.make())
        early.load_state_dict(state["max_norm"])
        copied = pickle.loads(pickle.dumps(copy.deepcopy(clipper.max_norm)))
        clippers = [clipper, late, ComponentClipper(twins[1], early), ComponentClipper(twins[2], copied)]
        for _ in range(3):
            give_gradients(ours, *twins, scale=5.0)
            results = [one.clip_() for one in clippers]
            for result in results[1:]:
                assert same_bits(result.caps, results[0].caps)
                assert same_bits(result.coefs, results[0].coefs)

    def test_mismatches_are_named_and_change_nothing(self):
        pairs = model_of()
        clipper = ComponentClipper(pairs, self.make())
        clipper.clip_()
        kept = repr(clipper.state_dict())

        def state_under(caps):
            other = ComponentClipper(twin_of(pairs), caps)
            other.clip_()
            return other.state_dict()

        wrong = [
            ({**self.make(), "head": Percentile()}, r"max_norm\['head'\]: state: of a Percentile, not of a ZScore"),
            ({"a.*": EMA(), "*.bias": ZScore()}, r"under 'a.\*', '\*.bias' \(no '\*.weight', 'head' but 'a.\*', "),
            (EMA(), "state: of a EMA, not of a mapping with thresholds"),
        ]
        for caps, message in wrong:
            with pytest.raises(ValueError, match=message):
                clipper.load_state_dict(state_under(caps))
        with pytest.raises(ValueError, match=r"state: of other components \(no 'b.bias'\)"):
            clipper.load_state_dict(self.without())
        with pytest.raises(ValueError, match="is empty, of a clipper whose caps don't learn"):
            clipper.load_state_dict({})
        with pytest.raises(TypeError, match="state_dict\\(\\) of a threshold returned"):
            EMA().load_state_dict(clipper.state_dict()["max_norm"])
        assert repr(clipper.state_dict()) == kept

    def without(self):
        pairs = [pair for pair in model_of() if pair[0] != "b.bias"]
        return ComponentClipper(pairs, self.make()).state_dict()

    def test_a_state_for_others_is_refused_when_it_is_bound(self):
        early = ByPattern(self.make())
        early.load_state_dict(self.without()["max_norm"])
        with pytest.raises(ValueError, match="has loaded the state of other components"):
            ComponentClipper(model_of(), early)
        # Nothing has been bound.
        assert all(isinstance(cap, float) or cap._setting is None for cap in early.by_pattern.values())

    def test_an_optimizers_checkpoint_holds_it(self):
        pairs = model_of()
        optimizer = ComponentClipAdamW(pairs, lr=0.0, max_norm=self.make())
        for _ in range(3):
            give_gradients(pairs)
            optimizer.step()
        twins = twin_of(pairs)
        other = ComponentClipAdamW(twins, lr=0.0, max_norm=self.make())
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        give_gradients(pairs, twins)
        optimizer.step()
        other.step()
        assert same_bits(optimizer.last.caps, other.last.caps)
        with pytest.warns(UserWarning, match="has no 'clipping'"):
            other.load_state_dict(torch.optim.AdamW([p for _, p in twins], lr=0.0).state_dict())


def test_groups_of_an_optimizer_have_mappings_of_their_own():
    ours = model_of()
    theirs, ema = twin_of(ours), EMA(warmup_steps=1)
    groups = [
        {"params": ours[:2], "max_norm": {"*.weight": ema, "*": 0.1}},
        {"params": ours[2:4]},
        {"params": ours[4:]},
    ]
    optimizer = ComponentClipAdamW(
        groups, lr=0.1, eps=1.0, max_norm={"b.*": ZScore(warmup_steps=1), "head": 0.2}, clip_eps=0.25
    )
    clippers = [
        ComponentClipper(theirs[:2], {"*.weight": EMA(warmup_steps=1), "*": 0.1}, eps=0.25),
        ComponentClipper(theirs[2:], {"b.*": ZScore(warmup_steps=1), "head": 0.2}, eps=0.25),
    ]
    adamw = torch.optim.AdamW([p for _, p in theirs], lr=0.1, eps=1.0)
    for step in range(4):
        give_gradients(ours, theirs, scale=10.0 if step == 3 else 1.0)
        if step == 2:  # the same, said again
            optimizer.param_groups[0]["max_norm"] = {"*.weight": ema, "*": 0.1}
        optimizer.step()
        expected = [one.clip_() for one in clippers]
        adamw.step()
        torch.testing.assert_close(optimizer.last.caps, torch.cat([one.caps for one in expected]), rtol=1e-6, atol=0)
        torch.testing.assert_close(optimizer.last.coefs, torch.cat([one.coefs for one in expected]))
        for (_, a), (_, b) in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["clipper", "function"])
def test_compiled(kind):
    ours = model_of()
    theirs = twin_of(ours)
    caps = [{"*.weight": EMA(warmup_steps=2), "*.bias": 0.3} for _ in range(2)]
    options = {"components": ComponentSpec()}
    if kind == "clipper":
        clippers = [ComponentClipper(pairs, one, eps=0.25) for pairs, one in zip((ours, theirs), caps, strict=True)]
        eager = clippers[1].clip_
        step = torch.compile(lambda: clippers[0].clip_().caps, fullgraph=True, backend="aot_eager")
    else:
        give_gradients(ours, theirs)
        for pairs, one in zip((ours, theirs), caps, strict=True):
            fused_component_clip_(pairs, one, eps=0.25, **options)  # binds
        eager = lambda: fused_component_clip_(theirs, dict(caps[1]), eps=0.25, **options)  # noqa: E731
        compiled = lambda: fused_component_clip_(ours, dict(caps[0]), eps=0.25, **options)  # noqa: E731
        step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    for _ in range(4):
        grads = [random_grad(p.shape) for _, p in ours]
        for pairs in (ours, theirs):
            for (_, p), grad in zip(pairs, grads, strict=True):
                p.grad.copy_(grad)
        step()
        eager()
        for (_, a), (_, b) in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.grad, b.grad)
            torch.testing.assert_close(a, b)


class TestInTheBackwardPass:
    def run(self, make, steps=3):
        ours = model_of()
        theirs = twin_of(ours)
        handle = clip_in_backward(ours, make(), eps=0.25)
        clipper = ComponentClipper(theirs, make(), eps=0.25)
        for _ in range(steps):
            grads = [random_grad(p.shape) for _, p in ours]
            for pairs in (ours, theirs):
                for _, p in pairs:
                    p.grad = None
                sum((p * g).sum() for (_, p), g in zip(pairs, grads, strict=True)).backward()
            result = clipper.clip_()
            torch.testing.assert_close(handle.last.caps, result.caps)
            torch.testing.assert_close(handle.last.coefs, result.coefs)
            for (_, a), (_, b) in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a.grad, b.grad)
        handle.remove()

    def test_is_the_same_as_after_it(self):
        self.run(lambda: {"*.weight": ParamRelative(0.1), "a.bias": EMA(warmup_steps=0), "*": 0.3})
        self.run(lambda: {"*.weight": EMA(warmup_steps=0), "b.*": Bounded(ParamRelative(0.1), high=0.05)})

    def test_what_needs_all_norms_is_refused(self):
        with pytest.raises(ValueError, match=r"max_norm: \{'head': 0.1, '\*': EMA\} depends on all norms of a step"):
            clip_in_backward(model_of(), {"head": 0.1, "*": EMA()})
        with pytest.raises(ValueError, match="depends on all norms"):
            clip_in_backward(model_of(), {"*": Bounded({"*.weight": ZScore()})})

    def test_counted_parameters_stay_as_they_are(self):
        pairs = model_of()
        optimizer = torch.optim.SGD([p for _, p in pairs], lr=0.0)
        with clip_in_backward(pairs, {"*.weight": FromGlobal(1.0), "*": 0.1}, optimizer=optimizer):
            pairs[0][1].requires_grad_(False)
            with pytest.raises(RuntimeError, match=r"\{'\*.weight': FromGlobal, '\*': 0.1\} counted the trained"):
                sum(p.sum() for _, p in pairs).backward()


def test_optimizers_that_each_own_a_part():
    """Each step teaches the thresholds its own components' norms; those of the others are 0 there."""
    ours = model_of()
    clipper = ComponentClipper(ours, {"*.weight": EMA(warmup_steps=0), "*": 0.3})
    optimizers = [torch.optim.SGD([p for _, p in ours[i:j]], lr=0.0) for i, j in ((0, 2), (2, 5))]
    handles = [clipper.attach(optimizer) for optimizer in optimizers]
    for _ in range(2):
        give_gradients(ours)
        norms = torch.stack([p.grad.norm() for _, p in ours])
        for optimizer in optimizers:
            optimizer.step()
    gamma = clipper.state_dict()["max_norm"]["thresholds"]["*.weight"]["tensors"]["gamma"]
    assert bool(gamma.isfinite().all())
    torch.testing.assert_close(handles[0].last.norms[:2], norms[:2])
    assert handles[1].last.caps[[1, 3, 4]].tolist() == [0.3] * 3


def test_a_skipped_step_teaches_nothing():
    pairs = model_of()
    clipper = ComponentClipper(pairs, {"*.weight": EMA(warmup_steps=0), "*": 0.3})
    scaler = ComponentClipGradScaler(clipper, device=DEVICE, init_scale=4.0)
    optimizer = torch.optim.SGD([p for _, p in pairs], lr=0.0)
    for bad in (False, True):
        optimizer.zero_grad()
        scaler.scale(sum((p * random_grad(p.shape)).sum() for _, p in pairs)).backward()
        if bad:
            pairs[1][1].grad[0] = math.inf
            kept = repr(clipper.state_dict())
        scaler.step(optimizer)
        scaler.update()
    assert repr(clipper.state_dict()) == kept
    assert clipper.state_dict()["max_norm"]["thresholds"]["*.weight"]["host"] == {"steps": 1}


def test_gradients_without_parameters_and_norms_that_are_known():
    """With a graph and without, or in two calls: what the one call does, eps by component."""
    pairs = model_of()
    caps = [{"*.weight": ZScore(warmup_steps=1), "*": 0.3} for _ in range(5)]
    for step in range(3):
        give_gradients(pairs, scale=1.0 if step < 2 else 10.0)
        models = [twin_of(pairs) for _ in caps]
        grads = {name: p.grad.clone() for name, p in pairs}
        fused_component_clip_(models[0], dict(caps[0]), eps=0.25)
        expected = {name: p.grad for name, p in models[0]}
        clip_gradients_({name: p.grad for name, p in models[1]}, dict(caps[1]), eps=0.25)
        copies, _ = clip_gradients(grads, dict(caps[2]), eps=0.25)
        with_graph = {name: g.clone().requires_grad_() * 1.0 for name, g in grads.items()}
        graph_copies, _ = clip_gradients(with_graph, dict(caps[3]), eps=0.25)
        component_clip_with_norms_(models[4], dict(caps[4]), component_norms(models[4]), eps=0.25)
        for name, p in models[1] + models[4]:
            torch.testing.assert_close(p.grad, expected[name])
        for found in (copies, graph_copies):
            for name, grad in found.items():
                torch.testing.assert_close(grad, expected[name])
    with pytest.raises(ValueError, match=r"max_norm: \{'head': ParamRelative, '\*': 0.1\} reads parameters"):
        clip_gradients_(grads, {"head": ParamRelative(), "*": 0.1})
