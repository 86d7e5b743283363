"""The ``grads`` argument: gradients that hang on no parameter, in every accepted form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..arguments import type_name
from .parameters import NamedTensors, own_names

Grads: TypeAlias = (
    Tensor | Mapping[str, Tensor | None] | Iterable[Tensor | None] | Iterable[tuple[str, Tensor | None]]
)

_FORMS = (
    "expected a Tensor, a mapping of names to Tensors, or an iterable of Tensors or of (name, Tensor) pairs, each "
    "Tensor perhaps None"
)


@dataclass(frozen=True)
class GivenGradients:
    """Gradients as they were given.

    Attributes:
        given: their names; positions "0", "1", ... where there were none.
        values: the gradients, None where there is none.
        named: whether the names are the caller's.
        like_given: puts others, as many and in the same order, into a container like the caller's.
    """

    given: list[str]
    values: list[Tensor | None]
    named: bool
    like_given: Callable[[list[Tensor | None]], Any]

    def named_tensors(self, tensors: list[Tensor]) -> NamedTensors:
        """Tensors that stand for the gradients, under their names."""
        own, lost_prefix = own_names(self.given) if self.named else (self.given, False)
        return NamedTensors(tuple(own), tuple(tensors), self.named, (), lost_prefix)


def given_gradients(grads: Grads) -> GivenGradients:
    """Reads every accepted form of ``grads``.

    Raises:
        TypeError: another form, or nested containers.
        ValueError: two gradients of one name.
    """
    if isinstance(grads, Tensor):
        return GivenGradients(["0"], [grads], False, lambda new: new[0])
    if isinstance(grads, Mapping):
        given = list(grads)
        found = _checked(given, list(grads.values()), named=True)
        return GivenGradients(given, found, True, lambda new: dict(zip(given, new, strict=True)))
    if isinstance(grads, str | bytes | torch.nn.Module) or not isinstance(grads, Iterable):
        hint = "; for the .grad of its parameters there is fused_component_clip_"
        raise TypeError(
            f"grads: {_FORMS}, not {type_name(grads)}{hint if isinstance(grads, torch.nn.Module) else ''}"
        )
    items: list[Any] = list(grads)
    if any(_is_pair(item) for item in items):
        if not all(map(_is_pair, items)):
            raise TypeError(f"grads: {_FORMS}, not some of either")
        given = [name for name, _ in items]
        twice = next((name for i, name in enumerate(given) if name in given[:i]), None)
        if twice is not None:
            raise ValueError(f"grads: two gradients are named {twice!r}")
        found = _checked(given, [grad for _, grad in items], named=True)
        return GivenGradients(given, found, True, lambda new: list(zip(given, new, strict=True)))
    given = list(map(str, range(len(items))))
    found = _checked(given, items, named=False)
    return GivenGradients(given, found, False, tuple if isinstance(grads, tuple) else list)


def _is_pair(item: object) -> bool:
    return isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[0], str)


def _checked(given: list[Any], values: list[Any], *, named: bool) -> list[Tensor | None]:
    for name, value in zip(given, values, strict=True):
        if not isinstance(name, str):
            raise TypeError(f"grads: {_FORMS}, not the name {name!r}")
        if not (value is None or isinstance(value, Tensor)):
            where = f"grads[{name!r}]" if named else f"grads[{name}]"
            hint = "; flatten nested containers, with names like 'encoder.weight'"
            is_nested = isinstance(value, Mapping | list | tuple)
            raise TypeError(f"{where}: expected a Tensor or None, not {type_name(value)}{hint if is_nested else ''}")
    return values
