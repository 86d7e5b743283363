"""Steps of AdamW to be compared: of two optimizers that clip, or of a backend's functions."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cwclip_kernels.core.adamw import AdamWRule, AdamWStep
from cwclip_kernels.optim import ComponentClipAdamW
from helpers import DEVICE, assert_norms, random_grad

# Relative and absolute difference of two parameters near 1 and of their states after some steps: roundings of the
# dtype, and what one of them makes of the next step's. Steps are of 0.1.
TOLERANCE = {
    torch.float32: (2e-6, 1e-6),
    torch.bfloat16: (1.6e-2, 4e-3),
    torch.float16: (2e-3, 5e-4),
    torch.float64: (1e-13, 1e-13),
}
LR = 0.1
RULE = AdamWRule(LR, 0.9, 0.999, 1e-8, 1e-2, amsgrad=False, maximize=False, correct_bias=True)

Group = Callable[[list[tuple[str, Tensor]]], Any]


class Pair:
    """Optimizers of copies of the same tensors, which are to stay equal.

    Args:
        backend: of the first; the second has the definition.
        tensors: what the parameters are copies of, in their memory layouts.
        group: param groups from (name, parameter) pairs.
        options: of both optimizers.
    """

    def __init__(
        self,
        backend: str,
        tensors: Sequence[Tensor],
        group: Group = list,
        *,
        other: str = "reference",
        **options: Any,
    ) -> None:
        options = {"lr": LR, "max_norm": 1.0, **options}
        self.params = [[nn.Parameter(layout_copy(t)) for t in tensors] for _ in range(2)]
        self.ours, self.theirs = (
            ComponentClipAdamW(group([(f"layers.{i}.w", p) for i, p in enumerate(params)]), backend=name, **options)
            for name, params in zip((backend, other), self.params, strict=True)
        )

    def step(self, grads: Sequence[Tensor] | None = None, check: bool = True) -> None:
        """One step of both, from these gradients or random ones."""
        if grads is None:
            grads = [random_like(p) for p in self.params[0]]
        for params in self.params:
            for p, grad in zip(params, grads, strict=True):
                p.grad = layout_copy(grad)
        for optimizer in (self.ours, self.theirs):
            optimizer.step()
        if check:
            self.check()

    def check(self) -> None:
        """Parameters, states, norms and coefficients are alike."""
        a, b = self.ours.last, self.theirs.last
        assert a.names == b.names
        double = a.norms.dtype == torch.float64
        assert_norms(a.norms, b.norms, torch.float64 if double else torch.float32)
        assert_norms(a.coefs, b.coefs, torch.float64 if double else torch.float32)
        for ours, theirs in zip(*self.params, strict=True):
            assert_stepped(ours, theirs)
            states = self.ours.state[ours], self.theirs.state[theirs]
            assert states[0].keys() == states[1].keys()
            for name, value in states[0].items():
                assert_stepped(value, states[1][name])


def step_of(
    params: list[Tensor],
    rules: Sequence[AdamWRule] = (RULE,),
    rule_of: tuple[int, ...] | None = None,
    state_dtype: torch.dtype | None = None,
) -> AdamWStep:
    """A step of these parameters by hand, with random states."""
    rule_of = (0,) * len(params) if rule_of is None else rule_of
    states = [[random_like(p, state_dtype or p.dtype).abs_() for p in params] for _ in range(3)]
    maxima = [w if rules[r].amsgrad else None for w, r in zip(states[2], rule_of, strict=True)]
    steps = [torch.tensor(float(i % 3), device=DEVICE) for i in range(len(params))]
    return AdamWStep(params, states[0], states[1], maxima, steps, tuple(rules), rule_of)


def copy_of(step: AdamWStep) -> AdamWStep:
    """The same step of copies of its tensors."""
    lists = (step.params, step.exp_avgs, step.exp_avg_sqs, step.steps)
    params, exp_avgs, exp_avg_sqs, steps = ([layout_copy(t) for t in each] for each in lists)
    maxima = [None if w is None else layout_copy(w) for w in step.max_exp_avg_sqs]
    return replace(
        step, params=params, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, max_exp_avg_sqs=maxima, steps=steps
    )


def written_by(step: AdamWStep) -> list[Tensor]:
    """All tensors that it writes, without those that it hasn't."""
    return [t for t in step.written() if t is not None]


def layout_copy(tensor: Tensor) -> Tensor:
    """A copy in the same memory layout."""
    return tensor.detach().clone(memory_format=torch.preserve_format)


def random_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Random values in the same memory layout."""
    grad = random_grad(tuple(tensor.shape), dtype or tensor.dtype)
    return torch.empty_like(tensor, dtype=grad.dtype, memory_format=torch.preserve_format).copy_(grad).detach()


def assert_stepped(actual: Tensor, expected: Tensor) -> None:
    """Within the table; non-finite values alike."""
    rtol, atol = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, equal_nan=True)


@contextmanager
def default_dtype_of(dtype: torch.dtype) -> Iterator[None]:
    """Float64 as the default for it: the definition makes numbers tensors of the default dtype, 'step' among them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if dtype == torch.float64 else torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
