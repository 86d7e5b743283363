"""What stays between backward passes: hooks on parameters that are frozen, moved, swapped or copied; the handle."""

import copy
import pickle

import pytest
import torch
from torch import nn

from cwclip_kernels import ComponentClipper, ComponentSpec, clip_in_backward, fused_component_clip_, thresholds
from cwclip_kernels.in_backward import clipped_in_backward
from helpers import DEVICE, same_bits
from tied_model import CAP, batch, loss_of, tied


def is_clipped(*tensors):
    return all(p.grad is not None and p.grad.norm() <= CAP * 1.001 for p in tensors)


def run(model, scale=1e3):
    (loss_of(model, batch()) * scale).backward()


class TestSetUpTwice:
    def test_is_refused_until_the_first_is_removed(self):
        model = tied()
        first = clip_in_backward(model, CAP)
        for parameters in (model, [model.body[0].weight], model.named_parameters()):
            with pytest.raises(
                ValueError, match=r"parameters: '.*' is clipped or stepped .* already; call remove\(\)"
            ):
                clip_in_backward(parameters, 1.0)
        assert all(clipped_in_backward(p) for p in model.parameters())
        first.remove()
        assert not any(clipped_in_backward(p) for p in model.parameters())
        with clip_in_backward(model, CAP):
            run(model)
        assert is_clipped(model.embedding.weight)

    def test_others_hooks_are_not_ours(self):
        p = nn.Parameter(torch.ones(2))
        assert not clipped_in_backward(p)
        p.register_post_accumulate_grad_hook(lambda _: None)
        assert not clipped_in_backward(p)

    def test_two_handles_for_two_parts(self):
        model = tied()
        clip_in_backward(model.embedding, CAP, optimizer=torch.optim.SGD(model.embedding.parameters(), lr=0.1))
        clip_in_backward(model.body, CAP, optimizer=torch.optim.AdamW(model.body.parameters(), lr=0.1))
        run(model)
        assert all(p.grad is None for p in model.parameters())

    def test_what_is_left_alone_is_not_clipped(self):
        model = tied()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with clip_in_backward(model, CAP, components=lambda n, p: None if "body" in n else n, optimizer=optimizer):
            assert clipped_in_backward(model.embedding.weight)
            assert not clipped_in_backward(model.body[0].weight)

    def test_nothing_is_left_when_it_fails(self):
        model = tied()
        computed = torch.ones(2, requires_grad=True) * 2
        with pytest.raises(ValueError, match="'x' is not a leaf"):
            clip_in_backward([*model.named_parameters(), ("x", computed)], CAP)
        assert not any(clipped_in_backward(p) for p in model.parameters())


class TestSwappedAndMoved:
    @pytest.mark.parametrize("zeroed", [False, True])
    def test_parameters_and_gradients_can_be_swapped(self, zeroed):
        """What moves some models; it refuses tensors that have weak references (pytorch #187008)."""
        model = tied()
        handle = clip_in_backward(model, CAP)
        run(model)
        if zeroed:
            model.zero_grad(set_to_none=False)
        for p in (model.embedding.weight, model.body[0].bias):
            grad, p.grad = p.grad, None
            torch.utils.swap_tensors(grad, torch.zeros(p.shape, device=DEVICE))
            torch.utils.swap_tensors(p, nn.Parameter(torch.zeros_like(p)))
        assert handle.last is not None

    def test_a_model_is_converted_by_swapping(self):
        model = tied()
        clip_in_backward(model, CAP)
        run(model)
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            model.double()
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        assert model.embedding.weight.grad.dtype == torch.float64

    def test_set_up_again_after_a_swap(self):
        model = nn.Linear(3, 2).to(DEVICE)
        handle = clip_in_backward(model, CAP)
        for p in model.parameters():
            torch.utils.swap_tensors(p, nn.Parameter(torch.ones_like(p)))
        handle.remove()
        clip_in_backward(model, CAP)
        model(torch.ones(1, 3, device=DEVICE)).sum().backward()
        assert is_clipped(*model.parameters())

    @pytest.mark.parametrize(
        "change", [nn.Module.double, nn.Module.bfloat16, nn.Module.cpu], ids=lambda f: f.__name__
    )
    @pytest.mark.parametrize("stepped", [False, True])
    def test_converted_between_passes(self, change, stepped):
        model = nn.Linear(3, 2).to(DEVICE)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        handle = clip_in_backward(model, CAP, optimizer=optimizer if stepped else None)
        for step in range(3):
            x = torch.ones(1, 3, device=model.weight.device, dtype=model.weight.dtype)
            (model(x) * 100).sum().backward()
            wide = torch.float64 if model.weight.dtype == torch.float64 else torch.float32
            assert handle.last.norms.dtype == wide
            assert handle.last.norms.tolist() == pytest.approx([100 * 6**0.5, 100 * 2**0.5], rel=1e-2)
            if not stepped:
                assert all(p.grad.dtype == p.dtype and p.grad.norm() <= CAP * 1.01 for p in model.parameters())
                model.zero_grad()
            if step == 0:
                change(model)


