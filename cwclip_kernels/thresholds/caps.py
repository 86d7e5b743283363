"""The ``max_norm`` argument: checked once, handed out as a tensor on whichever device asks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch
from torch import Tensor

from ..arguments import check_float_tensor, check_type, checked_number
from ..components.naming import Aliases
from ..components.patterns import match_patterns
from ..core.formula import wide_dtype

if TYPE_CHECKING:
    from . import Threshold

MaxNorm: TypeAlias = "float | Tensor | Mapping[str, float] | Threshold"


class CapPolicy(Protocol):
    """Where a step's caps come from: ``Caps``, or one of ``thresholds``."""

    @property
    def needs_norms(self) -> bool:
        """Whether caps depend on the norms of the step that they are for."""

    @property
    def adds_eps(self) -> bool:
        """Whether the coefficient is cap / (norm + eps), as torch's, rather than cap / norm."""

    def caps(self, device: torch.device, norms: Tensor | None) -> Tensor:
        """Caps [] or [K], contiguous, in ``wide_dtype`` on ``device``.

        Args:
            device: where coefficients are computed.
            norms: [K], this step's before clipping, on ``device``; None unless ``needs_norms``.
        """

    def update_(self, norms: Tensor, coefs: Tensor) -> None:
        """Learns from a step: norms before clipping and coefficients, both [K]. Without a host sync."""


class Caps:
    """One cap for all components, or one for each.

    Args:
        max_norm: a number; a floating-point Tensor of shape [] or [K], read anew at every call, so that
            changing it in place changes the cap; or a mapping of ``fnmatch`` patterns on component
            names to numbers, where a component that no pattern matches is not clipped.
        names: the K component names.
        everywhere: those that a pattern may match, if ranks have different ones.
        aliases: other names of tied components, for the error where a pattern matches nothing.
        spellings: the names with the prefix that parameters have lost, as ``Components`` has them.

    Raises:
        TypeError: none of these (bool and str included).
        ValueError: negative or NaN, a shape other than [] or [K], a pattern that matches nothing, or that may be
            meant in two ways.
    """

    def __init__(
        self,
        max_norm: MaxNorm,
        names: tuple[str, ...],
        everywhere: tuple[str, ...] | None = None,
        aliases: Aliases = (),
        spellings: tuple[str, ...] = (),
    ) -> None:
        self._live: Tensor | None = None
        self._fixed: float | list[float] = math.inf
        self._on: dict[torch.device, Tensor] = {}
        if isinstance(max_norm, Tensor):
            self._live = _checked_tensor(max_norm, len(names))
        elif isinstance(max_norm, Mapping):
            for pattern in max_norm:
                check_type(pattern, "max_norm", str, "strings as patterns")
            values = {pattern: checked_cap(cap, f"max_norm[{pattern!r}]") for pattern, cap in max_norm.items()}
            self._fixed = match_patterns(names, values, math.inf, everywhere, aliases, spellings)
        else:
            self._fixed = checked_cap(max_norm, "max_norm")

    needs_norms = False
    adds_eps = True

    def caps(self, device: torch.device, norms: Tensor | None = None) -> Tensor:
        """The caps as [] or [K] of ``wide_dtype`` on ``device``; no host sync, unless that is the host."""
        if self._live is not None:
            _check_values(self._live)
            # To the host it must be waited for, lest it be read before it has arrived.
            return self._live.detach().to(device, wide_dtype(device), non_blocking=device.type != "cpu").contiguous()
        caps = self._on.get(device)
        if caps is None:
            if isinstance(self._fixed, float):
                caps = torch.full((), self._fixed, dtype=wide_dtype(device), device=device)
            else:
                caps = torch.tensor(self._fixed, dtype=wide_dtype(device), device="cpu").to(device)
            self._on[device] = caps
        return caps

    def update_(self, norms: Tensor, coefs: Tensor) -> None:
        """Nothing: these caps don't depend on what was clipped."""


def checked_cap(value: object, name: str) -> float:
    """A cap as float, or an error that names it."""
    kinds = "a number"
    if name == "max_norm":
        kinds = "a number, a Tensor of shape [] or [K], a mapping of patterns to numbers, or one of thresholds"
    return checked_number(value, name, finite=False, kinds=kinds)


def _checked_tensor(max_norm: Tensor, count: int) -> Tensor:
    check_float_tensor(max_norm, "max_norm")
    if max_norm.shape not in ((), (count,)):
        raise ValueError(
            f"max_norm: expected shape [] or [{count}] (one cap for each component), not {list(max_norm.shape)}"
        )
    _check_values(max_norm)
    return max_norm


def _check_values(max_norm: Tensor) -> None:
    # Elsewhere than on the CPU the look would be a host sync; there a bad cap gives NaN coefficients instead.
    if max_norm.device.type == "cpu" and not bool((max_norm >= 0).all()):
        raise ValueError(f"max_norm: expected caps >= 0, not {max_norm.detach().min().item()}")
