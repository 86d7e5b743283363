"""Gradients that are clipped by somebody else, too."""

from __future__ import annotations

import math
import warnings
from numbers import Real

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
