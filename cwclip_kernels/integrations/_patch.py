"""A library's function replaced by one of ours, so that nobody has to edit the library."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module, metadata
from typing import Any


class Patch:
    """A library's function, replaced until ``remove()`` or the end of a ``with`` block; made by ``apply()``.

    It is replaced in every module that has it under its own name, those of the library and of others that have
    imported it. What has stored it elsewhere, such as in a ``functools.partial``, goes on calling the original.
    """

    def __init__(self, module: str, name: str, ours: Callable[..., object], options: Any) -> None:
        library = import_module(module)
        self._name, self._original = name, getattr(library, name, None)
        self._ours = partial(ours, **options)
        if ours in (self._original, getattr(self._original, "func", None)):
            raise RuntimeError(
                f"{module}.{name} is replaced already, by this package; call remove() on what apply() returned first"
            )
        kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
        expected = _signature(ours, kinds)  # the others are options of this package
        found = _signature(self._original) if callable(self._original) else "no such function"
        if found != expected:
            raise RuntimeError(
                f"apply() isn't made for {_version(module.split('.')[0])}: {module}.{name} was {expected}, here it "
                f"is {found}; replace its calls by hand"
            )
        self._swap(self._original, self._ours)

    def _swap(self, old: object, new: object) -> None:
        for module in list(sys.modules.values()):
            if getattr(module, "__dict__", {}).get(self._name) is old:
                setattr(module, self._name, new)

    def remove(self) -> None:
        """Puts the original back; a function that has replaced ours since then stays."""
        self._swap(self._ours, self._original)

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _signature(function: Callable[..., object], kinds: tuple[object, ...] = ()) -> str:
    """Parameters, of these kinds or all, with their defaults."""
    parameters = inspect.signature(function).parameters.values()
    shown = [p.replace(annotation=p.empty) for p in parameters if not kinds or p.kind in kinds]
    return str(inspect.Signature(shown))


def _version(library: str) -> str:
    try:
        return f"{library} {metadata.version(library)}"
    except metadata.PackageNotFoundError:  # not installed, but on the path
        return f"{library} {getattr(import_module(library), '__version__', '(unknown version)')}"
