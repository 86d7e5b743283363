"""The ``parameters`` argument: every accepted form of it, read once."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from ..arguments import type_name, warn_caller
from .naming import PREFIX, Aliases, all_names, without_wrappers

Parameters: TypeAlias = nn.Module | Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]]


@dataclass(frozen=True)
class NamedTensors:
    """The parameters of a call: each tensor once, under its first name.

    Attributes:
        names: unique names, without the parts that wrappers add; positions "0", "1", ... where the caller gave none.
        tensors: the parameters, in order.
        named: False where the names are only positions.
        aliases: other names of tied parameters, each with the one that counts.
        lost_prefix: whether all names began with ``naming.PREFIX``, a wrapper's or the model's own, and lost it.
    """

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    named: bool
    aliases: Aliases
    lost_prefix: bool = False


def named_tensors(parameters: Parameters) -> NamedTensors:
    """Reads every accepted form of ``parameters``.

    Names don't depend on what wraps a model or its modules (``torch.compile``, ``DistributedDataParallel``,
    ``FullyShardedDataParallel``, activation checkpointing). A Module's wrappers are known by their classes, those of
    pairs by the names. Where two names would become equal, all stay as they are. Pairs that all begin with
    ``module.`` lose it, and patterns may be written with it or without.

    Raises:
        TypeError: not a Module, a Tensor, or an iterable of Tensors or of (name, Tensor) pairs.
        ValueError: two tensors under one name, only plain tensors that can't have gradients, or a model whose sharded
            parameters aren't in place.
    """
    if isinstance(parameters, nn.Module):
        _check_resharded(parameters)
        return _of_module(parameters)
    return _of_items(as_items(parameters))


def _check_resharded(model: nn.Module) -> None:
    """Raises if ``fully_shard`` has gathered parameters of the model, and not yet put the shards back in place."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if kind is None:
        return
    for name, module in model.named_modules():
        if isinstance(module, kind) and any(p.requires_grad for p in module.parameters()):
            state: Any = module._get_fsdp_state()
            for group in getattr(state, "_fsdp_param_groups", [getattr(state, "_fsdp_param_group", None)]):
                if not getattr(group, "is_sharded", True):
                    raise ValueError(
                        f"parameters: module {name!r} still has the whole parameters that fully_shard gathered for a "
                        "forward pass, not the sharded ones that gradients and optimizers belong to; call reshard() "
                        "on it first, or pass the parameters before the forward pass"
                    )


def _of_module(model: nn.Module) -> NamedTensors:
    everywhere = all_names(model)
    own = {given: own for given, own, _ in everywhere}
    # A model may list its parameters under names of its own making, as FullyShardedDataParallel does now and then.
    listed = [(name, own.get(name) or without_wrappers(name), p) for name, p in model.named_parameters()]
    known = {id(p) for _, _, p in listed}
    return _each_once([*listed, *(entry for entry in everywhere if id(entry[2]) in known)], named=True)


_FORMS = "expected an nn.Module, a Tensor, or an iterable of Tensors or of (name, Tensor) pairs"


def as_items(parameters: Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]]) -> list[Any]:
    """The elements of ``parameters``, unchecked; TypeError if it can't hold any. A generator is used up by this."""
    if isinstance(parameters, list):
        return parameters
    if isinstance(parameters, Tensor):
        return [parameters]
    if isinstance(parameters, str | bytes | Mapping) or not isinstance(parameters, Iterable):
        hint = "; pass parameters.items()" if isinstance(parameters, Mapping) else ""
        raise TypeError(f"parameters: {_FORMS}, not {type_name(parameters)}{hint}")
    items = list(parameters)
    if not items and isinstance(parameters, Iterator):
        warn_caller("parameters is an empty or already consumed generator: nothing will be clipped")
    return items


def _of_items(items: list[Any]) -> NamedTensors:
    named = len(items) > 0 and not isinstance(items[0], Tensor)  # torch 2.11's Dynamo can't trace bool(items)
    given: list[str] = []
    tensors: list[Tensor] = []
    for position, item in enumerate(items):
        is_pair = named and isinstance(item, tuple | list) and len(item) == 2
        name, tensor = item if is_pair else (str(position), item)
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or is_pair != named:
            raise TypeError(f"parameters[{position}]: {_FORMS}, not {type_name(item)}")
        given.append(name)
        tensors.append(tensor)
    if tensors and all(map(_is_plain, tensors)):
        raise ValueError(
            f"parameters: none of the {len(tensors)} tensors is a Parameter, requires grad or has a .grad; "
            "pass the parameters, whose .grad is clipped, or the gradients to clip_gradients_"
        )
    own, lost_prefix = _unwrapped(given) if named else (given, False)
    return _each_once(list(zip(given, own, tensors, strict=True)), named, lost_prefix)


def own_names(given: list[str]) -> tuple[list[str], bool]:
    """Names without the parts that wrappers add, and whether all have lost ``PREFIX``; as they are if some clash."""
    own, lost_prefix = _unwrapped(given)
    return (own, lost_prefix) if len(set(own)) == len(own) else (given, False)


def _unwrapped(given: list[str]) -> tuple[list[str], bool]:
    own = list(map(without_wrappers, given))
    lost_prefix = len(own) > 0 and all(name.startswith(PREFIX) for name in own)
    return [name.removeprefix(PREFIX) for name in own] if lost_prefix else own, lost_prefix


def _is_plain(tensor: Tensor) -> bool:
    # A non-leaf's .grad warns when read, and a non-leaf requires grad, so that is asked first.
    return not (isinstance(tensor, nn.Parameter) or tensor.requires_grad or tensor.grad is not None)


def _each_once(entries: Sequence[tuple[str, str, Tensor]], named: bool, lost_prefix: bool = False) -> NamedTensors:
    """Of (given name, own name, tensor) each tensor once, under its first own name, or given name if those clash."""
    first: dict[int, int] = {}
    for i, (_, _, tensor) in enumerate(entries):
        first.setdefault(id(tensor), i)
    positions = list(first.values())
    is_unique = len({entries[i][1] for i in positions}) == len(positions)
    written = [own if is_unique else given for given, own, _ in entries]
    names = tuple(written[i] for i in positions)
    if not is_unique and len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"parameters: two different tensors are named {twice!r}")
    firsts = [written[first[id(tensor)]] for _, _, tensor in entries]
    aliases = {other: name for other, name in zip(written, firsts, strict=True) if other != name}
    tensors = tuple(entries[i][2] for i in positions)
    return NamedTensors(names, tensors, named, tuple(aliases.items()), is_unique and lost_prefix)
