"""The function form's cache: sessions for parameters that have been seen before.

Resolving names costs milliseconds and a plan more. The keys are made of ids, which another tensor may have when the
first is gone. But a session depends on names and on what parameters look like, not on which they are: so that is
compared at every call, and no weak references to tensors are needed. (A tensor with one can't be swapped, as moving a
model may do.)
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..backends.native import form_of
from ..components.parameters import NamedTensors, Parameters, as_items, named_tensors
from ..components.spec import ComponentSpec, Grouping
from ..distributed.groups import as_group
from ..distributed.local import storage_of
from ..distributed.units import Units, known_group
from .identity import is_alive, is_same_memory
from .session import ClipSession


@dataclass(frozen=True)
class _Entry:
    """A session for parameters seen before. It keeps none of them alive."""

    session: ClipSession
    form: object  # what the parameters looked like
    positions: list[int]  # of the first occurrence of each parameter in the caller's list
    module: weakref.ref[nn.Module] | None  # whose parameters they are; removes the entry when it dies
    storage: StorageWeakRef | None  # of the first parameter, if no module was given

    def is_dead(self) -> bool:
        """Whether the parameters' memory is gone, so that the entry is hardly of use."""
        return self.storage is not None and not is_alive(self.storage)

    def is_for(self, tensors: Sequence[Tensor], form: object) -> bool:
        """Whether it serves these parameters, which have the ids of those that it was made for."""
        if self.form != form or any(tensors[i].requires_grad for i, _ in self.session.components.problems):
            return False
        if self.session.reductions is None or self.storage is None:
            return True
        # Ranks make their sessions together, but an id may be reused on one rank and not on another.
        return is_same_memory(self.storage, storage_of(tensors[0]) if tensors else None)


_KEPT = 1024  # enough for a program that calls once for each parameter
_entries: OrderedDict[Hashable, _Entry] = OrderedDict()
_lock = threading.Lock()
_until_purge = 8  # insertions until dead entries are removed


def session_for(
    parameters: Parameters,
    grouping: Grouping,
    settings: Callable[[], str],
    process_group: object = None,
    pp_mesh: object = None,
) -> tuple[Sequence[Tensor], ClipSession]:
    """The tensors of ``parameters``, each once, and their session.

    ``settings`` describes what all ranks must have alike; called where a session is made, not at every call.
    """
    source = parameters if isinstance(parameters, nn.Module) else as_items(parameters)
    key, given = _identify(source, grouping)
    form = None
    if key is not None:
        # Not by the ids of meshes: mesh["pp"] is another object each time, and an id may be that of a later one.
        ranks = process_group if isinstance(process_group, Units) else as_group(process_group, "process_group")
        key = key, ranks, as_group(pp_mesh, "pp_mesh")
        form = form_of(given)
        entry = _recalled(key)
        if entry is not None:
            is_all = len(entry.positions) == len(given)
            tensors = given if is_all else [given[i] for i in entry.positions]
            if entry.is_for(tensors, form):
                return tensors, entry.session
    named = named_tensors(source)
    session = ClipSession.of(named, grouping, known_group(source, process_group), pp_mesh, settings())
    if key is not None:
        first = {id(tensor): i for i, tensor in reversed(list(enumerate(given)))}
        module = storage = None
        if isinstance(source, nn.Module):
            module = weakref.ref(source, lambda _: _entries.pop(key, None))
        else:
            storage = storage_of(named.tensors[0]) if named.tensors else None
        _remember(key, _Entry(session, form, sorted(first.values()), module, storage))
    return named.tensors, session


def session_for_gradients(
    named: NamedTensors, grouping: Grouping, settings: Callable[[], str], leaves: Callable[[], Sequence[Tensor]]
) -> ClipSession:
    """The session of gradients without parameters, by their names and looks; ``leaves`` makes it parameters."""
    form = form_of(list(named.tensors))
    key: Hashable = None
    if _is_static(grouping):
        # With the looks, so that two lists without names don't take each other's place.
        looks = form if isinstance(form, bytes) else None
        key = "gradients", grouping, named.names, named.named, named.lost_prefix, looks
        entry = _recalled(key)
        if entry is not None and entry.form == form:
            return entry.session
    session = ClipSession.of(replace(named, tensors=tuple(leaves())), grouping, None, None, settings())
    if key is not None:
        _remember(key, _Entry(session, form, list(range(len(named.tensors))), None, None))
    return session


def _recalled(key: Hashable) -> _Entry | None:
    with _lock:
        entry = _entries.get(key)
        if entry is not None:
            _entries.move_to_end(key)
        return entry


def _remember(key: Hashable, entry: _Entry) -> None:
    global _until_purge
    with _lock:
        _entries[key] = entry
        _until_purge -= 1
        if _until_purge <= 0:  # rarely, so that it costs each entry little however many there are
            for dead in [known for known, other in _entries.items() if other.is_dead()]:
                del _entries[dead]
            _until_purge = max(8, len(_entries) // 2)
        while len(_entries) > _KEPT:
            _entries.popitem(last=False)


def _identify(source: nn.Module | list[Any], grouping: Grouping) -> tuple[Hashable, list[Tensor]]:
    """A key that no other living set of parameters has, and its tensors, repetitions included.

    None where names must be resolved at every call: for a grouping function, which may answer differently, and for
    what isn't a set of parameters, which then raises.
    """
    if not _is_static(grouping):
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


def _is_static(grouping: Grouping) -> bool:
    """Whether names and shapes alone decide."""
    return (
        grouping is None or isinstance(grouping, str) or (isinstance(grouping, ComponentSpec) and grouping.is_static)
    )


def _walk(module: nn.Module, names: list[str], tensors: list[Tensor], seen: set[int]) -> None:
    # named_parameters() composes every full name: three times the cost of this walk.
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
