"""The ``parameters`` argument: every accepted form of it, read once."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from ..arguments import type_name, warn_caller
from .naming import Aliases, module_paths, without_wrappers, without_wrappers_of_all

Parameters: TypeAlias = nn.Module | Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]]


@dataclass(frozen=True)
class NamedTensors:
    """The parameters of a call: each tensor once, under its first name.

    Attributes:
        names: unique names, without the parts that wrappers add; positions "0", "1", ... where the caller gave none.
        tensors: the parameters, in order.
        named: False where the names are only positions.
        aliases: other names of tied parameters, each with the one that counts.
        prefix: what all names began with and lost, which may be a wrapper's or the model's own; "" if nothing.
    """

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    named: bool
    aliases: Aliases = ()
    prefix: str = ""


def named_tensors(parameters: Parameters) -> NamedTensors:
    """Reads every accepted form of ``parameters``.

    Names don't depend on what wraps a model or its modules (``torch.compile``, ``DistributedDataParallel``,
    ``FullyShardedDataParallel``, activation checkpointing): a Module's are told by the wrappers themselves, those of
    pairs by the names. Where two would become equal that way, all stay as they are. Pairs that all begin with
    ``module.`` lose it, and patterns may be written with it or without.

    Raises:
        TypeError: not a Module, a Tensor, or an iterable of Tensors or of (name, Tensor) pairs.
        ValueError: two tensors under one name, only plain tensors that can't have gradients, or a model whose sharded
            parameters aren't in place.
    """
    if isinstance(parameters, nn.Module):
        _check_resharded(parameters)
        return _of_module(parameters)
    return _from_items(as_items(parameters))


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
    pairs = list(model.named_parameters())  # a tied parameter comes once, under its first name
    paths = module_paths(model)
    own_path = {path: own for path, own, _ in paths}
    names = [_own_name(name, own_path) for name, _ in pairs]
    is_plain = len(set(names)) == len(names)
    if not is_plain:
        names = [name for name, _ in pairs]
    first = {id(tensor): name for name, (_, tensor) in zip(names, pairs, strict=True)}
    aliases: dict[str, str] = {}
    for path, own, module in paths:
        for leaf, parameter in module._parameters.items():
            other = f"{own if is_plain else path}{leaf}"
            name = first.get(id(parameter), other)
            if name != other:
                aliases.setdefault(other, name)
    return NamedTensors(tuple(names), tuple(p for _, p in pairs), True, tuple(aliases.items()))


def _own_name(name: str, own_path: Mapping[str, str]) -> str:
    module, dot, leaf = name.rpartition(".")
    own = own_path.get(module + dot)
    # A model may list its parameters under names of its own making, as FullyShardedDataParallel does now and then.
    return without_wrappers(name) if own is None else own + leaf


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
        warn_caller("parameters is an empty or already consumed generator: nothing will be clipped")
    return items


def _from_items(items: list[Any]) -> NamedTensors:
    named = bool(items) and not isinstance(items[0], Tensor)
    by_name: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for position, item in enumerate(items):
        if named and isinstance(item, tuple | list) and len(item) == 2:
            name, tensor = item
        else:
            name, tensor = str(position), item
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or named == (tensor is item):
            raise TypeError(f"parameters[{position}]: {_FORMS}, not {type_name(item)}")
        if id(tensor) in first:
            aliases.setdefault(name, first[id(tensor)])
            continue
        first[id(tensor)] = name
        if name in by_name:
            raise ValueError(f"parameters: two different tensors are named {name!r}")
        by_name[name] = tensor
    tensors = tuple(by_name.values())
    if tensors and all(_is_plain(t) for t in tensors):
        raise ValueError(
            f"parameters: none of the {len(tensors)} tensors is a Parameter, requires grad or has a .grad; "
            "pass the parameters (their .grad is clipped), not the gradients"
        )
    return _unwrapped(NamedTensors(tuple(by_name), tensors, named, tuple(aliases.items())))


def _unwrapped(given: NamedTensors) -> NamedTensors:
    """The same under their own names, as far as names tell."""
    if not given.named:
        return given
    names = [*given.names, *(other for other, _ in given.aliases)]
    unwrapped, prefix = without_wrappers_of_all(names)
    own = dict(zip(names, unwrapped, strict=True))
    plain = tuple(own[name] for name in given.names)
    if len(set(plain)) < len(plain):
        return given
    aliases = {own[other]: own[first] for other, first in given.aliases if own[other] != own[first]}
    return NamedTensors(plain, given.tensors, True, tuple(aliases.items()), prefix)


def _is_plain(tensor: Tensor) -> bool:
    # A non-leaf's .grad warns when read, and a non-leaf requires grad, so that is asked first.
    return not (isinstance(tensor, nn.Parameter) or tensor.requires_grad or tensor.grad is not None)
