"""Parameters and a grouping to components: which tensors, or slices of them, are clipped together."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator

from torch import Tensor

from ..arguments import type_name
from ..distributed.shards import Original, is_flat, originals_of
from .membership import Components, Member, Slice
from .parameters import NamedTensors
from .spec import ComponentSpec, Grouping


def resolve(parameters: NamedTensors, grouping: Grouping, *, is_all: bool = True) -> Components:
    """Groups tensors into components.

    Args:
        parameters: names and tensors.
        grouping: one of ``WORDS``, None for "parameter", a ``ComponentSpec``, or a callable that gets (name, tensor)
            and returns a hashable key, None to leave the tensor alone. It is called once for each tensor.
        is_all: whether these are all parameters; if other ranks have others, patterns may match those alone.

    Raises:
        TypeError: ``grouping`` is none of these, or returned something unhashable.
        ValueError: unknown word, a word that needs names where there are none, two keys that look alike, or a spec
            that doesn't fit the parameters that require grad.
    """
    spec = grouping if isinstance(grouping, ComponentSpec) else ComponentSpec(grouping)
    _check_names(parameters, spec.words)
    entries = list(_entries(parameters))
    names = [name for _, name, _, _ in entries]
    beside = frozenset(names)
    if is_all:
        spec.check_patterns(names, parameters.aliases, parameters.prefix)
    if parameters.prefix:
        spec = spec.read_for(names, parameters.prefix)
    order: dict[Hashable, int] = {}
    written: list[str] = []
    members: list[Member] = []
    problems: list[tuple[int, str]] = []
    tied: dict[str, list[str]] = {}
    for other, first in parameters.aliases:
        tied.setdefault(first, []).append(other)
    aliases: dict[str, str] = {}
    spellings: dict[str, str] = {}

    def component_of(key: Hashable, name: str) -> int:
        component = order.setdefault(key, len(order))
        if component == len(written):
            written.append(name)
        return component

    for position, name, tensor, original in entries:
        key = spec.key_of(name, tensor, beside)
        if key is None:
            continue
        try:
            hash(key)
        except TypeError:
            raise TypeError(
                f"components: the callable returned an unhashable {type_name(key)} for {name!r}; "
                "return a string, number or tuple, or None to leave the parameter alone"
            ) from None
        try:
            parts = _parts(spec, name, tensor, original)
        except ValueError as error:
            if tensor.requires_grad:
                raise
            problems.append((position, str(error)))
            parts = [("", () if original is None else original.flat(()))]
        for label, box in parts:
            members.append((position, component_of((key, label), f"{key}{label}"), box))
        for other in tied.get(name, ()):
            other_key = spec.key_by_name(other, tensor, beside)
            if other_key is not None:
                aliases |= {f"{other_key}{label}": f"{key}{label}" for label, _ in parts}
        if parameters.prefix:
            prefixed = spec.prefixed_key(name, key, parameters.prefix)
            if prefixed is not None:
                spellings |= {f"{prefixed}{label}": f"{key}{label}" for label, _ in parts}
    if len(set(written)) < len(written):
        twice = next(n for i, n in enumerate(written) if n in written[:i])
        raise ValueError(f"components: two different keys are both written {twice!r}; return distinct strings")
    for name in written:
        aliases.pop(name, None)
    return Components(
        tuple(written),
        parameters.names,
        tuple(members),
        tuple(problems),
        tuple(aliases.items()),
        tuple(spellings.items()),
    )


def _parts(spec: ComponentSpec, name: str, tensor: Tensor, original: Original | None) -> list[tuple[str, Slice]]:
    """What a parameter is cut into, with what is appended to its component's name; the whole of it if it isn't."""
    parts = spec.slices_of(name, tensor) or [("", ())]
    return parts if original is None else [(label, original.flat(box)) for label, box in parts]


def _entries(parameters: NamedTensors) -> Iterator[tuple[int, str, Tensor, Original | None]]:
    """Position, name and tensor of each parameter; of a flat one all that lie in it, each with its place."""
    for position, (name, tensor) in enumerate(zip(parameters.names, parameters.tensors, strict=True)):
        if not is_flat(tensor):
            yield position, name, tensor, None
            continue
        for original in originals_of(name, tensor, parameters.named):
            yield position, original.name, original.tensor, original


def _check_names(parameters: NamedTensors, groupings: Iterable[object]) -> None:
    for grouping in groupings:
        if grouping in ("module", "layer", "type") and not parameters.named and parameters.tensors:
            raise ValueError(
                f"components={grouping!r} needs names: pass the module or module.named_parameters(), not bare tensors"
            )
