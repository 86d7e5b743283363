"""Clipping in the backward pass: the bits of clipping afterwards, and refused where it can't be."""

import copy
import gc
import math
import weakref

import pytest
import torch
from torch import nn

from cwclip_kernels import ComponentClipper, ComponentSpec, clip_in_backward, fused_component_clip_, thresholds
from helpers import DEVICE, FUSED, same_bits
from tied_model import CAP, OPTIMIZERS, batch, loss_of, same_parameters, tied


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
            (
                {"optimizer": "sgd"},
                TypeError,
                "optimizer: expected .*a mapping of parameters to optimizers, or None, not str",
            ),
            ({"optimizer": torch.optim.LBFGS(model.parameters())}, ValueError, "LBFGS needs 'closure' at its step"),
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

    @pytest.mark.usefixtures("own_garbage")
    def test_keeps_no_model_alive(self):
        model = tied()
        clip_in_backward(model, CAP)
        loss_of(model, batch()).backward()
        alive = weakref.ref(model.embedding.weight)
        del model
        gc.collect()
        assert alive() is None


class TestFrozenOrUnfrozenLater:
    """Caps that share out a budget were counted at set-up; those of single components weren't."""

    @staticmethod
    def set_up(form, policy):
        model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 1)).to(DEVICE)
        model[0].weight.requires_grad_(False)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0) if "stepped" in form else None
        parameters = model if form == "module" else model.parameters()
        return model, clip_in_backward(parameters, policy, optimizer=optimizer)

    @pytest.mark.parametrize("split", ["uniform", "numel"])
    @pytest.mark.parametrize(("which", "now"), [("0.weight", "trained"), ("0.bias", "frozen"), ("1.bias", "frozen")])
    @pytest.mark.parametrize("form", ["module", "stepped"])
    def test_shares_of_a_budget(self, form, which, now, split):
        model, handle = self.set_up(form, thresholds.FromGlobal(1.0, split))
        parameter = model.get_parameter(which)
        before = copy.deepcopy(model.state_dict())
        parameter.requires_grad_(now == "trained")
        name = "[0-9]" if form == "stepped" else which
        with pytest.raises(RuntimeError, match=f"max_norm: FromGlobal counted .*'{name}' was .*{now} now; remove"):
            (model(torch.ones(1, 3, device=DEVICE)) * 100).sum().backward()
        assert all(same_bits(value, before[key]) for key, value in model.state_dict().items())
        assert all(p.grad is None or p.grad.norm() > 1 for p in model.parameters())
        assert handle.last is None
        parameter.requires_grad_(now == "frozen")
        model.zero_grad()
        (model(torch.ones(1, 3, device=DEVICE)) * 100).sum().backward()
        assert handle.last.caps[0] == 0
        assert (handle.last.coefs[1:] < 1).all()

    def test_unfrozen_where_only_its_hook_knows(self):
        model, _ = self.set_up("parameters", thresholds.FromGlobal(1.0))
        model[0].weight.requires_grad_(True)
        with pytest.raises(RuntimeError, match="max_norm: FromGlobal counted .*'0' was frozen, which is trained now"):
            model(torch.ones(1, 3, device=DEVICE)).sum().backward()

    @pytest.mark.parametrize("form", ["module", "stepped", "parameters"])
    @pytest.mark.parametrize("kind", ["EMA", "ParamRelative", "Fixed"])
    def test_caps_of_single_components(self, kind, form):
        policy = {
            "EMA": lambda: thresholds.EMA(warmup_steps=0),
            "ParamRelative": thresholds.ParamRelative,
            "Fixed": lambda: thresholds.Fixed(CAP),
        }[kind]()
        model, handle = self.set_up(form, policy)
        for trained in (True, False, True):
            model[0].weight.requires_grad_(trained)
            model[1].bias.requires_grad_(not trained)
            (model(torch.ones(1, 3, device=DEVICE)) * 100).sum().backward()
            assert (handle.last.norms > 0).tolist() == [trained, True, True, not trained]
            model.zero_grad()
