"""Names to components: which tensors are clipped together. Pure Python, no device is touched."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor, nn

if TYPE_CHECKING:
    from .spec import ComponentSpec

Parameters: TypeAlias = nn.Module | Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]]
Grouping: TypeAlias = "str | Callable[[str, Tensor], Hashable | None] | ComponentSpec | None"
Box: TypeAlias = tuple[tuple[int, int, int], ...]  # a slice of a tensor: (dim, start, size) of each dim that is cut

WORDS = ("parameter", "module", "layer", "type", "all")

LEFT_ALONE = -1  # component index of a tensor that a callable answered None for
CUT = -2  # of one whose slices belong to components of their own


@dataclass(frozen=True)
class NamedTensors:
    """The parameters of a call: each tensor once, under its first name.

    Attributes:
        names: unique names; positions "0", "1", ... where the caller gave none.
        tensors: the parameters, in order.
        named: False where the names are only positions.
    """

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    named: bool


@dataclass(frozen=True)
class Components:
    """K components and who belongs to them.

    Attributes:
        names: name of each component, in order of first appearance; K = len(names).
        index: component of each tensor, ``LEFT_ALONE`` for none, ``CUT`` where ``slices`` say more.
        tensor_names: name of each tensor, for error messages.
        slices: position among the tensors, component and place of every slice of those that are cut, in order.
        problems: position of a frozen tensor, and why it could not be clipped; an error as soon as it has a gradient.
    """

    names: tuple[str, ...]
    index: tuple[int, ...]
    tensor_names: tuple[str, ...]
    slices: tuple[tuple[int, int, Box], ...] = ()
    problems: tuple[tuple[int, str], ...] = ()

    def only(self, positions: Sequence[int]) -> Components:
        """The same components, and of the tensors these alone."""
        place = {position: i for i, position in enumerate(positions)}
        return Components(
            self.names,
            tuple(self.index[i] for i in positions),
            tuple(self.tensor_names[i] for i in positions),
            tuple((place[i], component, box) for i, component, box in self.slices if i in place),
            tuple((place[i], problem) for i, problem in self.problems if i in place),
        )

    def members(self) -> Iterator[tuple[int, int, Box]]:
        """Position, component and place of every tensor or slice that belongs to a component, in order."""
        slices = iter(self.slices)
        upcoming = next(slices, None)
        for position, component in enumerate(self.index):
            if component >= 0:
                yield position, component, ()
            while upcoming is not None and upcoming[0] == position:
                yield upcoming
                upcoming = next(slices, None)


def named_tensors(parameters: Parameters) -> NamedTensors:
    """Reads every accepted form of ``parameters``.

    Raises:
        TypeError: not a Module, a Tensor, or an iterable of Tensors or of (name, Tensor) pairs.
        ValueError: two tensors under one name, only plain tensors that can't have gradients, or a model whose sharded
            parameters aren't in place.
    """
    if isinstance(parameters, nn.Module):
        _check_resharded(parameters)
        pairs = list(parameters.named_parameters())  # a tied parameter comes once, under its first name
        names = tuple(without_wrappers(n) for n, _ in pairs)
        return NamedTensors(names, tuple(p for _, p in pairs), named=True)
    return _from_items(as_items(parameters))


def _check_resharded(model: nn.Module) -> None:
    """Raises if ``fully_shard`` has gathered parameters of the model, and not yet put the shards back in place."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if kind is None:
        return
    for name, module in model.named_modules():
        if isinstance(module, kind):
            state: Any = module._get_fsdp_state()
            for group in getattr(state, "_fsdp_param_groups", [getattr(state, "_fsdp_param_group", None)]):
                if not getattr(group, "is_sharded", True):
                    raise ValueError(
                        f"parameters: module {name!r} still has the whole parameters that fully_shard gathered for a "
                        "forward pass, not the sharded ones that gradients and optimizers belong to; call reshard() "
                        "on it first, or pass the parameters before the forward pass"
                    )


def without_wrappers(name: str) -> str:
    """A parameter's name in the model that ``FullyShardedDataParallel`` wraps, as a whole or module by module."""
    return name.replace("_fsdp_wrapped_module.", "")


_FORMS = "expected an nn.Module, a Tensor, or an iterable of Tensors or of (name, Tensor) pairs"


def as_items(parameters: Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]]) -> list[Any]:
    """The elements of ``parameters``, not yet looked at; a generator is used up by it.

    Raises:
        TypeError: not a Tensor and not an iterable that could hold parameters.
    """
    if isinstance(parameters, list):
        return parameters
    if isinstance(parameters, Tensor):
        return [parameters]
    if isinstance(parameters, str | bytes | Mapping) or not isinstance(parameters, Iterable):
        hint = "; pass parameters.items()" if isinstance(parameters, Mapping) else ""
        raise TypeError(f"parameters: {_FORMS}, not {type_name(parameters)}{hint}")
    items = list(parameters)
    if not items and isinstance(parameters, Iterator):
        warnings.warn(
            "parameters is an empty or already consumed generator: nothing will be clipped",
            UserWarning,
            stacklevel=4,
        )
    return items


