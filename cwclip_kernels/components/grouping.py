"""The words that group parameters into components: "parameter", "module", "layer", "type" and "all"."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from typing import TypeAlias

from torch import Tensor

from ..arguments import type_name

By: TypeAlias = "str | Callable[[str, Tensor], Hashable | None] | None"

# ``beside`` in what follows: the names of all parameters. They tell "parametrizations.a.0.b", of a parameter "a" that
# torch.nn.utils.parametrize has replaced, from the same name in a module that is merely called "parametrizations".


def module_of(name: str, beside: Collection[str] = ()) -> str:
    """The owning module: "encoder.layer.3.output.dense.bias" -> "encoder.layer.3.output.dense".

    A parametrized parameter still belongs to its module: "dense.parametrizations.weight.original0" -> "dense".
    """
    return ".".join(_parts(name, beside)[0])


def layer_of(name: str, beside: Collection[str] = ()) -> str:
    """Up to and including the last all-digits part: "encoder.layer.3.output.dense.bias" -> "encoder.layer.3".

    The module where there is none. Numbers of parametrizations don't count: "dense.parametrizations.weight.0.scale".
    """
    module, own, _ = _parts(name, beside)
    path = [*module, own]
    numbers = [i for i, part in enumerate(path) if part.isdecimal()]
    return ".".join(path[: numbers[-1] + 1] if numbers else module)


def type_of(name: str, beside: Collection[str] = ()) -> str:
    """All-digits parts become "*", but not those of parametrizations: "h.3.dense.bias" -> "h.*.dense.bias"."""
    module, _, now = _parts(name, beside)
    return ".".join("*" if part.isdecimal() else part for part in (*module, now))


def _parts(name: str, beside: Collection[str]) -> tuple[list[str], str, str]:
    """A parameter's module, and its name in that before and after it was parametrized.

    "h.dense.parametrizations.weight.original0" -> ["h", "dense"], "weight", "parametrizations.weight.original0"
    """
    parts = name.split(".")
    for i, part in enumerate(parts[:-2]):
        if part == "parametrizations" and _is_parametrization(parts, i, beside):
            return parts[:i], parts[i + 1], ".".join(parts[i:])
    return parts[:-1], parts[-1], parts[-1]


def _is_parametrization(parts: Sequence[str], at: int, beside: Collection[str]) -> bool:
    kind = parts[at + 2]
    if kind.startswith("original"):  # a parameter itself: "original", or "original0" and so on
        return len(parts) == at + 3 and (kind == "original" or kind.removeprefix("original").isdecimal())
    if not kind.isdecimal() or len(parts) == at + 3:  # what lies in a parametrization, which is a module
        return False
    original = ".".join([*parts[: at + 2], "original"])
    return at > 0 or original in beside or f"{original}0" in beside


_WORDS: dict[str, Callable[[str, Collection[str]], str]] = {
    "parameter": lambda name, beside: name,
    "module": module_of,
    "layer": layer_of,
    "type": type_of,
}
_EXPECTED = f"one of {', '.join(_WORDS)}, all, a callable or a ComponentSpec"


def check_grouping(by: object) -> None:
    """Raises TypeError or ValueError unless this is a word, a callable or None."""
    if isinstance(by, str) and by != "all" and by not in _WORDS:
        raise ValueError(f"components: expected {_EXPECTED}, not {by!r}")
    if not (by is None or isinstance(by, str) or callable(by)):
        raise TypeError(f"components: expected {_EXPECTED}, not {type_name(by)}")


def key_of(by: By, whole: str, name: str, tensor: Tensor, beside: Collection[str]) -> Hashable | None:
    """The key of a parameter's component: ``whole`` for "all", None if a callable leaves the parameter alone."""
    if callable(by):
        return by(name, tensor)
    return whole if by == "all" else _WORDS[by or "parameter"](name, beside)
