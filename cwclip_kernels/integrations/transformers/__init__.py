"""Clipping by component in the Trainer of Hugging Face transformers: a mixin for its class, or a callback.

The mixin does all that the callback does with one pass less over the gradients, and only with it a parameter's inf
leaves the other gradients as they are.
"""

from .callback import ComponentClipCallback
from .mixin import ComponentClipTrainerMixin

__all__ = ["ComponentClipCallback", "ComponentClipTrainerMixin"]
