"""Clipping at the optimizer's step, and in the backward pass: the same as by hand, and refused where it can't be."""

import copy
import gc
import math

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

from cwclip_kernels import ComponentClipper, ComponentSpec, clip_in_backward, fused_component_clip_, thresholds
from helpers import DEVICE, FUSED, parameter, random_grad, same_bits

CAP = 0.05


class Tied(nn.Module):
    """A language model in small: the embedding is the output layer, too; one parameter is never used."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.body = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6, bias=False))
        self.unused = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(6), requires_grad=False)

    def forward(self, tokens):
        return (self.body(self.embedding(tokens)) + self.frozen) @ self.embedding.weight.T


def tied():
    return Tied().to(DEVICE)


def batch():
    return torch.randint(0, 9, (4, 5), device=DEVICE)


def loss_of(model, tokens):
    return model(tokens).square().sum()


OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "fused": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
}


def same_parameters(a, b):
    return all(same_bits(p.detach(), q.detach()) for p, q in zip(a.parameters(), b.parameters(), strict=True))


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
        assert len(norms) == (1 if kind == "sgd" else 4) or kind == "lbfgs"
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
        with pytest.raises(ValueError, match="component 'all' is only partly here, with 'embedding.weight' but not"):
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


def clip_index(handle, name):
    return handle.last.names.index(name)


class TestInBackward:
    @pytest.mark.parametrize("backend", [None, *FUSED])
    @pytest.mark.parametrize("components", [None, ComponentSpec().unitwise("*.weight")])
    def test_the_same_bits_as_afterwards(self, components, backend):
        if backend == "cuda" and DEVICE == "cpu":
            pytest.skip("the stand-in has one thread, not autograd's")
        model = tied()
        twin = copy.deepcopy(model)
        seen = []
        handle = clip_in_backward(model, CAP, components=components, backend=backend, on_clip=seen.append)
        clipper = ComponentClipper(twin, CAP, components=components, backend=backend)
        for _ in range(3):
            tokens = batch()
            model.zero_grad()
            twin.zero_grad()
            loss_of(model, tokens).backward()
            loss_of(twin, tokens).backward()
            wanted = clipper.clip_()
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                assert (p.grad is None) == (q.grad is None)
                assert p.grad is None or same_bits(p.grad, q.grad)
            assert handle.last.names == wanted.names
            assert same_bits(handle.last.norms, wanted.norms)
            assert same_bits(handle.last.coefs, wanted.coefs)
            assert torch.equal(handle.last.caps, wanted.caps)
        assert len(seen) == 3

    @pytest.mark.parametrize("kind", OPTIMIZERS)
    def test_stepping_at_once_is_stepping_afterwards(self, kind):
        model = tied()
        twin = copy.deepcopy(model)
        ours = OPTIMIZERS[kind](
            [{"params": model.embedding.parameters(), "lr": 0.02}, {"params": model.body.parameters()}]
        )
        theirs = OPTIMIZERS[kind](
            [{"params": twin.embedding.parameters(), "lr": 0.02}, {"params": twin.body.parameters()}]
        )
        groups = [list(map(id, group["params"])) for group in ours.param_groups]
        clip_in_backward(model, CAP, optimizer=ours)
        schedules = [torch.optim.lr_scheduler.StepLR(o, 2) for o in (ours, theirs)]
        for _ in range(4):
            tokens = batch()
            loss_of(model, tokens).backward()
            assert all(p.grad is None for p in model.parameters())
            ours.step()  # as in any training loop: finds nothing to do
            loss_of(twin, tokens).backward()
            fused_component_clip_(twin, CAP)
            theirs.step()
            theirs.zero_grad()
            for schedule in schedules:
                schedule.step()
            assert same_parameters(model, twin)
        assert [list(map(id, group["params"])) for group in ours.param_groups] == groups
        assert set(ours.state_dict()["state"]) == set(theirs.state_dict()["state"])

    def test_gradients_do_not_pile_up(self):
        """Never more than the last few gradients exist at a time."""
        layers = 12
        model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(layers))).to(DEVICE)
        most = 0

        def count(_):
            nonlocal most
            most = max(most, sum(p.grad is not None for p in model.parameters()))

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(count)
        clip_in_backward(model, CAP, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
        model(torch.randn(3, 32, device=DEVICE)).sum().backward()
        assert most == 1

    def test_what_the_optimizer_does_not_have_keeps_its_gradient(self):
        model = tied()
        optimizer = torch.optim.SGD(model.body.parameters(), lr=0.1)
        clip_in_backward(model, CAP, optimizer=optimizer)
        loss_of(model, batch()).backward()
        assert model.embedding.weight.grad.norm() <= CAP * 1.001
        assert model.body[0].weight.grad is None

    def test_remove(self):
        model = tied()
        with clip_in_backward(model, CAP) as handle:
            loss_of(model, batch()).backward()
        last = handle.last
        model.zero_grad()
        (loss_of(model, batch()) * 1e3).backward()
        assert model.embedding.weight.grad.norm() > 1
        assert handle.last is last

    @pytest.mark.parametrize("set_to_none", [True, False])
    def test_zeroed_between_backward_passes(self, set_to_none):
        model = tied()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        clip_in_backward(model, CAP)
        for _ in range(3):
            loss_of(model, batch()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)

    def test_accumulation_is_refused(self):
        model = tied()
        clip_in_backward(model, CAP)
        loss_of(model, batch()).backward()
        with pytest.raises(
            RuntimeError, match=r"the gradient of '.*' was added to one that is clipped already.*attach"
        ):
            loss_of(model, batch()).backward()
        model.zero_grad()
        loss_of(model, batch()).backward()  # and it goes on

    def test_after_an_error_in_the_backward_pass(self):
        model = tied()
        handle = clip_in_backward(model, CAP)
        broken = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: 1 / 0)
        with pytest.raises(ZeroDivisionError), broken:
            loss_of(model, batch()).backward()
        model.zero_grad()
        loss_of(model, batch()).backward()
        assert (handle.last.norms > 0).sum() == 4

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing(self, reentrant):
        from torch.utils.checkpoint import checkpoint

        def run(model, x):
            for block in model:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return x.square().sum()

        model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))).to(DEVICE)
        twin = copy.deepcopy(model)
        x = torch.randn(3, 4, device=DEVICE, requires_grad=True)
        clip_in_backward(model, CAP)
        run(model, x).backward()
        run(twin, x).backward()
        fused_component_clip_(twin, CAP)
        assert all(same_bits(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True))

    def test_caps(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).to(DEVICE)
        live = torch.tensor([0.1, 0.2, 0.3, 0.4], device=DEVICE)
        steps = thresholds.Schedule(lambda step: 1.0 / (1 + step))
        for cap, expected in (
            (live, live.tolist()),
            ({"0.*": 0.1}, [0.1, 0.1, math.inf, math.inf]),
            (steps, 1.0),
            (thresholds.FromGlobal(2.0), [1.0] * 4),
        ):
            with clip_in_backward(model, cap) as handle:
                for _ in range(2):
                    model.zero_grad()
                    (model(torch.randn(3, 4, device=DEVICE)) * 1e3).square().sum().backward()
                    norms = [p.grad.norm().item() for p in model.parameters()]
                    found = handle.last.caps.expand(4).tolist()
                    assert all(n <= c * 1.0001 for n, c in zip(norms, found, strict=True))
                    if cap is steps and expected == 1.0:
                        assert found == [1.0] * 4
                        expected = 0.5
                    elif cap is steps:
                        assert found == [0.5] * 4
                    else:
                        assert found == pytest.approx(expected)
                    if cap is live:
                        live.mul_(0.5)
                        expected = live.tolist()

    def test_parameters_decide_caps_before_they_are_stepped(self):
        model = nn.Linear(3, 3, bias=False).to(DEVICE)
        handle = clip_in_backward(
            model, thresholds.ParamRelative(0.1), optimizer=torch.optim.SGD(model.parameters(), lr=0.5)
        )
        for _ in range(2):
            before = model.weight.detach().norm().item()
            (model(torch.randn(5, 3, device=DEVICE)) * 100).sum().backward()
            assert handle.last.caps.item() == pytest.approx(0.1 * before)

    @pytest.mark.parametrize("policy", [thresholds.EMA, thresholds.ZScore, thresholds.Percentile])
    def test_policies_that_want_all_norms_are_refused(self, policy):
        with pytest.raises(ValueError, match=f"max_norm: {policy.__name__} depends on all norms of a step.*attach"):
            clip_in_backward(tied(), policy())

    def test_several_parameters_in_one_component_are_refused(self):
        with pytest.raises(
            ValueError, match=r"'body.0' consists of several parameters \('body.0.weight', 'body.0.bias'"
        ):
            clip_in_backward(tied(), CAP, components="module")

    def test_refusals(self):
        model = tied()
        for change, error, message in (
            ({"nonfinite": "error"}, ValueError, "nonfinite: 'error' would come when"),
            ({"optimizer": "sgd"}, TypeError, "optimizer: expected a torch.optim.Optimizer or None, not str"),
            ({"optimizer": torch.optim.LBFGS(model.parameters())}, ValueError, "LBFGS needs all gradients"),
            ({"max_norm": -1.0}, ValueError, "max_norm"),
            ({"backend": "gpu"}, ValueError, "backend"),
        ):
            with pytest.raises(error, match=message):
                clip_in_backward(model, **{"max_norm": CAP, **change})
        with pytest.raises(ValueError, match="none requires grad"):
            clip_in_backward([("a", nn.Parameter(torch.ones(2), requires_grad=False))], CAP)
        loss_of(model, batch()).backward()
        assert model.embedding.weight.grad.norm() > CAP * 1.001  # nothing was left behind

    def test_data_parallel_models_are_refused(self, tmp_path):
        if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
            pytest.skip("this torch has no gloo")
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            parallel = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
            with pytest.raises(ValueError, match="DistributedDataParallel the backward pass sees local gradients"):
                clip_in_backward(parallel, CAP)
        finally:
            torch.distributed.destroy_process_group()

    def test_keeps_no_model_alive(self):
        import weakref

        model = tied()
        clip_in_backward(model, CAP)
        loss_of(model, batch()).backward()
        alive = weakref.ref(model.embedding.weight)
        del model
        gc.collect()
        assert alive() is None
