"""What a clipper's caps have learnt, for its ``state_dict()``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..arguments import type_name
from .base import Threshold
from .by_pattern import settled
from .constant import MaxNorm


def learnt(max_norm: MaxNorm) -> dict[str, Any]:
    """A clipper's ``state_dict()``: {"max_norm": ``Threshold.state_dict()``}, or {} where nothing is learnt."""
    max_norm = settled(max_norm)
    state = max_norm.state_dict() if isinstance(max_norm, Threshold) else {}
    return {"max_norm": state} if _tells(state) else {}


def _tells(state: Mapping[str, Any]) -> bool:
    parts = state.get("thresholds", {})  # of a mapping
    return bool(state.get("tensors") or state.get("host")) or any(map(_tells, parts.values()))


def load_learnt(max_norm: MaxNorm, state: Mapping[str, Any]) -> None:
    """Loads what ``learnt`` returned into the ``max_norm`` of another clipper; raises if that is of another kind."""
    max_norm = settled(max_norm)
    expected = "state_dict: expected what state_dict() of a clipper returned, not"
    if not isinstance(state, Mapping):
        raise TypeError(f"{expected} {type_name(state)}")
    if not set(state) <= {"max_norm"}:
        raise ValueError(f"{expected} keys {sorted(state)}")
    if not state:
        if learnt(max_norm):
            raise ValueError(f"state_dict: is empty, of a clipper whose caps don't learn as {max_norm} does")
    elif isinstance(max_norm, Threshold):
        max_norm.load_state_dict(state["max_norm"])
    else:
        kind = type_name(max_norm)
        raise ValueError(f"state_dict: of a clipper with a threshold as max_norm, but this one's is a {kind}")
