"""``suggest``: caps for a wanted clip rate, from the norms of a recorded run."""

from __future__ import annotations

import math
import re
import sys
from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from ..arguments import check_type, checked_int, checked_number, some_of
from ..components.grouping import type_of
from ..components.patterns import matches
from ..core.formula import ClipRule, coefficients
from .runs import Run, read_run

_LEVELS = (0.01, 0.25, 0.5, 0.75, 0.99)
_EARLY = 0.1  # of the steps, in which a warm-up is looked for


@dataclass(frozen=True)
class SuggestedCap:
    """The norms of one type before clipping, and the cap for them.

    Attributes:
        name: the type, or the component; as a pattern it matches these components, and perhaps others.
        components: their names.
        counted: how many finite norms of components with a gradient there are, over all steps.
        quantiles: of these norms, at 1, 25, 50, 75 and 99 %.
        largest: of these norms.
        cap: to two significant digits; inf if there is no norm to go by.
        rate: the clip rate at that cap.
        nonfinite: in how many steps a norm was inf or NaN.
    """

    name: str
    components: tuple[str, ...]
    counted: int
    quantiles: tuple[float, ...]
    largest: float
    cap: float
    rate: float
    nonfinite: int

    @property
    def median(self) -> float:
        """The median of the norms."""
        return self.quantiles[2]

    @property
    def percentile_99(self) -> float:
        """Which 1 % of the norms exceed."""
        return self.quantiles[4]


@dataclass(frozen=True)
class Suggestion:
    """Caps for a wanted clip rate.

    Attributes:
        caps: one for each type, in the order of the run's components.
        max_norm: the same as the mapping that ``max_norm`` takes: of its patterns the first that matches a component
            is that of its type. Patterns are ordered for that.
        rate: the clip rate that was asked for.
        clip_rate: that of all components together at these caps.
        by: "type" or "component".
        steps: how many the norms are of.
        skipped: how many recorded steps at the beginning were left out.
        notes: what the run doesn't show, as sentences.
    """

    caps: tuple[SuggestedCap, ...]
    max_norm: dict[str, float]
    rate: float
    clip_rate: float
    by: str
    steps: int
    skipped: int
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: None where a cap is inf, or there is no number."""
        caps = [
            {
                "name": cap.name,
                "components": list(cap.components),
                "counted": cap.counted,
                "median": _or_none(cap.median),
                "percentile_99": _or_none(cap.percentile_99),
                "largest": _or_none(cap.largest),
                "cap": _or_none(cap.cap),
                "rate": _or_none(cap.rate),
                "nonfinite_steps": cap.nonfinite,
            }
            for cap in self.caps
        ]
        plain = {name: getattr(self, name) for name in ("rate", "clip_rate", "by", "steps", "skipped")}
        max_norm = {pattern: _or_none(cap) for pattern, cap in self.max_norm.items()}
        return {**plain, "notes": list(self.notes), "max_norm": max_norm, "caps": caps}


def suggest(run: str | Path | Run, rate: float = 0.01, *, by: str = "type", skip: int = 0) -> Suggestion:
    """Caps at which each type of component would have been clipped at a wanted rate in a recorded run.

    A type's cap is the (1 - rate) quantile of its recorded norms, which are those before clipping, in all its
    components and steps together. Counted are, as for the library's clip rate, components with a gradient. Norms that
    are inf or NaN are left out: what happens to them is the non-finite policy's decision, not the cap's. A run with
    caps in force also has the norms before clipping, but without these caps training would have gone otherwise.

    Args:
        run: what ``read_run`` reads, or what it returned.
        rate: wanted clip rate, above 0 and below 1.
        by: "type" (the same place in every layer gets one cap, as with ``components="type"``; numbered slices of a
            tensor, too) or "component" (each gets its own).
        skip: leaves out this many steps from the first that was recorded, by their numbers: in a warm-up norms are
            others than in what follows.

    Raises:
        TypeError, ValueError: an invalid argument; as ``read_run``; no steps are left, or no finite norms.
        FileNotFoundError: as ``read_run``.

    Example:
        >>> import torch
        >>> from cwclip_kernels.telemetry import Run, suggest
        >>> norms = torch.arange(0.5, 200).reshape(100, 2).double()  # 100 steps of two layers
        >>> steps, caps = list(range(100)), torch.full_like(norms, torch.inf)
        >>> run = Run(("h.0.weight", "h.1.weight"), steps, norms, caps, torch.ones_like(norms))
        >>> suggestion = suggest(run, rate=0.05)
        >>> suggestion.max_norm, suggestion.clip_rate
        ({'h.*.weight': 190.0}, 0.05)
    """
    check_type(run, "run", str | Path | Run, "a path or a Run")
    check_type(by, "by", str, "'type' or 'component'")
    if by not in ("type", "component"):
        raise ValueError(f"by: expected 'type' or 'component', not {by!r}")
    wanted = checked_number(rate, "rate", 0.0, 1.0, above_low=True)
    if wanted == 1.0:
        raise ValueError("rate: expected a number below 1; max_norm=0 clips everything")
    skipped = checked_int(skip, "skip", 0)
    where = "run" if isinstance(run, Run) else str(run)
    if not isinstance(run, Run):
        run = read_run(run)
    if not run.steps or not run.names:
        raise ValueError(f"{where}: has no steps yet")
    first = next((i for i, step in enumerate(run.steps) if step >= run.steps[0] + skipped), None)
    if first is None:
        raise ValueError(f"skip: the run ends at step {run.steps[-1]}, so skipping {skipped} leaves none")
    used = Run(run.names, run.steps[first:], run.norms[first:], run.caps[first:], run.coefs[first:])
    groups = _groups(run.names, by)
    caps = tuple(
        _cap_for(name, tuple(run.names[i] for i in members), used.norms[:, members], wanted)
        for name, members in groups.items()
    )
    if not any(cap.counted for cap in caps):
        raise ValueError(f"{where}: all norms are zero or not finite, of {some_of([cap.name for cap in caps])}")
    clipped = sum(round(cap.rate * cap.counted) for cap in caps if cap.counted)
    clip_rate = clipped / sum(cap.counted for cap in caps)
    notes = tuple(_notes(used, caps, groups, wanted))
    return Suggestion(caps, _mapping(caps), wanted, clip_rate, by, len(used.steps), first, notes)


_NUMBERED = re.compile(r"\[\d+(?:,\d+)*\]")


def _starred(number: re.Match[str]) -> str:
    """``[*]`` for a slice's number, ``[*,*]`` for one along two dimensions."""
    return re.sub(r"\d+", "*", number[0])


