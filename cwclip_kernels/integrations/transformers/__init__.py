"""Clipping by component in the Trainer of Hugging Face transformers. If you can't subclass it, use the callback.

With ``optim.ComponentClipAdamW``, which clips by itself, ``ComponentClipLogCallback`` only logs.
"""

from .callback import ComponentClipCallback
from .log import ComponentClipLogCallback
from .mixin import ComponentClipTrainerMixin

__all__ = ["ComponentClipCallback", "ComponentClipLogCallback", "ComponentClipTrainerMixin"]
