"""Component clipping where a trainer clips: one module for each, with the trainer's own call.

    torchtitan     ``clip_grad_norm_`` in place of ``torchtitan.distributed.utils.clip_grad_norm_``
    accelerate     ``clip_grad_norm_`` in place of ``Accelerator.clip_grad_norm_``
    timm           ``dispatch_clip_grad`` in place of ``timm.utils.dispatch_clip_grad``
    lightning      ``ComponentClip``, a callback; ``configure_gradient_clipping`` for the hook of that name
    transformers   ``ComponentClipTrainerMixin`` and ``ComponentClipCallback`` for ``Trainer``

The calls return what the trainer's own do: for its log, the norm of all components together. None imports its
trainer, but for Lightning and transformers, whose callbacks are of their classes.
"""
