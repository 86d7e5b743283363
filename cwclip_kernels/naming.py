"""Names of parameters: their own, whatever wraps the model; the module and layer they belong to; patterns on them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from .messages import warn_caller

Aliases = tuple[tuple[str, str], ...]  # of tied parameters: another name, and the first one, which counts

# ------------------------------------------------------------------------------------------------------------
# Without what wraps a model
# ------------------------------------------------------------------------------------------------------------

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


# ------------------------------------------------------------------------------------------------------------
# What a parameter belongs to
# ------------------------------------------------------------------------------------------------------------


def module_of(name: str, beside: Collection[str] = ()) -> str:
    """The owning module: "encoder.layer.3.output.dense.bias" -> "encoder.layer.3.output.dense".

    What ``torch.nn.utils.parametrize`` made of a parameter still belongs to its module:
    "dense.parametrizations.weight.original0" -> "dense".

    Args:
        name: the parameter's.
        beside: the other parameters', which tell "parametrizations.a.0.b" of a parametrized "a" in the outermost
            module, beside "parametrizations.a.original", from that of a module which is merely called so.
    """
    return _parametrized(name, beside)[0].rpartition(".")[0]


def layer_of(name: str, beside: Collection[str] = ()) -> str:
    """Up to and including the last all-digits part: "encoder.layer.3.output.dense.bias" -> "encoder.layer.3".

    Numbers of parametrizations, as in "dense.parametrizations.weight.0.scale", aren't layers.
    """
    parts = _parametrized(name, beside)[0].split(".")
    for last in range(len(parts), 0, -1):
        if parts[last - 1].isdecimal():
            return ".".join(parts[:last])
    return module_of(name, beside)


def type_of(name: str, beside: Collection[str] = ()) -> str:
    """All-digits parts become "*": "encoder.layer.3.output.dense.bias" -> "encoder.layer.*.output.dense.bias".

    Numbers of parametrizations stay.
    """
    own, rest = _parametrized(name, beside)
    if rest:
        own = own.rpartition(".")[0]
        rest = f"{'.' if own else ''}{rest}"
    return ".".join("*" if part.isdecimal() else part for part in own.split(".")) + rest


def _parametrized(name: str, beside: Collection[str]) -> tuple[str, str]:
    """The name that a parameter had before it was parametrized, and all that comes after its module now, if it was.

    "h.3.dense.parametrizations.weight.original0" -> "h.3.dense.weight", "parametrizations.weight.original0"
    """
    parts = name.split(".")
    for i, part in enumerate(parts[:-2]):
        if part == "parametrizations" and _is_parametrization(parts, i, beside):
            return ".".join([*parts[:i], parts[i + 1]]), ".".join(parts[i:])
    return name, ""


def _is_parametrization(parts: Sequence[str], at: int, beside: Collection[str]) -> bool:
    kind = parts[at + 2]
    if kind.startswith("original"):  # a parameter itself: "original", or "original0" and so on
        return len(parts) == at + 3 and (kind == "original" or kind.removeprefix("original").isdecimal())
    if not kind.isdecimal() or len(parts) == at + 3:  # what lies in a parametrization, which is a module
        return False
    original = ".".join([*parts[: at + 2], "original"])
    return at > 0 or original in beside or f"{original}0" in beside


WORD_KEYS: dict[str, Callable[[str, Collection[str]], str]] = {
    "parameter": lambda name, beside: name,
    "module": module_of,
    "layer": layer_of,
    "type": type_of,
    "all": lambda name, beside: "all",
}

# ------------------------------------------------------------------------------------------------------------
# Patterns
# ------------------------------------------------------------------------------------------------------------


def match_patterns(
    names: tuple[str, ...],
    values: Mapping[str, float],
    default: float,
    everywhere: tuple[str, ...] | None = None,
    aliases: Aliases = (),
    spellings: Aliases = (),
) -> list[float]:
    """The value of the first pattern, in the mapping's order, that matches each name.

    Args:
        names: component names.
        values: ``fnmatch`` patterns (case-sensitive), or exact names, to values.
        default: value of a name that no pattern matches.
        everywhere: names that a pattern may match instead, on other ranks.
        aliases: other names of tied components, for messages.
        spellings: of names that lost ``PREFIX`` what they would be with it: a pattern may be meant for these.

    Raises:
        ValueError: a pattern matches no name at all, or others with the prefix than without.

    Warns:
        UserWarning: a pattern matches another name of a tied component, whose first name none matches.
    """
    everywhere = everywhere or names
    spelt = {own: other for other, own in spellings}
    if spellings:  # names of other ranks' components lost the prefix as well
        spelt = {**{name: PREFIX + name for name in everywhere}, **{name: name for name in names}, **spelt}
    found: dict[str, float] = {}
    for pattern, value in values.items():
        hits = _hits(pattern, {*everywhere, *names}, spelt, found)
        if not hits:
            raise ValueError(
                f"max_norm: the pattern {pattern!r} {no_match(pattern, everywhere, 'components', aliases)}"
            )
        for name in hits:
            found.setdefault(name, value)
    unmatched = set(names).difference(found)
    for other, first in aliases:
        spelt_other = (other, PREFIX + other) if spellings else (other,)
        if first in unmatched and any(matches(name, pattern) for pattern in values for name in spelt_other):
            unmatched.remove(first)
            warn_caller(
                f"max_norm: {_tied(other, first)}, which no pattern matches: it will not be clipped. "
                f"Give {first!r} a cap (math.inf if it is not to be clipped)"
            )
    return [found.get(name, default) for name in names]


def _hits(pattern: str, names: Collection[str], spelt: Mapping[str, str], settled: Collection[str]) -> set[str]:
    """The names that match, or if none does, those that match as they are spelt with the prefix.

    Raises:
        ValueError: where both do, and it makes a difference to names that aren't settled yet.
    """
    hits = {name for name in names if matches(name, pattern)}
    if not spelt:
        return hits
    others = {name for name in names if matches(spelt[name], pattern)}
    check_readings("max_norm: the pattern", pattern, hits, others, settled)
    return hits or others


def check_readings(what: str, pattern: str, own: set[str], prefixed: set[str], settled: Collection[str] = ()) -> None:
    """Raises ValueError if a pattern matches names without ``PREFIX`` and others with it.

    Args:
        what: the beginning of the message.
        pattern: the pattern.
        own: the names that it matches as they are.
        prefixed: those that it matches with the prefix.
        settled: names that don't count.
    """
    difference = sorted((own ^ prefixed).difference(settled))
    if own and prefixed and difference:
        raise ValueError(
            f"{what} {pattern!r} may mean two things: all names of the pairs begin with {PREFIX!r}, which is a "
            f"wrapper's or the model's own, and {difference[0]!r} matches only "
            f"{'without' if difference[0] in own else 'with'} it; pass the Module instead of pairs"
        )


def matches(name: str, pattern: str) -> bool:
    """Whether it is that name, or an ``fnmatch`` pattern of it (case-sensitive; ``*``, ``?``, ``[ab]``)."""
    # A slice's name holds brackets, which fnmatch reads as a character class: they may also mean themselves.
    return name == pattern or fnmatchcase(name, pattern) or fnmatchcase(name, pattern.replace("[", "[[]"))


# As torch.compiler.assume_constant_result does, which imports the whole compiler: Dynamo can't trace fnmatch.
matches._dynamo_marked_constant = True  # type: ignore[attr-defined]


def no_match(pattern: str, names: Sequence[str], what: str, aliases: Aliases = ()) -> str:
    """The end of an error message, that a pattern matches none of these names, and why if that can be told.

    Args:
        pattern: the pattern.
        names: which it might have matched.
        what: what has these names, in the plural.
        aliases: other names of tied ones.
    """
    hint = next(_hints(pattern, names, aliases), None)
    return f"matches none of the {len(names)} {what}{some_of(names)}{'' if hint is None else f'; {hint}'}"


_FEW = 10_000  # names that are compared with a misspelt one within a second


def _hints(pattern: str, names: Sequence[str], aliases: Aliases) -> Iterator[str]:
    for other, first in aliases:
        if matches(other, pattern) or matches(PREFIX + other, pattern):
            yield _tied(other, first)
    bare = without_wrappers(pattern).removeprefix("module.")
    if bare != pattern and any(matches(name, bare) for name in names):
        yield f"names are those of the model itself, without what wraps it: {bare!r}"
    if not set(pattern).intersection("*?") and len(names) <= _FEW:
        for close in get_close_matches(pattern, names, n=1):
            yield f"did you mean {close!r}?"


def _tied(other: str, first: str) -> str:
    return f"{other!r} is tied to {first!r} and goes by that name"


def some_of(names: Sequence[str]) -> str:
    """The first few names, in brackets, for an error message."""
    shown = ", ".join(map(repr, names[:3]))
    return f" ({shown}{', ...' if len(names) > 3 else ''})" if names else ""
