"""Checkpoints of an optimizer that clips: torch's own entries, and beside them what thresholds have learnt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..arguments import warn_caller
from ..thresholds import Threshold
from ..thresholds.by_pattern import settled
from ..thresholds.learning import learnt, load_learnt

_OWN = ("max_norm", "correct_bias")  # entries of param groups that torch's AdamW doesn't have


def save(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """A hook of ``state_dict()``: leaves torch's entries, and adds "clipping" if anything is learnt."""
    for group in state_dict["param_groups"]:
        for key in _OWN:
            group.pop(key, None)
    found = list(map(learnt, _thresholds(optimizer.param_groups)))
    if any(found):
        state_dict["clipping"] = found


class Loading:
    """One ``load_state_dict()``, by hooks: it loads what other hooks have made of the state.

    Args:
        kept_in: the dtype of a parameter's running means.
    """

    def __init__(self, kept_in: Callable[[Tensor], torch.dtype]) -> None:
        self._kept_in = kept_in
        self._state: dict[str, Any] = {}
        self._learnt: list[Any] = []
        self._own: list[dict[str, Any]] = []
        self._thresholds: list[Threshold] = []

    def before(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """The last hook before loading."""
        self._state, self._learnt = state_dict, state_dict.get("clipping", [])
        self._thresholds = _thresholds(optimizer.param_groups)
        if self._learnt and len(self._learnt) != len(self._thresholds):
            raise ValueError(
                f"state_dict: of {len(self._learnt)} thresholds as max_norm, and here are {len(self._thresholds)}"
            )
        self._own = [{key: group[key] for key in _OWN} for group in optimizer.param_groups]

    def after(self, optimizer: Optimizer) -> None:
        """The first hook after loading."""
        for group, own in zip(optimizer.param_groups, self._own, strict=True):
            group.update(own)
        self._restore_dtypes(optimizer)
        for threshold, state in zip(self._thresholds, self._learnt, strict=False):
            load_learnt(threshold, state)

    def warn(self) -> None:
        """Warns of a threshold that learns, and for which there was nothing to load."""
        learner = next((t for t in self._thresholds if t.learns), None)
        if learner is not None and not self._learnt:
            warn_caller(
                f"state_dict: has no 'clipping', so {learner} goes on from what it has learnt here; of a "
                "distributed checkpoint, which keeps torch's own entries alone, load max_norm's state beside it"
            )

    def _restore_dtypes(self, optimizer: Optimizer) -> None:
        """Running means as they were saved, where torch has rounded them to the parameter's dtype."""
        ids = (i for group in self._state["param_groups"] for i in group["params"])
        params = (p for group in optimizer.param_groups for p in group["params"])
        for i, p in zip(ids, params, strict=True):
            dtype, saved, state = self._kept_in(p), self._state["state"].get(i, {}), optimizer.state
            for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
                if dtype != p.dtype and name in saved:
                    state[p][name] = saved[name].to(p.device, dtype, copy=True)
            if saved and isinstance(saved.get("step"), Tensor):
                state[p]["step"] = state[p]["step"].to(p.device)


def _thresholds(groups: Sequence[Mapping[str, Any]]) -> list[Threshold]:
    """Each once, in the order of param groups."""
    settled_caps = [settled(group["max_norm"]) for group in groups]
    caps = {id(cap): cap for cap in settled_caps}
    return [cap for cap in caps.values() if isinstance(cap, Threshold)]
