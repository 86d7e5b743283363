"""What caps learn in a trainer: whether there is anything to save, and not from steps that are skipped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer

from ..thresholds import Threshold
from ..thresholds.constant import MaxNorm
from ._optimizers import innermost


def learns(max_norm: MaxNorm | None) -> bool:
    """Whether caps change with the steps, so that a checkpoint needs them: a threshold's that defines ``update_``.

    Example:
        >>> from cwclip_kernels import thresholds
        >>> from cwclip_kernels.integrations._learning import learns
        >>> learns(thresholds.EMA()), learns(thresholds.FromGlobal(1.0)), learns(0.1)
        (True, False, False)
    """
    return isinstance(max_norm, Threshold) and type(max_norm).update_ is not Threshold.update_


@contextmanager
def learning_unless_skipped(max_norm: MaxNorm, scaler: object, optimizers: Iterable[Optimizer]) -> Iterator[None]:
    """Clip inside: caps that learn stay as they are if the scaler is going to skip the step, for a gradient of inf.

    A skipped step counts for nothing then, as where a clipper is attached to the optimizer, which isn't called. To
    know it waits for the device, as the scaler's ``step`` does right after; only where caps learn.

    Args:
        max_norm: what is clipped to.
        scaler: the ``GradScaler`` that has unscaled the gradients, or None.
        optimizers: those that are to be stepped, wrapped or not.
    """
    is_lost = learns(max_norm) and scaler is not None and any(_is_skipped(scaler, o) for o in optimizers)
    if not is_lost or not isinstance(max_norm, Threshold):
        yield
        return
    before = max_norm.state_dict()
    try:
        yield
    finally:
        max_norm.load_state_dict(before)


def _is_skipped(scaler: Any, optimizer: Optimizer) -> bool:
    state = getattr(scaler, "_per_optimizer_states", {}).get(id(innermost(optimizer)))
    if state is None or state["stage"].name != "UNSCALED":
        return False
    return any(found.item() for found in state["found_inf_per_device"].values())