class TestFrozen:
    @pytest.mark.parametrize("stepped", [False, True])
    def test_frozen_and_trained_again(self, stepped):
        model = tied()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        weight = model.body[2].weight
        weight.requires_grad_(False)
        handle = clip_in_backward(model, CAP, optimizer=optimizer if stepped else None)
        index = handle.names.index("body.2.weight")
        assert not weight.requires_grad
        for trained in (False, True, False, True):
            weight.requires_grad_(trained)
            before = weight.detach().clone()
            run(model)
            assert (handle.last.norms[index] > 0) == trained
            if stepped:
                moved = (weight - before).norm().item()
                assert moved == pytest.approx(0.1 * CAP if trained else 0.0, rel=1e-2)
            assert weight.grad is None if stepped or not trained else is_clipped(weight)
            model.zero_grad()

    def test_a_component_of_several_that_is_trained_later(self):
        model = tied()
        model.body[0].bias.requires_grad_(False)
        handle = clip_in_backward(model, CAP, components="module")
        run(model)
        assert (handle.last.norms[handle.names.index("body.0")] > 0).item()
        model.zero_grad()
        model.body[0].bias.requires_grad_(True)
        with pytest.raises(RuntimeError, match="components: 'body.0' consists of several parameters, one of which"):
            run(model)

    def test_slices_that_are_not_neighbours(self):
        """Names of a frozen parameter's slices, which a trained one shares and adds to."""

        def made():
            shapes = {"a.0.w": (2, 2), "b": (3,), "a.1.w": (3, 2)}
            pairs = [(n, nn.Parameter(torch.ones(s, device=DEVICE), n != "a.0.w")) for n, s in shapes.items()]
            return pairs, (pairs[1][1] * 5).sum() + (pairs[2][1] * 7).sum()

        (ours, loss), (theirs, their_loss) = made(), made()
        spec = ComponentSpec("type").unitwise("a.*")
        handle = clip_in_backward(ours, CAP, components=spec)
        loss.backward()
        their_loss.backward()
        wanted = ComponentClipper(theirs, CAP, components=spec).clip_()
        assert handle.last.names == wanted.names == ("a.*.w[0]", "a.*.w[1]", "b", "a.*.w[2]")
        assert same_bits(handle.last.norms, wanted.norms)
        assert same_bits(handle.last.coefs, wanted.coefs)
        assert same_bits(ours[2][1].grad, theirs[2][1].grad)

    def test_whole_numbers_are_never_trained(self):
        class Quantized(nn.Module):
            def __init__(self):
                super().__init__()
                self.base = nn.Parameter(torch.ones(4, dtype=torch.uint8), requires_grad=False)
                self.adapter = nn.Parameter(torch.ones(4))

        model = Quantized().to(DEVICE)
        handle = clip_in_backward(model, CAP)
        (model.adapter * model.base).sum().backward()
        assert is_clipped(model.adapter)
        assert handle.last.norms.tolist() == [0.0, 2.0]


class TestGradientsTakenAway:
    def test_before_it_could_be_clipped(self):
        """By torch's own recipe for stepping in the backward pass, set up earlier: it would step unclipped."""
        model = tied()

        def take(p):
            p.grad = None

        model.embedding.weight.register_post_accumulate_grad_hook(take)
        clip_in_backward(model, CAP)
        with pytest.raises(RuntimeError, match="the gradient of 'embedding.weight' was taken away before"):
            run(model)

    def test_afterwards_is_right(self):
        model = tied()
        clip_in_backward(model, CAP)
        seen = []

        def take(p):
            seen.append(p.grad.norm().item())
            p.grad = None

        for p in model.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(take)
        for _ in range(2):
            run(model)
        assert len(seen) == 2 * 4
        assert max(seen) <= CAP * 1.001


class TestAccumulation:
    @pytest.mark.filterwarnings("ignore:Sparse invariant checks")
    def test_of_sparse_gradients(self):
        embedding = nn.Embedding(5, 3, sparse=True).to(DEVICE)
        tokens = torch.tensor([1, 2, 2], device=DEVICE)
        clip_in_backward(embedding, CAP)
        for _ in range(3):
            embedding.zero_grad()
            embedding(tokens).square().sum().backward()
        for _ in range(2):
            embedding.zero_grad(set_to_none=False)
            embedding(tokens).square().sum().backward()
        with pytest.raises(RuntimeError, match="was added to one that is clipped already"):
            embedding(tokens).square().sum().backward()

    def test_a_gradient_that_lay_there_before(self):
        model = tied()
        twin = copy.deepcopy(model)
        tokens = batch()
        for m in (model, twin):
            loss_of(m, tokens).backward()
        clip_in_backward(model, CAP)
        loss_of(model, tokens).backward()
        loss_of(twin, tokens).backward()
        fused_component_clip_(twin, CAP)
        assert same_bits(model.embedding.weight.grad, twin.embedding.weight.grad)

    def test_storage_that_comes_back_is_no_accumulation(self):
        """A gradient that is written into the same memory each time, as a captured graph's is."""
        buffer = torch.empty(3, device=DEVICE)

        class Static(torch.autograd.Function):
            @staticmethod
            def forward(ctx, p):
                return p.sum()

            @staticmethod
            def backward(ctx, grad):
                buffer.data.fill_(5.0)  # as a replayed graph writes: no version counter is raised
                return buffer.detach()

        p = nn.Parameter(torch.ones(3, device=DEVICE))
        clip_in_backward([p], CAP)
        for _ in range(4):
            p.grad = None
            Static.apply(p).backward()
            assert is_clipped(p)


