"""Other packages' parts that clipping meets, rebuilt in a few lines."""

import pytest
import torch
from torch.optim import SGD, Optimizer


def agc(params, factor):
    """timm's ``adaptive_clip_grad``: by the unit, the floor of norms is 1e-3, and nothing is added to a norm."""
    for p in params:
        dims = tuple(range(1, p.ndim)) if p.ndim > 1 else tuple(range(p.ndim))
        cap = p.detach().double().square().sum(dims, keepdim=True).sqrt().clamp(min=1e-3) * factor
        norm = p.grad.double().square().sum(dims, keepdim=True).sqrt()
        p.grad.copy_(torch.where(norm < cap, p.grad, p.grad * (cap / norm.clamp(min=1e-6))))


class InBackward:
    """Stands in for the hook of clip_in_backward."""

    clips_by_component = True

    def __call__(self, parameter):
        pass


class Lookahead(Optimizer):
    """As timm's: hooks' places are there, but nothing runs them before a zero_grad() of this class."""

    def __init__(self, base_optimizer):
        self._optimizer_step_pre_hooks = {}
        self._optimizer_step_post_hooks = {}
        self._base_optimizer = base_optimizer
        self.param_groups = getattr(base_optimizer, "param_groups", None)

    def step(self, closure=None):
        return self._base_optimizer.step(closure)


def accelerated(params):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    try:
        return accelerate.Accelerator(cpu=True).prepare(SGD(params, lr=1.0))
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
