"""Clipping by component in Lightning, imported as ``lightning.pytorch`` or as ``pytorch_lightning``."""

from .callback import ComponentClip, configure_gradient_clipping

__all__ = ["ComponentClip", "configure_gradient_clipping"]
