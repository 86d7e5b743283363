"""The keyword options that all ways to clip share, as a type."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

from ..components.spec import Grouping

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class ClipOptions(TypedDict, total=False):
    """Keyword options that all ways to clip share.

    Attributes:
        components: as for :func:`cwclip_kernels.fused_component_clip_`, like all of these.
        eps: 1e-6 unless given.
        nonfinite: "propagate" unless given.
        process_group: none unless given; trainers' ways find FSDP's.
        backend: the best available unless given.
    """

    components: Grouping
    eps: float
    nonfinite: str
    process_group: ProcessGroup | DeviceMesh | None
    backend: str | None
