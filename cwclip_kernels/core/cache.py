"""The function form's cache: sessions for parameters that have been seen before.

Resolving names costs milliseconds and a plan more. The keys are made of ids, which another tensor may have when the
first is gone. But a session depends on names and on what the parameters look like, not on which they are: so that is
compared at every call, and no weak reference to a tensor is needed. (A tensor that has one can't be swapped, which
moving a model may take.)
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..backends.native import form_of
from ..components.parameters import Parameters, as_items, named_tensors
from ..components.spec import ComponentSpec, Grouping
from ..distributed.groups import as_group, check_parts
from ..distributed.local import local_value
from .session import ClipSession


@dataclass(frozen=True)
class _Entry:
    """A session for parameters seen before. It keeps none of them alive.

    Attributes:
        session: components and plans.
        form: what the parameters looked like.
        positions: of each parameter's first occurrence in the caller's list; None if each occurs once.
        module: where the tensors came from, if from a module; with it the entry goes.
        storage: where the first tensor's data lies, if not from a module.
    """

    session: ClipSession
    form: object
    positions: tuple[int, ...] | None
    module: weakref.ref[nn.Module] | None
    storage: StorageWeakRef | None

    def is_over(self) -> bool:
        """Whether the parameters' memory is gone, so that the entry is hardly of use any more."""
        return self.storage is not None and bool(self.storage.expired())  # type: ignore[no-untyped-call]

    def is_for(self, tensors: Sequence[Tensor], form: object) -> bool:
        """Whether it serves these parameters, which have the ids of those that it was made for."""
        if self.form != form or any(tensors[i].requires_grad for i, _ in self.session.components.problems):
            return False
        if self.session.spread is None or self.storage is None:
            return True
        # Ranks make their sessions together, and ids are reused on one rank and not on another, by chance.
        now = _storage_of(tensors)
        return now is not None and not self.is_over() and now.cdata == self.storage.cdata


_KEPT = 1024  # enough for a program that calls once for each parameter
_entries: OrderedDict[Hashable, _Entry] = OrderedDict()
_lock = threading.Lock()
_next_look = 8  # for entries that are over, in so many insertions


def session_for(
    parameters: Parameters,
    grouping: Grouping,
    settings: Callable[[], str],
    process_group: object = None,
    pp_mesh: object = None,
) -> tuple[Sequence[Tensor], ClipSession]:
    """The tensors of ``parameters``, each once, and their session.

    ``settings`` tells what all ranks have to choose alike; it is called where a session is made, not at every call.
    """
    source = parameters if isinstance(parameters, nn.Module) else as_items(parameters)
    key, given = _identify(source, grouping)
    form = entry = None
    if key is not None:
        # Not by the ids of meshes: mesh["pp"] is another object each time, and an id may be that of a later one.
        key = key, as_group(process_group, "process_group"), as_group(pp_mesh, "pp_mesh")
        with _lock:
            entry = _entries.get(key)
            if entry is not None:
                _entries.move_to_end(key)
        form = form_of(given)
    if entry is not None:
        tensors = given if entry.positions is None else [given[i] for i in entry.positions]
        if entry.is_for(tensors, form):
            return tensors, entry.session
    check_parts(source, process_group)
    named = named_tensors(source)
    session = ClipSession.of(named, grouping, process_group, pp_mesh, settings())
    if key is not None:
        module = storage = None
        if isinstance(source, nn.Module):
            module = weakref.ref(source, lambda _: _entries.pop(key, None))
        else:
            storage = _storage_of(named.tensors)
        _remember(key, _Entry(session, form, _positions(given), module, storage))
    return named.tensors, session


def _storage_of(tensors: Sequence[Tensor]) -> StorageWeakRef | None:
    if not tensors:
        return None
    first: Any = local_value(tensors[0])
    if type(first) not in (Tensor, nn.Parameter) or first.layout != torch.strided or first.is_nested:
        return None
    return StorageWeakRef(first.untyped_storage())  # type: ignore[no-untyped-call]


def _positions(given: Sequence[Tensor]) -> tuple[int, ...] | None:
    first: dict[int, int] = {}
    for position, tensor in enumerate(given):
        first.setdefault(id(tensor), position)
    return None if len(first) == len(given) else tuple(first.values())


def _remember(key: Hashable, entry: _Entry) -> None:
    global _next_look
    with _lock:
        _entries[key] = entry
        _next_look -= 1
        if _next_look <= 0:  # rarely, so that it costs each entry little however many there are
            for over in [known for known, other in _entries.items() if other.is_over()]:
                del _entries[over]
            _next_look = max(8, len(_entries) // 2)
        while len(_entries) > _KEPT:
            _entries.popitem(last=False)


def _identify(source: nn.Module | list[Any], grouping: Grouping) -> tuple[Hashable, list[Tensor]]:
    """A key that no other living set of parameters has, and its tensors, repetitions included.

    The key is None for what must be resolved at every call: a grouping function, which may answer differently, and
    what isn't a set of parameters, where reading its names raises.
    """
    is_static = isinstance(grouping, ComponentSpec) and grouping.is_static
    if not (grouping is None or isinstance(grouping, str) or is_static):
        return None, []
    if isinstance(source, nn.Module):
        names: list[str] = []
        given: list[Tensor] = []
        _walk(source, names, given, set())
        return (grouping, id(source), tuple(names), tuple(map(id, given))), given
    if not source or isinstance(source[0], Tensor):
        return (grouping, tuple(map(id, source))), source
    try:
        item_names, tensors = zip(*source, strict=True)
        key = grouping, item_names, tuple(map(id, tensors))
        hash(key)
    except (TypeError, ValueError):
        return None, []
    return key, list(tensors)


def _walk(module: nn.Module, names: list[str], tensors: list[Tensor], seen: set[int]) -> None:
    # named_parameters() puts every full name together anew: three times the cost of the walk.
    seen.add(id(module))
    for name, parameter in module._parameters.items():
        if parameter is not None:
            names.append(name)
            tensors.append(parameter)
    for name, child in module._modules.items():
        names.append(name)
        if child is not None and id(child) not in seen:
            _walk(child, names, tensors, seen)
    names.append("")  # where this module ends
