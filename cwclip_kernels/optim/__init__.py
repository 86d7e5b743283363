"""Optimizers whose step clips: the clipped gradient is never written."""

from .adamw import ComponentClipAdamW

__all__ = ["ComponentClipAdamW"]
