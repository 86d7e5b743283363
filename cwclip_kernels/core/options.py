"""The keyword options that all ways to clip share, as a type."""

from __future__ import annotations

from typing import TypedDict

from ..components.spec import Grouping


class ClipOptions(TypedDict, total=False):
    """Keyword options that all ways to clip share.

    Attributes:
        components: as for :func:`cwclip_kernels.fused_component_clip_`, like all of these.
        eps: 1e-6 unless given.
        nonfinite: "propagate" unless given.
        backend: the best available unless given.
    """

    components: Grouping
    eps: float
    nonfinite: str
    backend: str | None
