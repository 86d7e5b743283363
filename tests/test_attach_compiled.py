"""Clipping at the step of an optimizer that is compiled, or odd in other ways."""

import pytest
import torch

from cwclip_kernels import ComponentClipper, thresholds
from cwclip_kernels.core.optimizers import runner_of_hooks
from helpers import parameter, random_grad, same_bits
from tied_model import CAP

pytestmark = pytest.mark.builds
JIT = "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"  # Dynamo's own imports


class WithSuper(torch.optim.AdamW):
    def step(self, closure=None):
        return super().step(closure)


class WithTwoSupers(WithSuper):
    def step(self, closure=None):
        return super().step(closure)


class Around(torch.optim.SGD):
    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        self.inner = torch.optim.SGD(self.param_groups, lr=lr)


class Unchanged(torch.optim.AdamW):
    pass


@pytest.mark.parametrize("policy", [lambda: thresholds.EMA(warmup_steps=0), lambda: CAP])
@pytest.mark.filterwarnings(JIT)
@pytest.mark.parametrize("kind", [Unchanged, torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
def test_a_compiled_step_is_clipped_once(kind, policy):
    for base in (torch.optim.Adam, torch.optim.AdamW):  # each has a step of its own from now on
        base([parameter(None, (2,))]).step()
    ours, theirs = parameter(None, (4,)), parameter(None, (4,))
    results = [[], []]
    policies = policy(), policy()
    optimizers = [kind([p], lr=0.1) for p in (ours, theirs)]
    for p, caps, optimizer, seen in zip((ours, theirs), policies, optimizers, results, strict=True):
        ComponentClipper([p], caps).attach(optimizer, on_clip=seen.append)
    torch._dynamo.reset()
    compiled = torch.compile(optimizers[0].step, backend="eager")
    for _ in range(3):
        ours.grad = random_grad((4,))
        theirs.grad = ours.grad.clone()
        compiled()
        optimizers[1].step()
        assert torch.allclose(ours.grad, theirs.grad)
    assert len(results[0]) == len(results[1]) == 3
    if isinstance(policies[0], thresholds.Threshold):
        assert [p.state_dict()["tensors"]["steps"].item() for p in policies] == [3, 3]


@pytest.mark.filterwarnings(JIT)
@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize("kind", [WithSuper, WithTwoSupers, Around])
def test_a_compiled_step_that_may_nest_is_refused(kind, in_parts):
    """Whether the base class has been used or not, and whether the hook is traced or not."""
    p = parameter(None, (4,))
    optimizer = kind([p], lr=0.1)
    policy = thresholds.EMA(warmup_steps=0)
    if in_parts:
        optimizer.register_step_pre_hook(torch.compiler.disable(lambda *_: None))
    ComponentClipper([p], policy).attach(optimizer)
    p.grad = random_grad((4,))
    before = p.grad.clone(), p.detach().clone()
    torch._dynamo.reset()
    with pytest.raises(
        RuntimeError, match=rf"optimizer: the step\(\) of this {kind.__name__} may call .*don't compile"
    ):
        torch.compile(optimizer.step, backend="eager")()
    assert same_bits(p.grad, before[0])
    assert same_bits(p.detach(), before[1])
    optimizer.step()
    assert policy.state_dict()["host"] == {"steps": 1}


# ------------------------------------------------------------------------------------------------------------
# Others' classes, other torch
# ------------------------------------------------------------------------------------------------------------


class WithProperty(torch.optim.SGD):
    def __init__(self, params):
        super().__init__(params, lr=1.0)
        self._stats = None
        self._inner = torch.optim.SGD([parameter(None, (2,))], lr=1.0)

    @property
    def stats(self):
        raise RuntimeError("no statistics yet")

    @property
    def inner(self):
        raise RuntimeError("not now")


def test_properties_that_raise_are_left_alone():
    p = parameter(None, (4,))
    optimizer = WithProperty([p])
    handle = ComponentClipper([p], CAP).attach(optimizer)
    p.grad = random_grad((4,))
    optimizer.step()
    assert handle.last.clipped.all()


def test_another_torch_is_refused_by_name(monkeypatch):
    runner_of_hooks.cache_clear()
    p = parameter(None, (4,))
    optimizer = torch.optim.SGD([p], lr=1.0)
    with monkeypatch.context() as patch:
        patch.delattr(torch.optim.Optimizer, "profile_hook_step")
        with pytest.raises(RuntimeError, match="attach isn't made for the Optimizer of torch"):
            ComponentClipper([p], CAP).attach(optimizer)
    assert not optimizer._optimizer_step_pre_hooks
    ComponentClipper([p], CAP).attach(optimizer)
