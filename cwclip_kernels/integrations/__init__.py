"""Component clipping where a trainer clips: one module for each, with the trainer's own call.

    torchtitan     ``clip_grad_norm_`` in place of ``torchtitan.distributed.utils.clip_grad_norm_``
    accelerate     ``clip_grad_norm_`` in place of ``Accelerator.clip_grad_norm_``
    timm           ``dispatch_clip_grad`` in place of ``timm.utils.dispatch_clip_grad``
    transformers   ``ComponentClipTrainerMixin`` and ``ComponentClipCallback`` for ``Trainer``

What returns the norm of all components together, for a log, still does. ``transformers`` imports its trainer; no
other does.

``trainer_clipping`` is what ways into a trainer share, ``trainer_callback`` has the callback, ``already`` warns where
a trainer clips by itself as well.
"""
