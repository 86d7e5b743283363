"""Thresholds by pattern: each for the components whose names match."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from ..arguments import check_type, some_of
from ..components.naming import Aliases
from ..components.patterns import match_patterns
from ..core.formula import wide_dtype
from .base import Setting, Threshold, caps_of, difference_of
from .constant import MaxNorm, check_patterns, checked_cap

# What ``settled`` leaves of ``MaxNorm``: thresholds in mappings have become a ``ByPattern``.
Settled: TypeAlias = float | Tensor | Mapping[str, float] | Threshold


@dataclass(frozen=True)
class _Part:
    """A threshold and the components that it makes caps for."""

    threshold: Threshold
    own: list[int]  # positions of the components
    setting: Setting


@dataclass(frozen=True)
class _Placed:
    """What ``caps`` needs on one device."""

    numbers: Tensor  # [K]: caps under numbers; inf for all other components
    own: list[Tensor]  # of each part, positions of its components


class ByPattern(Threshold):
    """What a mapping with thresholds as ``max_norm`` stands for: each makes the caps of the components it matches.

    As in a mapping of numbers, the first pattern that matches counts, a component that none matches isn't clipped,
    and a pattern that matches nothing is an error. A threshold sees its own components alone: the global norm of an
    ``EMA``'s warm-up, or the budget of a ``FromGlobal``, is theirs. The same object under two patterns makes the
    caps of both together.

    A mapping becomes one of these by itself, and the function form finds it again in a later mapping of the same
    patterns, numbers and objects. Where some components add ``eps`` to their norm (numbers, ``Schedule``) and others
    don't (``EMA``), gradients are clipped in two passes, otherwise in as many as the thresholds take.

    Args:
        by_pattern: a mapping of ``fnmatch`` patterns on component names to numbers or thresholds; a tensor as
            ``Fixed(tensor)``.

    Attributes:
        by_pattern: the mapping.

    Example:
        >>> from cwclip_kernels import ComponentClipper, thresholds
        >>> model = torch.nn.Linear(2, 1)
        >>> clipper = ComponentClipper(model, {"*weight": thresholds.Schedule(lambda step: 1.0 + step), "*": 0.5})
        >>> [clipper.clip_().caps.tolist() for _ in range(2)]
        [[1.0, 0.5], [2.0, 0.5]]
        >>> isinstance(clipper.max_norm, thresholds.ByPattern)
        True
        >>> clipper.state_dict()["max_norm"]["thresholds"]["*weight"]["host"]
        {'step': 2}
    """

    def __init__(self, by_pattern: Mapping[str, float | Threshold]) -> None:
        super().__init__()
        check_type(by_pattern, "by_pattern", Mapping, "a mapping of patterns to numbers or thresholds")
        check_patterns(by_pattern)
        self.by_pattern = {
            pattern: cap if isinstance(cap, Threshold) else checked_cap(cap, f"max_norm[{pattern!r}]")
            for pattern, cap in by_pattern.items()
        }
        self._thresholds: dict[str, Threshold] = {}  # each once, under its first pattern
        for pattern, cap in self.by_pattern.items():
            if isinstance(cap, Threshold) and all(cap is not other for other in self._thresholds.values()):
                self._thresholds[pattern] = cap
        all_of = list(self._thresholds.values())
        self.reads_parameters = any(one.reads_parameters for one in all_of)
        self.needs_all_components = any(one.needs_all_components for one in all_of)
        self.reads_numels = any(one.needs_all_components and one.reads_numels for one in all_of)
        self.untraceable = next((one.untraceable for one in all_of if one.untraceable is not None), None)
        self._parts: list[_Part] = []
        self._numbers: list[float] = []
        self._adds_eps: tuple[bool, ...] | None = None
        self._adds_eps_bounded: tuple[bool, ...] | None = None
        self._placed: dict[torch.device, _Placed] = {}
        self._parameter_norms: Tensor | None = None  # while caps are computed

    def __getstate__(self) -> dict[str, Any]:
        copies = {pattern: copy(one) for pattern, one in self._thresholds.items()}
        of = {id(one): copies[pattern] for pattern, one in self._thresholds.items()}
        own = {"_thresholds": copies, "by_pattern": {p: of.get(id(cap), cap) for p, cap in self.by_pattern.items()}}
        return {**super().__getstate__(), **own, "_parts": [], "_placed": {}, "_parameter_norms": None}

    def __str__(self) -> str:
        return f"{{{', '.join(f'{pattern!r}: {cap}' for pattern, cap in self.by_pattern.items())}}}"

    def match(
        self,
        names: tuple[str, ...],
        aliases: Aliases,
        spellings: tuple[str, ...],
        everywhere: tuple[str, ...] | None = None,
    ) -> dict[str, float | Threshold]:
        """The number or threshold of each component that a pattern matches; ValueError for a pattern without any."""
        return match_patterns(names, self.by_pattern, everywhere, aliases, spellings)

    def bind(self, setting: Setting) -> None:
        """Binds each threshold to its own components; nothing is bound if one is for others."""
        self.check_fits(setting)
        names = setting.names
        found = self.match(names, setting.aliases, setting.spellings, setting.everywhere)
        parts: list[_Part] = []
        for threshold in self._thresholds.values():
            own = [i for i, name in enumerate(names) if found.get(name) is threshold]
            if own:  # else it has its components on other ranks, or others before it have taken them
                norms = partial(self._norms_of, len(parts))
                all_own = setting.everywhere and tuple(n for n in setting.everywhere if found.get(n) is threshold)
                parts.append(_Part(threshold, own, setting.only(own, norms, all_own)))
        for threshold in self._thresholds.values():  # on all ranks alike
            threshold.check_sizes(tuple(name for name in setting.spanning if found.get(name) is threshold))
        for part in parts:
            part.threshold.check_fits(part.setting)
        for part in parts:
            part.threshold.bind(part.setting)
        # A cap of inf gives the same coefficient with eps and without.
        adds: list[bool | None] = [None] * len(names)
        numbers = [math.inf] * len(names)
        for i, name in enumerate(names):
            cap = found.get(name, math.inf)
            if not isinstance(cap, Threshold):
                numbers[i], adds[i] = cap, True if cap < math.inf else None
        for part in parts:
            theirs = part.threshold.adds_eps_to() or (part.threshold.adds_eps,) * len(part.own)
            for i, one in zip(part.own, theirs, strict=True):
                adds[i] = one
        self.adds_eps = any(adds)
        self._adds_eps_bounded = tuple(one is not False for one in adds) if False in adds else None
        self._adds_eps = self._adds_eps_bounded if self.adds_eps else None
        self._numbers, self._parts = numbers, parts
        self._placed.clear()
        if setting.device.type != "meta":
            self._place(setting.device)
        super().bind(setting)

    def is_bound_to(self, setting: Setting) -> bool:
        """Also of each threshold, which may have been used elsewhere since."""
        return self._setting is setting and all(part.threshold.is_bound_to(part.setting) for part in self._parts)

    def state_tensors(self) -> list[Tensor]:
        return [tensor for part in self._parts for tensor in part.threshold.state_tensors()]

    def serves(self, ids: tuple[int, ...]) -> bool:
        return super().serves(ids) and all(part.threshold.serves(ids) for part in self._parts)

    def _place(self, device: torch.device) -> _Placed:
        placed = self._placed.get(device)
        if placed is None:
            numbers = torch.tensor(self._numbers, dtype=wide_dtype(device), device="cpu").to(device)
            own = [torch.tensor(part.own, dtype=torch.int64, device="cpu").to(device) for part in self._parts]
            placed = self._placed[device] = _Placed(numbers, own)
        return placed

    def _norms_of(self, part: int) -> Tensor:
        """``Setting.parameter_norms`` of a part; measured once for all parts."""
        if self._parameter_norms is None:
            self._parameter_norms = self.setting.parameter_norms()
        norms = self._parameter_norms
        return norms[self._place(norms.device).own[part]]

    def adds_eps_to(self, *, bounded: bool = False) -> tuple[bool, ...] | None:
        return self._adds_eps_bounded if bounded else self._adds_eps

    @property
    def learns(self) -> bool:
        return any(threshold.learns for threshold in self._thresholds.values())

    @property
    def needs_norms(self) -> bool:
        return any(part.threshold.needs_norms for part in self._parts)

    def caps(self, device: torch.device, norms: Tensor | None) -> Tensor:
        placed = self._place(device)
        caps = placed.numbers
        self._parameter_norms = None
        try:
            if self.reads_parameters and self.setting.everywhere is not None:
                # On all ranks together, also where no component here needs them.
                self._parameter_norms = self.setting.parameter_norms()
            for part, own in zip(self._parts, placed.own, strict=True):
                needed = norms[own] if norms is not None and part.threshold.needs_norms else None
                found = caps_of(part.threshold, device, needed, len(part.own))
                caps = caps.index_copy(0, own, found.expand(len(part.own)))
        finally:
            self._parameter_norms = None
        return caps

    def update_(self, norms: Tensor, coefs: Tensor) -> None:
        placed = self._place(norms.device)
        for part, own in zip(self._parts, placed.own, strict=True):
            if part.threshold.learns:
                part.threshold.update_(norms[own], coefs[own])

    def state_dict(self) -> dict[str, Any]:
        """As ``Threshold.state_dict()``; under "thresholds" that of each threshold, by its first pattern."""
        parts = {pattern: threshold.state_dict() for pattern, threshold in self._thresholds.items()}
        return {**super().state_dict(), "thresholds": parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a ``state_dict()`` with thresholds under the same patterns; numbers may be others.

        Raises:
            TypeError, ValueError: not such a state, or for other patterns or components; nothing is changed.
        """
        self.check_state(state)
        for pattern, threshold in self._thresholds.items():
            threshold.load_state_dict(state["thresholds"][pattern])
        names = state["components"]
        self._loaded_names = None if names is None else tuple(names)

    def check_state(self, state: object) -> None:
        """Raises what ``load_state_dict`` would, and changes nothing."""
        if isinstance(state, dict) and state.get("policy", "ByPattern") != "ByPattern":
            raise ValueError(f"state: of a {state['policy']}, not of a mapping with thresholds")
        if not isinstance(state, dict) or not isinstance(state.get("thresholds"), dict):
            raise TypeError("state: expected what state_dict() of a mapping with thresholds returned")
        theirs, ours = tuple(state["thresholds"]), tuple(self._thresholds)
        if set(theirs) != set(ours):
            shown = some_of(theirs) or "no pattern"
            raise ValueError(f"state: of a mapping with thresholds under {shown}{difference_of(theirs, ours)}")
        super().check_state({key: value for key, value in state.items() if key != "thresholds"})
        for pattern, threshold in self._thresholds.items():
            try:
                threshold.check_state(state["thresholds"][pattern])
            except (TypeError, ValueError) as error:
                raise type(error)(f"max_norm[{pattern!r}]: {error}") from None


def settled(max_norm: MaxNorm) -> Settled:
    """A mapping with thresholds as a ``ByPattern``, the same for an equal mapping; anything else as it is."""
    if not isinstance(max_norm, Mapping):
        return max_norm
    first = next((cap for cap in max_norm.values() if isinstance(cap, Threshold)), None)
    if first is None:
        return cast("Mapping[str, float]", max_norm)
    # Kept by the first threshold, so that no cache keeps thresholds alive.
    known = first.within
    if isinstance(known, ByPattern) and _are_same(known.by_pattern, max_norm):
        return known
    first.within = made = ByPattern(max_norm)
    return made


def _are_same(known: Mapping[str, object], given: Mapping[str, object]) -> bool:
    """The same patterns in the same order, with equal numbers or the same objects."""
    if len(known) != len(given):
        return False
    for (pattern, cap), (other, new) in zip(known.items(), given.items(), strict=True):
        if pattern != other:
            return False
        if isinstance(cap, Threshold) or isinstance(new, Threshold | Tensor):
            if cap is not new:
                return False
        elif isinstance(new, bool) or cap != new:
            return False
    return True
