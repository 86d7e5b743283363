"""Clipping by component in Lightning: a callback, and a call for ``LightningModule.configure_gradient_clipping``.

    trainer = Trainer(callbacks=[ComponentClip(0.05)])

Both work with ``lightning.pytorch`` and with ``pytorch_lightning``.
"""

from .callback import ComponentClip
from .hook import configure_gradient_clipping

__all__ = ["ComponentClip", "configure_gradient_clipping"]