class TestHandle:
    def test_cannot_be_copied_or_pickled(self):
        model = tied()
        handle = clip_in_backward(model, thresholds.Schedule(len))
        for way in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(
                TypeError, match=r"can't be copied or pickled.*clip_in_backward on the copy.*state_dict"
            ):
                way(handle)

    def test_a_copied_model_is_not_clipped_and_may_be(self):
        model = tied()
        clip_in_backward(model, CAP)
        twin = copy.deepcopy(model)
        again = pickle.loads(pickle.dumps(model))
        for m in (twin, again):
            assert not any(clipped_in_backward(p) for p in m.parameters())
            clip_in_backward(m, CAP)
            run(m)
            assert is_clipped(m.embedding.weight)
        run(model)
        assert is_clipped(model.embedding.weight)

    @pytest.mark.parametrize(
        "cap", [CAP, {"body.*": CAP}, thresholds.Fixed(CAP), thresholds.ParamRelative(), thresholds.FromGlobal(1.0)]
    )
    def test_state_of_what_learns_nothing(self, cap):
        handle = clip_in_backward(tied(), cap)
        assert handle.state_dict() == {}
        handle.load_state_dict({})
        with pytest.raises(ValueError, match="state(_dict)?: of a (clipper with|Schedule)"):
            handle.load_state_dict({"max_norm": thresholds.Schedule(len).state_dict()})
        for wrong in ([], {"policy": "EMA"}, None):
            with pytest.raises((TypeError, ValueError), match=r"state_dict: expected what state_dict\(\)"):
                handle.load_state_dict(wrong)

    def test_state_is_carried_over(self):
        first, second = tied(), tied()
        policies = [thresholds.Schedule(lambda step: 1.0 / (1 + step)) for _ in range(2)]
        handles = [clip_in_backward(m, p) for m, p in zip((first, second), policies, strict=True)]
        for _ in range(3):
            first.zero_grad()
            run(first)
        state = handles[0].state_dict()
        assert state == {"max_norm": policies[0].state_dict()}
        handles[1].load_state_dict(pickle.loads(pickle.dumps(state)))
        run(second)
        assert handles[1].last.caps.item() == 0.25
        with pytest.raises(ValueError, match="state_dict: is empty, of a clipper whose caps don't learn"):
            handles[1].load_state_dict({})

    def test_a_policy_that_needs_no_norms_any_more(self):
        """EMA after its warm-up: as clipping afterwards does, over many passes."""
        model = tied()
        twin = copy.deepcopy(model)
        policies = [thresholds.EMA(warmup_steps=2, warmup_norm=0.5) for _ in range(2)]
        clipper = ComponentClipper(twin, policies[1])
        states, clipped = [], 0
        for step in range(8):
            if step == 2:
                policies[0].load_state_dict(clipper.max_norm.state_dict())
                handle = clip_in_backward(model, policies[0])
            tokens, scale = batch(), 10.0 ** (step % 3)
            for m in (model, twin):
                m.zero_grad()
                (loss_of(m, tokens) * scale).backward()
            wanted = clipper.clip_()
            states.append(clipper.max_norm.state_dict())
            if step >= 2:
                assert same_bits(handle.last.coefs, wanted.coefs)
                assert torch.equal(handle.last.caps, wanted.caps)
                clipped += int(handle.last.clipped.sum())
                ours = handle.state_dict()["max_norm"]
                assert ours["host"] == states[-1]["host"]
                assert all(torch.equal(t, states[-1]["tensors"][name]) for name, t in ours["tensors"].items())
        assert clipped > 0
        with pytest.raises(
            ValueError, match=r"until its warm-up is over: .*load a state .*max_norm.load_state_dict\("
        ):
            clip_in_backward(tied(), thresholds.EMA(warmup_steps=2))
        # Back in the warm-up, all norms are needed again.
        handle.load_state_dict({"max_norm": states[0]})
        model.zero_grad()
        with pytest.raises(RuntimeError, match="max_norm: EMA depends on all norms of a step.*attach"):
            run(model)
        assert all(p.grad is None or p.grad.norm() > 100 for p in model.parameters())  # nothing was clipped
