"""Gradients that are clipped by somebody else, too."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from numbers import Real
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..attach import Attachment
from ..components import type_name
from ..grad_scaler import ComponentClipGradScaler
from ._optimizers import layers, owning

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
    optimizers: Iterable[Optimizer], scaler: object, ours: str, tensors: Iterable[Tensor] | None = None
) -> None:
    """Raises RuntimeError if another clipper of this package clips the same gradients: caps that learn count twice.

    Args:
        optimizers: the trainer's, wrapped or not.
        scaler: the trainer's ``GradScaler``, or None.
        ours: what clips here, to be named.
        tensors: what is clipped here; None for all that the optimizers own.
    """
    if isinstance(scaler, ComponentClipGradScaler):
        raise RuntimeError(
            f"scaler: a ComponentClipGradScaler clips when it unscales, and {ours} would clip the same gradients "
            f"again; use torch.amp.GradScaler, or leave out {ours}"
        )
    attached = [o for o in optimizers if any(map(_has_attachment, layers(o)))]
    if attached and tensors is not None:
        attached = list(owning(attached, tensors))
    if attached:
        raise RuntimeError(
            f"optimizer: a clipper is attached to {type_name(attached[0])}, and would clip again what {ours} has "
            f"clipped; call remove() on what attach() returned, or leave out {ours}"
        )


def _has_attachment(optimizer: Optimizer) -> bool:
    hooks: dict[int, Any] = getattr(optimizer, "_optimizer_step_pre_hooks", {})
    return any(isinstance(getattr(hook, "__self__", None), Attachment) for hook in hooks.values())
