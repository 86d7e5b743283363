"""The optimizers of a trainer, which may wrap them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor
from torch.optim import Optimizer

_WRAPPERS = ("AcceleratedOptimizer", "LightningOptimizer")


def innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer that a step ends up in, and that a ``GradScaler`` knows."""
    while any(kind.__name__ in _WRAPPERS for kind in type(optimizer).__mro__):
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]
    return optimizer


def owning(optimizers: Iterable[Optimizer], tensors: Iterable[Tensor]) -> Iterator[Optimizer]:
    """Those of the optimizers that own any of the tensors."""
    ids = set(map(id, tensors))
    return (o for o in optimizers if any(id(p) in ids for group in o.param_groups for p in group["params"]))
