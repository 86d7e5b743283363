"""Clipping at the optimizer's step: the same as by hand, and refused where it can't be."""

import copy
import math
import pickle

import pytest
import torch
from torch.amp import GradScaler

from cwclip_kernels import ComponentClipper, fused_component_clip_, thresholds
from helpers import DEVICE, parameter, random_grad, same_bits
from stand_ins import InBackward
from tied_model import CAP, OPTIMIZERS, batch, loss_of, same_parameters, tied


def clip_index(handle, name):
    return handle.last.names.index(name)


class TestAttach:
    @pytest.mark.parametrize("kind", OPTIMIZERS)
    def test_the_same_as_by_hand(self, kind):
        model = tied()
        twin = copy.deepcopy(model)
        ours, theirs = OPTIMIZERS[kind](model.parameters()), OPTIMIZERS[kind](twin.parameters())
        seen = []
        handle = ComponentClipper(model, CAP).attach(ours, on_clip=seen.append)
        for _ in range(3):
            for _ in range(2):  # accumulated, and clipped once
                tokens = batch()
                loss_of(model, tokens).backward()
                loss_of(twin, tokens).backward()
            fused_component_clip_(twin, CAP)
            ours.step()
            theirs.step()
            ours.zero_grad()
            theirs.zero_grad()
        assert same_parameters(model, twin)
        assert len(seen) == 3
        assert handle.last is seen[-1]
        assert handle.last.clipped.any()
        handle.remove()
        loss_of(model, batch()).backward()
        ours.step()
        assert len(seen) == 3

    def test_as_a_context_manager(self):
        p = parameter(random_grad((4,), scale=100.0))
        optimizer = torch.optim.SGD([p], lr=0.0)
        with ComponentClipper([p], 1.0).attach(optimizer):
            optimizer.step()
        assert p.grad.norm() < 1.001
        p.grad = random_grad((4,), scale=100.0)
        optimizer.step()
        assert p.grad.norm() > 1.001

    @pytest.mark.parametrize("by_name", [False, True])
    @pytest.mark.parametrize("kind", ["sgd", "lbfgs"])
    def test_closures(self, kind, by_name):
        p = parameter(None, (3,))
        norms = []

        def closure():
            optimizer.zero_grad()
            loss = ((p - 40.0) ** 2).sum()
            loss.backward()
            return loss

        optimizer = torch.optim.SGD([p], lr=1.0) if kind == "sgd" else torch.optim.LBFGS([p], lr=1.0, max_iter=3)
        ComponentClipper([p], 0.5).attach(optimizer, on_clip=lambda result: norms.append(result.norms.item()))
        loss = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
        assert loss.item() == pytest.approx(4800.0)
        assert norms[0] == pytest.approx(2 * 40 * math.sqrt(3))
        assert len(norms) == 1 if kind == "sgd" else len(norms) > 1  # LBFGS asks again and again
        assert p.grad.norm() < 0.501

    def test_each_optimizer_clips_what_it_owns(self):
        model = tied()
        twin = copy.deepcopy(model)
        clipper = ComponentClipper(model, CAP)
        one = torch.optim.SGD([model.embedding.weight], lr=0.1)
        two = torch.optim.SGD(model.body.parameters(), lr=0.1)
        handles = clipper.attach(one), clipper.attach(two)
        tokens = batch()
        loss_of(model, tokens).backward()
        loss_of(twin, tokens).backward()
        before = model.body[0].weight.grad.clone()
        one.step()
        assert same_bits(model.body[0].weight.grad, before)
        two.step()
        fused_component_clip_(twin, CAP)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert p.grad is None or same_bits(p.grad, q.grad)
        assert handles[0].last.names == handles[1].last.names == clipper.names
        norms = handles[0].last.norms + handles[1].last.norms
        assert (norms > 0).tolist() == ["unused" not in name and "frozen" not in name for name in clipper.names]

    def test_policies_learn_from_several_optimizers(self):
        params = [parameter(random_grad((4,))), parameter(random_grad((5,)))]
        clipper = ComponentClipper(params, thresholds.ZScore(warmup_steps=2))
        optimizers = [torch.optim.SGD([p], lr=0.0) for p in params]
        for optimizer in optimizers:
            clipper.attach(optimizer)
        for _ in range(3):
            for optimizer in optimizers:
                optimizer.step()
        assert clipper.max_norm.state_dict()["tensors"]["seen"].tolist() == [3.0, 3.0]

    def test_groups_added_later(self):
        params = [parameter(random_grad((4,), scale=9.0)) for _ in range(2)]
        optimizer = torch.optim.SGD(params[:1], lr=0.0)
        ComponentClipper(params, CAP).attach(optimizer)
        optimizer.step()
        assert params[1].grad.norm() > CAP * 1.001
        optimizer.add_param_group({"params": params[1:]})
        optimizer.step()
        assert params[1].grad.norm() <= CAP * 1.001

    def test_a_component_of_two_optimizers_is_refused(self):
        model = tied()
        clipper = ComponentClipper(model, CAP, components="all")
        with pytest.raises(ValueError, match="component 'all' spans parameters inside and outside of this subset"):
            clipper.attach(torch.optim.SGD([model.embedding.weight], lr=0.1))
        trained = [p for p in model.parameters() if p.requires_grad]
        clipper.attach(torch.optim.SGD(trained, lr=0.1))  # what is frozen doesn't count

    def test_refusals(self):
        model = tied()
        clipper = ComponentClipper(model, CAP)
        with pytest.raises(TypeError, match=r"optimizer: expected a torch.optim.Optimizer, not Tied"):
            clipper.attach(model)
        with pytest.raises(ValueError, match="owns none of the parameters"):
            clipper.attach(torch.optim.SGD([parameter(None)], lr=0.1))

    def test_gradients_that_are_still_scaled_are_refused(self):
        model = tied()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        ComponentClipper(model, CAP).attach(optimizer)
        scaler = GradScaler(DEVICE, init_scale=8.0)
        scaler.scale(loss_of(model, batch())).backward()
        before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        with pytest.raises(
            RuntimeError, match=r"AdamW unscales its gradients by itself.*scaler.unscale_\(optimizer\)"
        ):
            scaler.step(optimizer)
        after = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(same_bits(a, b) for a, b in zip(after, before, strict=True))

    @pytest.mark.parametrize("kind", OPTIMIZERS)
    def test_unscaled_before_it_is_served(self, kind):
        model = tied()
        optimizer = OPTIMIZERS[kind](model.parameters())
        handle = ComponentClipper(model, CAP).attach(optimizer)
        scaler = GradScaler(DEVICE, init_scale=8.0)
        scaler.scale(loss_of(model, batch())).backward()
        unscaled = model.embedding.weight.grad.norm().item() / 8
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert handle.last.norms[clip_index(handle, "embedding.weight")].item() == pytest.approx(unscaled, rel=1e-5)


