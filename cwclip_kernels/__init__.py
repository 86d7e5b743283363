"""Component-wise gradient norm clipping, fused.

Example:
    >>> import torch
    >>> from cwclip_kernels import fused_component_clip_
    >>> model = torch.nn.Linear(2, 1)
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> fused_component_clip_(model, max_norm=0.05)
    tensor([1.4142, 1.0000])
"""

from . import thresholds
from ._version import __version__
from .attachment import Attachment
from .clipper import ComponentClipper
from .components.spec import ComponentSpec
from .functional import component_clip_with_norms_, component_norms, component_scale_, fused_component_clip_
from .grad_scaler import ComponentClipGradScaler
from .gradients import clip_gradients, clip_gradients_
from .in_backward.clipping import BackwardClipping, clip_in_backward
from .result import ClipResult

__all__ = [
    "Attachment",
    "BackwardClipping",
    "ClipResult",
    "ComponentClipGradScaler",
    "ComponentClipper",
    "ComponentSpec",
    "__version__",
    "clip_gradients",
    "clip_gradients_",
    "clip_in_backward",
    "component_clip_with_norms_",
    "component_norms",
    "component_scale_",
    "fused_component_clip_",
    "thresholds",
]
