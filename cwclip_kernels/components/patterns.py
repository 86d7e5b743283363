"""Patterns on component and parameter names."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TypeVar

from ..arguments import some_of, warn_caller
from .naming import PREFIX, Aliases, with_prefix, without_wrappers

Value = TypeVar("Value")

_FEW = 10_000  # names are compared with a misspelt one within a second


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern is that name, or an ``fnmatch`` pattern of it (case-sensitive; ``*``, ``?``, ``[ab]``)."""
    # A slice's name holds brackets, which fnmatch reads as a character class: they may also mean themselves.
    return name == pattern or fnmatchcase(name, pattern) or fnmatchcase(name, pattern.replace("[", "[[]"))


# As torch.compiler.assume_constant_result does, which imports the whole compiler: Dynamo can't trace fnmatch.
matches._dynamo_marked_constant = True  # type: ignore[attr-defined]


def match_patterns(
    names: tuple[str, ...],
    values: Mapping[str, Value],
    everywhere: tuple[str, ...] | None = None,
    aliases: Aliases = (),
    spellings: Sequence[str] = (),
) -> dict[str, Value]:
    """By component name, ``everywhere``, the value of the first pattern, in the mapping's order, that matches it.

    A pattern may match a component of another rank instead, of those ``everywhere``; ``aliases`` and ``spellings``
    are those of ``Components``.

    Raises:
        ValueError: a pattern matches no name, or may be meant with the lost prefix and without.

    Warns:
        UserWarning: patterns match only an alias of a component, which isn't clipped then.
    """
    known = dict.fromkeys((*(everywhere or ()), *names))
    spelt = {name: with_prefix(name) for name in known} if spellings else {}
    spelt.update(zip(names, spellings, strict=False))  # there are none where no prefix was lost
    found: dict[str, Value] = {}
    for pattern, value in values.items():
        what = f"max_norm: the pattern {pattern!r}"
        hits, _ = read_pattern(what, pattern, known, spelt, found)
        if not hits:
            raise ValueError(f"{what} {no_match(pattern, tuple(known), 'components', aliases)}")
        for name in hits:
            found.setdefault(name, value)
    unmatched = set(names).difference(found)
    for other, first in aliases:
        written = (other, with_prefix(other)) if spellings else (other,)
        if first in unmatched and any(matches(name, pattern) for pattern in values for name in written):
            unmatched.remove(first)
            warn_caller(
                f"max_norm: {_tied(other, first)}, which no pattern matches: it will not be clipped. "
                f"Give {first!r} a cap (math.inf if it is not to be clipped)"
            )
    return found


def read_pattern(
    what: str, pattern: str, names: Iterable[str], spelt: Mapping[str, str], settled: Collection[str] = ()
) -> tuple[set[str], bool]:
    """The names that a pattern matches, and whether it matches them only as they are ``spelt`` with the lost prefix.

    Raises:
        ValueError: it matches some names without the prefix and others with it, ``settled`` ones apart.
    """
    own = {name for name in names if matches(name, pattern)}
    others = {name for name in names if matches(spelt[name], pattern)} if spelt else set()
    difference = sorted((own ^ others).difference(settled))
    if own and others and difference:
        raise ValueError(
            f"{what} may mean two things: all names of the pairs begin with {PREFIX!r}, which is a wrapper's or the "
            f"model's own, and {difference[0]!r} matches only {'without' if difference[0] in own else 'with'} it; "
            "pass the Module instead of pairs"
        )
    return own or others, bool(others and not own)


def no_match(pattern: str, names: Sequence[str], what: str, aliases: Aliases = ()) -> str:
    """The end of an error message: the pattern matches none of these ``what``, and the likely reason."""
    shown = f" ({some_of(names)})" if names else ""
    return f"matches none of the {len(names)} {what}{shown}{_hint(pattern, names, aliases)}"


def _hint(pattern: str, names: Sequence[str], aliases: Aliases) -> str:
    for other, first in aliases:
        if matches(other, pattern) or matches(with_prefix(other), pattern):
            return f"; {_tied(other, first)}"
    bare = without_wrappers(pattern).removeprefix(PREFIX)
    if bare != pattern and any(matches(name, bare) for name in names):
        return f"; names are those of the model itself, without what wraps it: {bare!r}"
    if not set(pattern).intersection("*?") and len(names) <= _FEW:
        for close in get_close_matches(pattern, names, n=1):
            return f"; did you mean {close!r}?"
    return ""


def _tied(other: str, first: str) -> str:
    return f"{other!r} is tied to {first!r} and goes by that name"