def _groups(names: tuple[str, ...], by: str) -> dict[str, list[int]]:
    beside = frozenset(names)
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        kind = name if by == "component" else _NUMBERED.sub(_starred, type_of(name, beside))
        groups.setdefault(kind, []).append(i)
    return groups


def _cap_for(name: str, components: tuple[str, ...], norms: Tensor, rate: float) -> SuggestedCap:
    finite = norms.isfinite()
    nonfinite = int((~finite).any(1).sum())
    found = norms[finite & (norms != 0)].sort().values
    if not len(found):
        return SuggestedCap(name, components, 0, (math.nan,) * 5, math.nan, math.inf, math.nan, nonfinite)
    exact = _quantile(found, 1 - rate) + ClipRule().eps
    unit = 10.0 ** (math.floor(math.log10(exact)) - 1)
    nearest = [float(f"{exact + shift:.1e}") for shift in (0.0, -unit, unit)]
    # Of the neighbours, the one whose rate is closest.
    _, _, cap = min((abs(_rate(found, cap) - rate), abs(cap - exact), cap) for cap in nearest if cap > 0)
    quantiles = tuple(_quantile(found, level) for level in _LEVELS)
    return SuggestedCap(name, components, len(found), quantiles, found[-1].item(), cap, _rate(found, cap), nonfinite)


def _quantile(sorted_norms: Tensor, level: float) -> float:
    """Interpolated linearly; torch.quantile takes no more than 16 million numbers."""
    place = level * (len(sorted_norms) - 1)
    low = min(math.floor(place), len(sorted_norms) - 1)
    below, above = sorted_norms[low].item(), sorted_norms[min(low + 1, len(sorted_norms) - 1)].item()
    return float(below + (above - below) * (place - low))


def _rate(norms: Tensor, cap: float) -> float:
    coefs = coefficients(norms, norms.new_tensor(cap), ClipRule())
    return (coefs != 1).double().mean().item()


