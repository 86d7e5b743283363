"""Parameters and a grouping to components: which tensors, or slices of them, are clipped together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator

from torch import Tensor

from ..arguments import type_name
from ..distributed.shards import is_flat, originals_of
from .grouping import key_of
from .membership import Components, Member, Slice
from .naming import with_prefix
from .parameters import NamedTensors
from .spec import ComponentSpec, Grouping


def resolve(parameters: NamedTensors, grouping: Grouping, *, is_all: bool = True) -> Components:
    """Groups tensors into components. A callable is called once for each tensor.

    Patterns of a spec may match nothing unless these are all parameters (``is_all``): other ranks may have others.

    Raises:
        TypeError: not a grouping, or a callable returned something unhashable.
        ValueError: an unknown word, a word that needs names where there are none, two keys that are written alike, or
            a spec that doesn't fit the parameters that require grad.
    """
    spec = grouping if isinstance(grouping, ComponentSpec) else ComponentSpec(grouping)
    for word in spec.words:
        if word in ("module", "layer", "type") and parameters.tensors and not parameters.named:
            raise ValueError(
                f"components={word!r} needs names: pass the module or module.named_parameters(), not bare tensors"
            )
    entries = list(_entries(parameters))
    names = [name for _, name, _, _ in entries]
    spec = spec.read_for(names, parameters.aliases, parameters.lost_prefix, is_all)
    beside = frozenset(names)
    tied: dict[str, list[str]] = {}
    for other, first in parameters.aliases:
        tied.setdefault(first, []).append(other)
    order: dict[tuple[Hashable, str], int] = {}
    members: list[Member] = []
    problems: list[tuple[int, str]] = []
    aliases: dict[str, str] = {}
    by_name: set[int] = set()  # components whose names lack the prefix that parameters' names have lost
    for position, name, tensor, flat in entries:
        by, whole = spec.rule_for(name)
        key = key_of(by, whole, name, tensor, beside)
        if key is None:
            continue
        if not isinstance(key, str):  # whose hash torch 2.11's Dynamo can't trace
            try:
                hash(key)
            except TypeError:
                raise TypeError(
                    f"components: the callable returned an unhashable {type_name(key)} for {name!r}; "
                    "return a string, number or tuple, or None to leave the parameter alone"
                ) from None
        try:
            slices = [(label, flat(place)) for label, place in spec.slices_of(name, tensor)]
        except ValueError as error:
            if tensor.requires_grad:
                raise
            problems.append((position, str(error)))
            slices = [("", flat(()))]
        is_by_name = parameters.lost_prefix and by != "all" and not callable(by)
        for label, place in slices:
            component = order.setdefault((key, label), len(order))
            members.append((position, component, place))
            if is_by_name:
                by_name.add(component)
        for other in tied.get(name, ()):
            by, whole = spec.rule_for(other)
            if not callable(by):
                other_key = key_of(by, whole, other, tensor, beside)
                aliases |= {f"{other_key}{label}": f"{key}{label}" for label, _ in slices}
    written = tuple(f"{key}{label}" for key, label in order)
    if len(set(written)) < len(written):
        twice = next(n for i, n in enumerate(written) if n in written[:i])
        raise ValueError(f"components: two different keys are both written {twice!r}; return distinct strings")
    for name in written:
        aliases.pop(name, None)
    return Components(
        written,
        parameters.names,
        tuple(members),
        tuple(problems),
        tuple(aliases.items()),
        tuple(with_prefix(n) if i in by_name else n for i, n in enumerate(written)) if parameters.lost_prefix else (),
    )


def _entries(parameters: NamedTensors) -> Iterator[tuple[int, str, Tensor, Callable[[Slice], Slice]]]:
    """Position, name and tensor of each parameter, and where a slice of it lies in the tensor at that position.

    A flat parameter yields all the parameters that lie in it.
    """
    for position, (name, tensor) in enumerate(zip(parameters.names, parameters.tensors, strict=True)):
        if is_flat(tensor):
            for original in originals_of(name, tensor, parameters.named):
                yield position, original.name, original.tensor, original.flat
        else:
            yield position, name, tensor, lambda place: place
