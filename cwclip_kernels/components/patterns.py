"""Patterns on component and parameter names."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from ..arguments import some_of, warn_caller
from .naming import PREFIX, Aliases, without_wrappers


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
    shown = f" ({some_of(names)})" if names else ""
    return f"matches none of the {len(names)} {what}{shown}{'' if hint is None else f'; {hint}'}"


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