def _mapping(caps: tuple[SuggestedCap, ...]) -> dict[str, float]:
    """Patterns, in an order in which the first that matches a component is that of its own type.

    "h.*.weight" also matches "h.0.attn.weight", so it comes after "h.*.attn.weight".
    """
    own = {name: i for i, cap in enumerate(caps) for name in cap.components}
    ordered = sorted(own)
    before = {i: _matched(cap.name, own, ordered) - {i} for i, cap in enumerate(caps)}  # what has to come before it
    mapping: dict[str, float] = {}
    while before:
        free = next((i for i, others in before.items() if before.keys().isdisjoint(others)), None)
        if free is None:  # names with "*" or "?" of their own
            names = some_of([caps[i].name for i in before])
            raise ValueError(f"run: no order of patterns tells these components apart: {names}")
        mapping[caps[free].name] = caps[free].cap
        del before[free]
    return mapping


def _matched(pattern: str, own: dict[str, int], ordered: list[str]) -> set[int]:
    """The types of components that a pattern matches; ``ordered``: their names, sorted, to compare it with a few."""
    found = {own[pattern]} if pattern in own else set()
    start = re.split(r"[*?[]", pattern, maxsplit=1)[0]
    if start != pattern:
        others = _that_start_with(start, ordered)
        # Brackets, read as a character class, match a single character, which isn't another slice's bracket.
        if not set(pattern) & set("*?"):
            slices = _that_start_with(f"{start}[", ordered)
            candidates = [*ordered[others.start : slices.start], *ordered[slices.stop : others.stop]]
        else:
            candidates = ordered[others]
        found.update(own[name] for name in candidates if matches(name, pattern))
    return found


def _that_start_with(start: str, ordered: list[str]) -> slice:
    return slice(bisect_left(ordered, start), bisect_left(ordered, start + chr(sys.maxunicode)))


def _notes(run: Run, caps: tuple[SuggestedCap, ...], groups: dict[str, list[int]], rate: float) -> list[str]:
    notes = []
    steps, count = run.steps, len(run.steps)
    between = sorted(b - a for a, b in pairwise(steps))
    if between and between[-1] > 1:
        usual = between[len(between) // 2]
        what = (
            f"about one step in {usual}" if usual > 1 else f"{steps[-1] - steps[0] + 1 - count} steps fewer than ran"
        )
        notes.append(f"The record has {what}; the norms between aren't known.")
    if rate * count < 1:
        notes.append(
            f"{count} steps are too few for a rate of {rate:g}, which is one clip of a component in "
            f"{math.ceil(1 / rate):,} steps: the caps are near the largest norms, and uncertain."
        )
    else:
        few = [cap.name for cap in caps if 0 < rate * cap.counted < 1]
        if few:
            notes.append(f"Too few norms for a rate of {rate:g}, so that the cap is uncertain: {some_of(few)}.")
    moved = [cap.name for cap in caps if rate * cap.counted >= 1 and abs(cap.rate - rate) > 0.5 * rate]
    if moved:
        notes.append(f"Norms so close that rounding the cap moves its rate by more than half: {some_of(moved)}.")
    none = [cap.name for cap in caps if not cap.counted]
    if none:
        notes.append(f"Only zero or non-finite norms, so the cap is inf, which doesn't clip: {some_of(none)}.")
    counted = run.norms.isfinite() & (run.norms != 0)
    limits = run.norms.new_empty(len(run.names))
    for cap, members in zip(caps, groups.values(), strict=True):
        limits[members] = cap.cap
    above = (counted & (coefficients(run.norms, limits, ClipRule()) != 1)).sum(1)
    early = math.ceil(_EARLY * count)
    if count >= 20 and above.sum() >= 10 and above[:early].sum() > 0.5 * above.sum():
        share, skip = (above[:early].sum() / above.sum()).item(), steps[early] - steps[0]
        notes.append(
            f"{share:.0%} of the norms above these caps are in the first {skip} steps, as in a warm-up: skip {skip} "
            "steps for caps of what follows."
        )
    bad = run.nonfinite
    if bad.any():
        notes.append(
            f"{int(bad.sum())} norms in {int(bad.any(1).sum())} steps were inf or NaN. They are left out here; a "
            "logged clip rate counts them unless the non-finite policy is 'skip'."
        )
    clipped = ((run.coefs != 1) & counted).sum().item() / max(1, int(counted.sum()))
    if clipped:
        notes.append(
            f"Caps were in force ({clipped:.1%} of the norms were clipped): without them training would have had "
            "other norms."
        )
    return notes


def _or_none(number: float) -> float | None:
    return number if math.isfinite(number) else None
