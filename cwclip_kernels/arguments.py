"""Arguments: how errors and warnings name them."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

_PACKAGE = str(Path(__file__).parent)


def warn_caller(message: str) -> None:
    """A UserWarning at the line that called into this package, however deep the call has gone."""
    level = 1
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
        level += 1
    warnings.warn(message, UserWarning, stacklevel=level + 1)


def type_name(value: object) -> str:
    """A value's type, as error messages call it."""
    return type(value).__qualname__
