"""Clipping by component in the Trainer of Hugging Face transformers. If you can't subclass it, use the callback."""

from .callback import ComponentClipCallback
from .mixin import ComponentClipTrainerMixin

__all__ = ["ComponentClipCallback", "ComponentClipTrainerMixin"]