class TestOnce:
    """What would clip the same gradient a second time, and teach thresholds twice."""

    def test_a_second_clipper_on_the_same_parameters(self):
        params = {"a": parameter(random_grad((4,), scale=9.0)), "b": parameter(random_grad((5,), scale=9.0))}
        optimizer = torch.optim.SGD(params.values(), lr=0.0)
        clippers = [ComponentClipper({n: params[n] for n in names}.items(), CAP) for names in ("a", "b", "ab")]
        first, second = (clipper.attach(optimizer) for clipper in clippers[:2])  # disjoint
        with pytest.raises(
            ValueError, match=r"optimizer: .* before clips 'a' as well; .*remove\(\), or .*replace=True"
        ):
            clippers[2].attach(optimizer)
        with pytest.raises(ValueError, match="before clips 'a' as well"):
            clippers[0].attach(optimizer)  # the same one again, as when a notebook's cell runs again
        optimizer.step()
        assert (first.last is None, second.last is None) == (False, False)
        first.last = second.last = None
        third = clippers[2].attach(optimizer, replace=True)
        optimizer.step()
        assert (first.last, second.last) == (None, None)
        assert third.last is not None
        third.remove()
        clippers[0].attach(optimizer)

    def test_replace_leaves_those_that_do_not_overlap(self):
        params = [parameter(random_grad((4,), scale=9.0)) for _ in range(2)]
        optimizer = torch.optim.SGD(params, lr=0.0)
        kept = ComponentClipper(params[:1], CAP).attach(optimizer)
        gone = ComponentClipper(params[1:], CAP).attach(optimizer)
        new = ComponentClipper(params[1:], 2 * CAP).attach(optimizer, replace=True)
        optimizer.step()
        assert [handle.last is None for handle in (kept, gone, new)] == [False, True, False]
        with pytest.raises(TypeError, match="replace: expected a bool, not int"):
            ComponentClipper(params, CAP).attach(optimizer, replace=1)

    def test_clippers_that_come_to_overlap(self):
        """Each has parameters that the optimizer gets later."""
        params = [("a", parameter(None, (3,))), ("b", parameter(None, (3,))), ("both", parameter(None, (3,)))]
        (_, a), (_, b), (_, both) = params
        optimizer = torch.optim.SGD([a, b], lr=1.0)
        handles = [ComponentClipper([params[i], params[2]], CAP).attach(optimizer) for i in (0, 1)]
        optimizer.add_param_group({"params": [both]})
        for p in (a, b, both):
            p.grad = torch.ones(3, device=DEVICE)
        for _ in range(2):  # and not the first time alone
            with pytest.raises(RuntimeError, match=r"optimizer: two clippers .* 'both', .* remove\(\) one"):
                optimizer.step()
        assert all(p.grad.eq(1).all() for p in (a, b, both))
        handles[0].remove()
        optimizer.step()
        assert both.detach().norm().item() == pytest.approx(CAP, rel=1e-4)

    def test_two_optimizers_of_one_parameter_each_clip_it(self):
        """One for each phase of the training, say; which of them steps is not known before."""
        p, seen = parameter(None, (3,)), []
        clipper = ComponentClipper([p], CAP)
        optimizers = [torch.optim.SGD([p], lr=1.0) for _ in range(2)]
        for optimizer in optimizers:
            clipper.attach(optimizer, on_clip=seen.append)
        for count, optimizer in enumerate(optimizers, 1):
            before = p.detach().clone()
            p.grad = torch.ones_like(p)
            optimizer.step()
            assert (p.detach() - before).norm().item() == pytest.approx(CAP, rel=1e-4)
            assert len(seen) == count

    def test_clipped_in_the_backward_pass_as_well(self):
        params = [(name, parameter(random_grad((3,), scale=9.0))) for name in "abc"]
        optimizer = torch.optim.SGD([p for _, p in params], lr=1.0)
        clipper = ComponentClipper(params, CAP)
        hook = params[1][1].register_post_accumulate_grad_hook(InBackward())
        with pytest.raises(
            RuntimeError, match=r"the gradient of 'b' is clipped in the backward pass already.*remove"
        ):
            clipper.attach(optimizer)
        assert not optimizer._optimizer_step_pre_hooks
        hook.remove()
        clipper.attach(optimizer)
        params[1][1].register_post_accumulate_grad_hook(lambda _: None)  # somebody else's
        optimizer.step()
        # Set up later it is found when it is this parameter's turn.
        params[2][1].register_post_accumulate_grad_hook(InBackward())
        with pytest.raises(RuntimeError, match="the gradient of 'c' is clipped in the backward pass already"):
            [optimizer.step() for _ in params]


