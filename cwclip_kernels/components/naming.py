"""Names of parameters: the model's own, whatever wraps the model or its modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from torch import nn

Aliases: TypeAlias = tuple[tuple[str, str], ...]  # (other name of a tied parameter, the name that counts)

# The attributes under which a wrapper holds what it wraps, by the wrapper's class name: so nothing is imported, and
# classes of apex and Megatron with the names of torch's are covered.
_HELD_AS = {
    "OptimizedModule": ("_orig_mod",),  # torch.compile
    "DistributedDataParallel": ("module",),
    "DataParallel": ("module",),
    "FullyShardedDataParallel": ("_fsdp_wrapped_module",),
    "ActivationWrapper": ("_checkpoint_wrapped_module",),  # checkpoint_wrapper, offload_wrapper
    "_FabricModule": ("_forward_module", "_original_module"),
}
_ATTRIBUTES = {attribute for held in _HELD_AS.values() for attribute in held}
_UNMISTAKABLE = _ATTRIBUTES - {"module"}

# What the names of pairs may all begin with: a wrapper's, or the model's own if its only child has that name. It is
# removed, and patterns may be written either way.
PREFIX = "module."


def all_names(model: nn.Module) -> list[tuple[str, str, nn.Parameter]]:
    """(Name as torch spells it, name without wrappers, parameter) for every place where a model holds a parameter.

    A module that is used in several places comes with each of its paths. Below its second path no module is visited
    twice: there could be exponentially many paths.
    """
    found: list[tuple[str, str, nn.Parameter]] = []

    def visit(module: nn.Module, path: str, own: str, seen: set[nn.Module]) -> None:
        seen.add(module)
        above.add(module)
        found.extend((path + leaf, own + leaf, p) for leaf, p in module._parameters.items() if p is not None)
        for name, child in module._modules.items():
            if child is None or child in above or (child in seen and seen is not first_paths):
                continue
            inner = own if _is_held_by_wrapper(module, name) else f"{own}{name}."
            visit(child, f"{path}{name}.", inner, set() if child in seen else seen)
        above.remove(module)

    above: set[nn.Module] = set()
    first_paths: set[nn.Module] = set()
    visit(model, "", "", first_paths)
    return found


def _is_held_by_wrapper(module: nn.Module, attribute: str) -> bool:
    return attribute in _ATTRIBUTES and any(
        attribute in _HELD_AS.get(kind.__name__, ()) for kind in type(module).__mro__
    )


def without_wrappers(name: str) -> str:
    """A parameter's name without the parts that only wrappers add: ``_orig_mod.`` and the like."""
    parts = name.split(".")
    return ".".join([part for part in parts[:-1] if part not in _UNMISTAKABLE] + parts[-1:])


def with_prefix(name: str) -> str:
    """A parameter's or component's name with ``PREFIX``; the outermost module's, which is "", becomes "module"."""
    return (PREFIX if name and not name.startswith("[") else PREFIX.removesuffix(".")) + name


def are_same_names(some: Sequence[str], others: Sequence[str]) -> bool:
    """Whether two lists of component names are the same, but for a ``PREFIX`` on all names of one of them."""
    some, others = list(some), list(others)
    return some == others or list(map(with_prefix, some)) == others or some == list(map(with_prefix, others))
