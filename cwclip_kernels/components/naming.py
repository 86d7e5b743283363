"""Names of parameters: the model's own, whatever wraps the model or its modules."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

Aliases = tuple[tuple[str, str], ...]  # of tied parameters: another name, and the first one, which counts

# Under which attributes a wrapper holds what it wraps. Classes go by name: nothing is imported for them, and those of
# apex and Megatron that are called as torch's are known too.
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


def _is_held_by_wrapper(module: nn.Module, attribute: str) -> bool:
    if attribute not in _ATTRIBUTES:
        return False
    return any(attribute in _HELD_AS.get(kind.__name__, ()) for kind in type(module).__mro__)


def module_paths(model: nn.Module) -> list[tuple[str, str, nn.Module]]:
    """Every module of a model with its path, as torch spells it and without wrappers. Paths end in a dot.

    A module that is used in several places comes with each of its paths. Below its second path no module is visited
    twice: there could be exponentially many paths.
    """
    found: list[tuple[str, str, nn.Module]] = []

    def visit(module: nn.Module, path: str, own: str, seen: set[nn.Module]) -> None:
        seen.add(module)
        above.add(module)
        found.append((path, own, module))
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


def without_wrappers(name: str) -> str:
    """A parameter's name less the parts that no one but a wrapper gives: ``_orig_mod.`` and the like."""
    parts = name.split(".")
    return ".".join([part for part in parts[:-1] if part not in _UNMISTAKABLE] + parts[-1:])


PREFIX = "module."


def without_wrappers_of_all(names: Sequence[str]) -> tuple[list[str], str]:
    """Own names, where only names are known, and what they lost: ``PREFIX`` if every name began with it, or "".

    It is a wrapper's then, or that of a model with one child of that name; patterns may be written either way.
    """
    own = [without_wrappers(name) for name in names]
    if own and all(name.startswith(PREFIX) for name in own):
        return [name.removeprefix(PREFIX) for name in own], PREFIX
    return own, ""


def are_same_names(some: Sequence[str], others: Sequence[str]) -> bool:
    """Whether two lists of component names differ at most by a leading ``PREFIX`` on all names of one of them."""
    return (
        tuple(some) == tuple(others)
        or _without_prefix(some) == tuple(others)
        or _without_prefix(others) == tuple(some)
    )


def _without_prefix(names: Sequence[str]) -> tuple[str, ...] | None:
    whole = PREFIX.removesuffix(".")  # the component of what lies in the outermost module itself, which is "" without
    if not all(name == whole or name.startswith((PREFIX, f"{whole}[")) for name in names):
        return None
    return tuple(name.removeprefix(whole).removeprefix(".") for name in names)