def _from_items(items: list[Any]) -> NamedTensors:
    named = bool(items) and not isinstance(items[0], Tensor)
    by_name: dict[str, Tensor] = {}
    seen: set[int] = set()
    for position, item in enumerate(items):
        if named and isinstance(item, tuple | list) and len(item) == 2:
            name, tensor = item
        else:
            name, tensor = str(position), item
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or named == (tensor is item):
            raise TypeError(f"parameters[{position}]: {_FORMS}, not {type_name(item)}")
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if name in by_name:
            raise ValueError(f"parameters: two different tensors are named {name!r}")
        by_name[name] = tensor
    tensors = tuple(by_name.values())
    if tensors and all(_is_plain(t) for t in tensors):
        raise ValueError(
            f"parameters: none of the {len(tensors)} tensors is a Parameter, requires grad or has a .grad; "
            "pass the parameters (their .grad is clipped), not the gradients"
        )
    return NamedTensors(tuple(by_name), tensors, named)


def _is_plain(tensor: Tensor) -> bool:
    # A non-leaf's .grad warns when read, and a non-leaf requires grad, so that is asked first.
    return not (isinstance(tensor, nn.Parameter) or tensor.requires_grad or tensor.grad is not None)


def key_function(grouping: Grouping) -> Callable[[str, Tensor], Hashable | None]:
    """What tells a whole tensor's component.

    Raises:
        TypeError, ValueError: neither one of ``WORDS``, nor None, nor a function.
    """
    if grouping is None:
        grouping = "parameter"
    if isinstance(grouping, str):
        if grouping not in WORDS:
            raise ValueError(f"components: expected {_GROUPINGS}, not {grouping!r}")
        word = _WORD_KEYS[grouping]
        return lambda name, _: word(name)
    if not callable(grouping):
        raise TypeError(f"components: expected {_GROUPINGS}, not {type_name(grouping)}")
    return grouping


_GROUPINGS = f"one of {', '.join(WORDS)}, a callable or a ComponentSpec"


def module_of(name: str) -> str:
    """The owning module: "encoder.layer.3.output.dense.bias" -> "encoder.layer.3.output.dense"."""
    return name.rpartition(".")[0]


def layer_of(name: str) -> str:
    """Up to and including the last all-digits part: "encoder.layer.3.output.dense.bias" -> "encoder.layer.3"."""
    parts = name.split(".")
    for last in range(len(parts), 0, -1):
        if parts[last - 1].isdecimal():
            return ".".join(parts[:last])
    return module_of(name)


def type_of(name: str) -> str:
    """All-digits parts become "*": "encoder.layer.3.output.dense.bias" -> "encoder.layer.*.output.dense.bias"."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


_WORD_KEYS: dict[str, Callable[[str], str]] = {
    "parameter": lambda name: name,
    "module": module_of,
    "layer": layer_of,
    "type": type_of,
    "all": lambda name: "all",
}


def match_patterns(
    names: tuple[str, ...],
    values: Mapping[str, float],
    default: float,
    everywhere: tuple[str, ...] | None = None,
) -> list[float]:
    """The value of the first pattern, in the mapping's order, that matches each name.

    Args:
        names: component names.
        values: ``fnmatch`` patterns (case-sensitive), or exact names, to values.
        default: value of a name that no pattern matches.
        everywhere: names that a pattern may match instead, on other ranks.

    Raises:
        ValueError: a pattern matches no name at all.
    """
    everywhere = everywhere or names
    found = [default] * len(names)
    free = set(range(len(names)))
    for pattern, value in values.items():
        hits = [i for i, name in enumerate(names) if matches(name, pattern)]
        if not hits and not any(matches(name, pattern) for name in everywhere):
            raise ValueError(
                f"max_norm: the pattern {pattern!r} matches none of the {len(everywhere)} "
                f"components{some_of(everywhere)}"
            )
        for i in free.intersection(hits):
            found[i] = value
        free.difference_update(hits)
    return found


def matches(name: str, pattern: str) -> bool:
    """Whether it is that name, or an ``fnmatch`` pattern of it (case-sensitive; ``*``, ``?``, ``[ab]``)."""
    # A slice's name holds brackets, which fnmatch reads as a character class: they may also mean themselves.
    return name == pattern or fnmatchcase(name, pattern) or fnmatchcase(name, pattern.replace("[", "[[]"))


def some_of(names: Sequence[str]) -> str:
    """The first few names, in brackets, for an error message."""
    shown = ", ".join(map(repr, names[:3]))
    return f" ({shown}{', ...' if len(names) > 3 else ''})" if names else ""


def type_name(value: object) -> str:
    """A value's type, as error messages call it."""
    return type(value).__qualname__
