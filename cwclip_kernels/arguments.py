"""Checks of arguments, whose errors name the argument, what it takes and what it got; and the words they share."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from numbers import Real
from operator import index
from pathlib import Path
from types import UnionType

import torch
from torch import Tensor

_PACKAGE = str(Path(__file__).parent)
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def checked_number(
    value: object,
    name: str,
    low: float = 0.0,
    high: float = math.inf,
    *,
    above_low: bool = False,
    finite: bool = True,
    kinds: str = "a number",
) -> float:
    """A real number from ``low`` to ``high`` as float. ``kinds`` says what else the argument takes."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected {kinds}, not {type_name(value)}")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{name}: {value} is too large for a float{'' if finite else '; use math.inf'}") from None
    if not low <= number <= high or (above_low and number == low) or (finite and abs(number) == math.inf):
        bounds = "" if low == -math.inf else f" {'>' if above_low else '>='} {low:g}"
        bounds += f" and <= {high:g}" if high < math.inf else ""
        raise ValueError(f"{name}: expected a {'finite ' if finite else ''}number{bounds}, not {number}")
    return number


def checked_int(value: object, name: str, low: int | None = None, kinds: str = "a whole number") -> int:
    """A whole number of any type but bool, as int; at least ``low``."""
    try:
        # Those of older numpys are whole numbers to Python, with a warning; a tensor's always are.
        if isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool"):
            raise TypeError
        number = index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}: expected {kinds}, not {type_name(value)}") from None
    if low is not None and number < low:
        raise ValueError(f"{name}: expected a whole number >= {low}, not {number}")
    return number


def check_type(value: object, name: str, kind: type | UnionType, expected: str) -> None:
    """Raises TypeError unless the value is of this type."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected {expected}, not {type_name(value)}")


def check_word(value: object, name: str, *words: str) -> str:
    """One of these words, or an error that lists them."""
    check_type(value, name, str, f"one of {', '.join(map(repr, words))}")
    if value not in words:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, words))}, not {value!r}")
    return str(value)


def check_float_tensor(tensor: Tensor, name: str) -> None:
    """Raises unless the tensor is dense, floating-point and has data."""
    if tensor.dtype not in _FLOATS or tensor.layout != torch.strided:
        kind = tensor.dtype if tensor.layout == torch.strided else tensor.layout
        raise TypeError(f"{name}: expected a floating-point tensor, not {kind}")
    if tensor.is_meta:
        raise ValueError(f"{name}: is on the meta device, where it has no value")


def type_name(value: object) -> str:
    """A value's type, as error messages call it."""
    return type(value).__qualname__


def some_of(names: Sequence[object], count: int = 3) -> str:
    """The first few names and how many more there are, for messages."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(map(repr, names[:count])) + more


def warn_caller(message: str) -> None:
    """Warns at the line that called into this package, however deep the call has gone."""
    level = 1
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
        level += 1
    warnings.warn(message, UserWarning, stacklevel=level + 1)
