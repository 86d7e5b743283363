"""numpy's scalars, as people bring them; none of them where numpy isn't installed."""

from typing import Any

try:
    import numpy
except ImportError:
    numpy = None  # type: ignore[assignment]

INTEGERS = [] if numpy is None else [numpy.int64, numpy.uint8, numpy.array]


def of_numpy(kind: str, value: Any) -> list[Any]:
    """``numpy.<kind>(value)``, alone in a list."""
    return [] if numpy is None else [getattr(numpy, kind)(value)]
