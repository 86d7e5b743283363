"""The scalar arguments of a call, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

from torch import Tensor

from ..arguments import type_name
from ..backends import registry
from ..thresholds import Threshold
from ..thresholds.constant import MaxNorm, as_float
from .formula import POLICIES, ClipRule


@dataclass(frozen=True)
class Options:
    """Norm order, eps and non-finite policy; whether a non-finite norm is an error; backend, None for the best."""

    rule: ClipRule
    raise_nonfinite: bool
    backend: str | None

    def in_words(self, max_norm: MaxNorm = math.inf, pp_mesh: object = None) -> str:
        """What all ranks have to choose alike: in a pipeline everything but the caps, of components others lack."""
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
    """Checks the scalar arguments.

    Raises:
        TypeError, ValueError: names the argument and what it takes.
    """
    registry.check_backend(backend)
    if not isinstance(error_if_nonfinite, bool):
        raise TypeError(f"error_if_nonfinite: expected a bool, not {type_name(error_if_nonfinite)}")
    if not isinstance(nonfinite, str):
        raise TypeError(f"nonfinite: expected one of {', '.join(POLICIES)}, not {type_name(nonfinite)}")
    if nonfinite not in POLICIES:
        raise ValueError(f"nonfinite: expected one of {', '.join(POLICIES)}, not {nonfinite!r}")
    if error_if_nonfinite and nonfinite not in ("propagate", "error"):
        raise ValueError(f"error_if_nonfinite=True contradicts nonfinite={nonfinite!r}; give one of them")
    rule = ClipRule(_checked_order(norm_type), _checked_eps(eps), nonfinite)
    return Options(rule, error_if_nonfinite or nonfinite == "error", backend)


def _checked_order(norm_type: object) -> float:
    if isinstance(norm_type, str) and norm_type in ("inf", "-inf"):  # torch's own spelling
        return float(norm_type)
    if isinstance(norm_type, bool) or not isinstance(norm_type, Real):
        raise TypeError(f"norm_type: expected a number or 'inf', not {norm_type!r}")
    order = as_float(norm_type, "norm_type")
    if math.isnan(order):
        raise ValueError("norm_type: expected a number or 'inf', not nan")
    return order


def _checked_eps(eps: object) -> float:
    if isinstance(eps, bool) or not isinstance(eps, Real):
        raise TypeError(f"eps: expected a number, not {type_name(eps)}")
    value = as_float(eps, "eps")
    if not 0.0 <= value < math.inf:
        raise ValueError(f"eps: expected a finite number >= 0, not {value}")
    return value
