"""The options of a call: their type, and the scalar ones checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from ..arguments import check_float_tensor, check_type, checked_number, type_name
from ..backends import registry
from ..components.spec import Grouping
from ..thresholds import Threshold
from ..thresholds.by_pattern import settled
from ..thresholds.constant import MaxNorm
from .formula import POLICIES, ClipRule
from .modes import is_traced

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class ClipOptions(TypedDict, total=False):
    """Keyword options that all ways to clip share.

    Attributes:
        components: as for :func:`cwclip_kernels.fused_component_clip_`, like all of these.
        eps: 1e-6 unless given.
        nonfinite: "propagate" unless given.
        process_group: none unless given; FSDP's is found.
        backend: the best available unless given.
    """

    components: Grouping
    eps: float
    nonfinite: str
    process_group: ProcessGroup | DeviceMesh | None
    backend: str | None


@dataclass(frozen=True)
class Options:
    """The scalar arguments of a call; backend None for the best available."""

    rule: ClipRule
    raise_nonfinite: bool
    backend: str | None

    @property
    def nonfinite(self) -> str:
        """The non-finite policy, "error" included."""
        return "error" if self.raise_nonfinite else self.rule.nonfinite

    def in_words(self, max_norm: MaxNorm = math.inf, pp_mesh: object = None) -> str:
        """The arguments that all ranks must have alike; stages of a pipeline may have other caps."""
        rule = self.rule
        text = f"norm_type={rule.norm_type:g}, eps={rule.eps:g}, nonfinite={self.nonfinite!r}"
        if pp_mesh is not None:
            return text
        max_norm = settled(max_norm)
        kind = type_name(max_norm) if isinstance(max_norm, Tensor) else repr(max_norm)
        return f"{text}, max_norm={max_norm if isinstance(max_norm, Threshold) else kind}"


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


def checked_coefs(coefs: object, count: int) -> Tensor:
    """Coefficients as a Tensor [] or [count], or an error that says what is wrong."""
    if not isinstance(coefs, Tensor):
        kinds = "a number or a Tensor of shape [] or [K]"
        return torch.tensor(checked_number(coefs, "coefs", -math.inf, kinds=kinds), dtype=torch.float64, device="cpu")
    check_float_tensor(coefs, "coefs")
    if coefs.shape not in ((), (count,)):
        raise ValueError(f"coefs: expected shape [] or [{count}] (one for each component), not {list(coefs.shape)}")
    return coefs


def check_norms(norms: object, count: int) -> None:
    """Raises unless these can be the norms of ``count`` components."""
    if not isinstance(norms, Tensor):
        raise TypeError(f"norms: expected a Tensor of shape [{count}], not {type_name(norms)}")
    check_float_tensor(norms, "norms")
    if norms.shape != (count,):
        raise ValueError(f"norms: expected shape [{count}] (one for each component), not {list(norms.shape)}")
    # On another device reading them would be a host sync.
    if norms.device.type == "cpu" and not is_traced() and bool((norms < 0).any()):
        raise ValueError(f"norms: expected norms >= 0, not {norms.min().item()}")


_ONE_POLICY = f"one of {', '.join(POLICIES)}"


def _checked_order(norm_type: object) -> float:
    if isinstance(norm_type, str) and norm_type in ("inf", "-inf"):  # torch's own spelling
        return float(norm_type)
    return checked_number(norm_type, "norm_type", -math.inf, finite=False, kinds="a number or 'inf'")