THRESHOLDS = {
    "EMA": lambda: thresholds.EMA(warmup_steps=1),
    "ZScore": lambda: thresholds.ZScore(warmup_steps=1),
    "Percentile": lambda: thresholds.Percentile(50.0),
    "Schedule": lambda: thresholds.Schedule(lambda step: 1.0 + step),
}


class TestHandle:
    @pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps], ids=lambda how: how.__name__)
    def test_it_is_neither_copied_nor_pickled(self, how):
        p = parameter(None)
        handle = ComponentClipper([p], CAP).attach(torch.optim.SGD([p], lr=1.0))
        with pytest.raises(TypeError, match=r"Attachment .* can't be copied or pickled: attach .* state_dict\(\)"):
            how(handle)

    @pytest.mark.parametrize("kind", THRESHOLDS)
    def test_state_dict_is_what_the_caps_have_learnt(self, kind):
        p = parameter(None, (4,))
        clippers = [ComponentClipper([("w", p)], THRESHOLDS[kind]()) for _ in range(3)]
        trained, resumed, fresh = (clipper.attach(torch.optim.SGD([p], lr=0.0)) for clipper in clippers)

        def step(handle, seed, scale=1.0):
            torch.manual_seed(seed)
            p.grad = random_grad((4,), scale=scale)
            handle._before_step(torch.optim.SGD([p], lr=0.0), (), {})
            return handle.last.caps

        for seed in range(3):
            step(trained, seed)
        assert set(trained.state_dict()) == {"max_norm"}
        resumed.load_state_dict(pickle.loads(pickle.dumps(trained.state_dict())))
        caps = [step(handle, 3, scale=99.0) for handle in (trained, resumed, fresh)]
        assert same_bits(caps[0], caps[1])
        assert not same_bits(caps[0], caps[2])
        for wrong in ({}, {**trained.state_dict(), "more": 1}):
            with pytest.raises(ValueError, match="state_dict: "):
                resumed.load_state_dict(wrong)

    @pytest.mark.parametrize("cap", [CAP, {"*": CAP}, torch.tensor(CAP)], ids=["number", "mapping", "tensor"])
    def test_state_dict_is_empty_where_nothing_is_learnt(self, cap):
        p = parameter(None)
        handle = ComponentClipper([p], cap).attach(torch.optim.SGD([p], lr=1.0))
        assert handle.state_dict() == {}
        handle.load_state_dict({})
        with pytest.raises(ValueError, match="state_dict: "):
            handle.load_state_dict({"max_norm": thresholds.EMA().state_dict()})
        with pytest.raises(TypeError, match="state_dict: "):
            handle.load_state_dict(None)
