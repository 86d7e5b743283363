"""Optimizers that clip, beside clipping and torch's AdamW: the same gradients for both, step after step."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from helpers import DEVICE, random_grad

# Largest difference of a parameter, as a share of the learning rate and of its own size, for each step taken. Of
# halves every step is rounded, and roundings add up.
STEP_TOLERANCE = {torch.float32: 4e-7, torch.float64: 1e-14, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def twins(shapes: Iterable[Sequence[int]], dtype: torch.dtype = torch.float32) -> tuple[list[nn.Parameter], ...]:
    """Two lists of equal random parameters, without gradients."""
    values = [random_grad(shape, dtype) for shape in shapes]
    return tuple([nn.Parameter(value.clone()) for value in values] for _ in range(2))


def give_gradients(*lists: Sequence[nn.Parameter], scale: float = 1.0, dtype: torch.dtype | None = None) -> None:
    """The same new random gradients to each list, of other sizes each time."""
    for each in zip(*lists, strict=True):
        grad = random_grad(each[0].shape, dtype or each[0].dtype, scale)
        for p in each:
            # In the parameter's own memory layout, as backward() makes it.
            p.grad = torch.empty_like(p, dtype=grad.dtype).copy_(grad)


def named(params: Sequence[nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    return [(f"layers.{i // 2}.{'weight' if i % 2 == 0 else 'bias'}", p) for i, p in enumerate(params)]


def assert_stepped_alike(
    actual: Iterable[Tensor], expected: Iterable[Tensor], steps: int, lr: float, dtype: torch.dtype | None = None
) -> None:
    """Within ``STEP_TOLERANCE`` after so many steps."""
    for a, e in zip(actual, expected, strict=True):
        own = STEP_TOLERANCE[dtype or e.dtype] * steps
        torch.testing.assert_close(a.detach(), e.detach(), rtol=own, atol=own * lr, equal_nan=True)


def run(steps: int, *trainings: tuple[list[nn.Parameter], Callable[[], object]], scale: float = 1.0) -> None:
    """So many steps of each, with the same gradients."""
    for _ in range(steps):
        give_gradients(*(params for params, _ in trainings), scale=scale)
        for _, step in trainings:
            step()


def states_of(optimizer: torch.optim.Optimizer, params: Iterable[Tensor]) -> list[Tensor]:
    """All state tensors, in the order of parameters and names."""
    return [value for p in params for _, value in sorted(optimizer.state[p].items())]


__all__ = ["DEVICE", "assert_stepped_alike", "give_gradients", "named", "run", "states_of", "twins"]
