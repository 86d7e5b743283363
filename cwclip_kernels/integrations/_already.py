"""Gradients that are clipped by somebody else, too."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from numbers import Real

from torch import Tensor
from torch.optim import Optimizer

from ..arguments import type_name
from ..core.optimizers import attached_clippers
from ..grad_scaler import ComponentClipGradScaler

_said: set[str] = set()


def warn_already_clipped(setting: str, value: object, way_out: str) -> bool:
    """Warns that a trainer clips by itself as well; once for each setting.

    Args:
        setting: as its users write it, ``TrainingArguments.max_grad_norm``.
        value: what it is; None, False, 0 and inf mean that nothing is clipped.
        way_out: what to do, to end the sentence.

    Returns:
        Whether the setting clips, warned or not.

    Example:
        >>> from cwclip_kernels.integrations._already import warn_already_clipped
        >>> warn_already_clipped("Trainer(gradient_clip_val=...)", None, "leave it out")
        False
    """
    is_off = value is None or value is False or (isinstance(value, Real) and (not value or value == math.inf))
    if not is_off and setting not in _said:
        _said.add(setting)
        warnings.warn(
            f"{setting} is {value!r}, so the trainer clips these gradients too, all by one norm, and what components "
            f"are clipped to depends on it; {way_out}",
            UserWarning,
            stacklevel=3,
        )
    return not is_off


def refuse_double_clipping(
    optimizers: Iterable[Optimizer], scaler: object, parameters: Sequence[Tensor], ours: str
) -> None:
    """Raises RuntimeError if another clipper of this package clips the same gradients: caps that learn count twice.

    Args:
        optimizers: the trainer's, wrapped or not.
        scaler: the trainer's ``GradScaler``, or None.
        parameters: whose gradients are clipped here.
        ours: what clips here, to be named.
    """
    if isinstance(scaler, ComponentClipGradScaler):
        raise RuntimeError(
            f"scaler: a ComponentClipGradScaler clips when it unscales, and {ours} would clip the same gradients "
            f"again; use torch.amp.GradScaler, or leave out {ours}"
        )
    for optimizer in optimizers:
        shared = attached_clippers(optimizer, parameters)
        if shared:
            raise RuntimeError(
                f"optimizer: a clipper is attached to {type_name(optimizer)}, and would clip the gradient of "
                f"{shared[0][1]!r} again, which {ours} has clipped; call remove() on what attach() returned, or "
                f"leave out {ours}"
            )
