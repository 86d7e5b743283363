"""Clipping by component in Lightning, imported as ``lightning.pytorch`` or as ``pytorch_lightning``.

A module whose ``configure_optimizers`` returns ``optim.ComponentClipAdamW`` needs neither. Leave the Trainer's
``gradient_clip_val`` unset then: Lightning would clip all gradients by one norm before, and refuses to only where it
scales the loss. The step's result is ``self.optimizers().last``.
"""

from .callback import ComponentClip, configure_gradient_clipping

__all__ = ["ComponentClip", "configure_gradient_clipping"]
