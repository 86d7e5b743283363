"""Clipping while the backward pass still runs: each parameter as soon as its gradient is final."""

from .clipping import BackwardClipping, clip_in_backward
from .hooks import clipped_in_backward

__all__ = ["BackwardClipping", "clip_in_backward", "clipped_in_backward"]
