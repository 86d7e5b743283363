"""Clipping while the backward pass is still running: each parameter the moment its gradient is final."""

from .clipping import BackwardClipping, clip_in_backward
from .hooks import clipped_in_backward

__all__ = ["BackwardClipping", "clip_in_backward", "clipped_in_backward"]
