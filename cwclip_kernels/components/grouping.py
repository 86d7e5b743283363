"""The words that group parameters into components, and what tells a parameter's component."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from typing import TypeAlias

from torch import Tensor

from ..arguments import type_name

By: TypeAlias = "str | Callable[[str, Tensor], Hashable | None] | None"

WORDS = ("parameter", "module", "layer", "type", "all")


def module_of(name: str, beside: Collection[str] = ()) -> str:
    """The owning module: "encoder.layer.3.output.dense.bias" -> "encoder.layer.3.output.dense".

    What ``torch.nn.utils.parametrize`` made of a parameter still belongs to its module:
    "dense.parametrizations.weight.original0" -> "dense".

    Args:
        name: the parameter's.
        beside: the other parameters', which tell "parametrizations.a.0.b" of a parametrized "a" in the outermost
            module, beside "parametrizations.a.original", from that of a module which is merely called so.
    """
    return _parametrized(name, beside)[0].rpartition(".")[0]


def layer_of(name: str, beside: Collection[str] = ()) -> str:
    """Up to and including the last all-digits part: "encoder.layer.3.output.dense.bias" -> "encoder.layer.3".

    Numbers of parametrizations, as in "dense.parametrizations.weight.0.scale", aren't layers.
    """
    parts = _parametrized(name, beside)[0].split(".")
    for last in range(len(parts), 0, -1):
        if parts[last - 1].isdecimal():
            return ".".join(parts[:last])
    return module_of(name, beside)


def type_of(name: str, beside: Collection[str] = ()) -> str:
    """All-digits parts become "*": "encoder.layer.3.output.dense.bias" -> "encoder.layer.*.output.dense.bias".

    Numbers of parametrizations stay.
    """
    own, rest = _parametrized(name, beside)
    if rest:
        own = own.rpartition(".")[0]
        rest = f"{'.' if own else ''}{rest}"
    return ".".join("*" if part.isdecimal() else part for part in own.split(".")) + rest


def _parametrized(name: str, beside: Collection[str]) -> tuple[str, str]:
    """The name that a parameter had before it was parametrized, and all that comes after its module now, if it was.

    "h.3.dense.parametrizations.weight.original0" -> "h.3.dense.weight", "parametrizations.weight.original0"
    """
    parts = name.split(".")
    for i, part in enumerate(parts[:-2]):
        if part == "parametrizations" and _is_parametrization(parts, i, beside):
            return ".".join([*parts[:i], parts[i + 1]]), ".".join(parts[i:])
    return name, ""


def _is_parametrization(parts: Sequence[str], at: int, beside: Collection[str]) -> bool:
    kind = parts[at + 2]
    if kind.startswith("original"):  # a parameter itself: "original", or "original0" and so on
        return len(parts) == at + 3 and (kind == "original" or kind.removeprefix("original").isdecimal())
    if not kind.isdecimal() or len(parts) == at + 3:  # what lies in a parametrization, which is a module
        return False
    original = ".".join([*parts[: at + 2], "original"])
    return at > 0 or original in beside or f"{original}0" in beside


WORD_KEYS: dict[str, Callable[[str, Collection[str]], str]] = {
    "parameter": lambda name, beside: name,
    "module": module_of,
    "layer": layer_of,
    "type": type_of,
    "all": lambda name, beside: "all",
}


def key_function(grouping: By, beside: Collection[str] = ()) -> Callable[[str, Tensor], Hashable | None]:
    """What tells a whole tensor's component.

    Args:
        grouping: one of ``WORDS``, None or a function.
        beside: names of the other tensors.

    Raises:
        TypeError, ValueError: neither one of ``WORDS``, nor None, nor a function.
    """
    if grouping is None:
        grouping = "parameter"
    if isinstance(grouping, str):
        if grouping not in WORDS:
            raise ValueError(f"components: expected {_GROUPINGS}, not {grouping!r}")
        word = WORD_KEYS[grouping]
        return lambda name, _: word(name, beside)
    if not callable(grouping):
        raise TypeError(f"components: expected {_GROUPINGS}, not {type_name(grouping)}")
    return grouping


_GROUPINGS = f"one of {', '.join(WORDS)}, a callable or a ComponentSpec"
