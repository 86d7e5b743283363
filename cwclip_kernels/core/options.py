"""The scalar arguments of a call, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..arguments import check_type, checked_number, type_name
from ..backends import registry
from ..thresholds import Threshold
from ..thresholds.constant import MaxNorm
from .formula import POLICIES, ClipRule


@dataclass(frozen=True)
class Options:
    """The scalar arguments of a call; backend None for the best available."""

    rule: ClipRule
    raise_nonfinite: bool
    backend: str | None

    def in_words(self, max_norm: MaxNorm = math.inf, pp_mesh: object = None) -> str:
        """The arguments that all ranks must have alike; stages of a pipeline may have other caps."""
        rule = self.rule
        policy = "error" if self.raise_nonfinite else rule.nonfinite
        text = f"norm_type={rule.norm_type:g}, eps={rule.eps:g}, nonfinite={policy!r}"
        if pp_mesh is not None:
            return text
        is_object = isinstance(max_norm, Tensor | Threshold)
        return f"{text}, max_norm={type_name(max_norm) if is_object else max_norm!r}"


def check_options(
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    eps: float = 1e-6,
    nonfinite: str = "propagate",
    backend: str | None = None,
) -> Options:
    """The scalar arguments, checked; the TypeError or ValueError names the argument and what it takes."""
    registry.check_backend(backend)
    check_type(error_if_nonfinite, "error_if_nonfinite", bool, "a bool")
    check_type(nonfinite, "nonfinite", str, _ONE_POLICY)
    if nonfinite not in POLICIES:
        raise ValueError(f"nonfinite: expected {_ONE_POLICY}, not {nonfinite!r}")
    if error_if_nonfinite and nonfinite not in ("propagate", "error"):
        raise ValueError(f"error_if_nonfinite=True contradicts nonfinite={nonfinite!r}; give one of them")
    rule = ClipRule(_checked_order(norm_type), checked_number(eps, "eps"), nonfinite)
    return Options(rule, error_if_nonfinite or nonfinite == "error", backend)


_ONE_POLICY = f"one of {', '.join(POLICIES)}"


def _checked_order(norm_type: object) -> float:
    if isinstance(norm_type, str) and norm_type in ("inf", "-inf"):  # torch's own spelling
        return float(norm_type)
    return checked_number(norm_type, "norm_type", -math.inf, finite=False, kinds="a number or 'inf'")
