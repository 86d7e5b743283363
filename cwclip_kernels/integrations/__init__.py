"""Component clipping where a trainer clips: one module for each, with the trainer's own call.

    torchtitan   ``clip_grad_norm_`` in place of ``torchtitan.distributed.utils.clip_grad_norm_``
    accelerate   ``clip_grad_norm_`` in place of ``Accelerator.clip_grad_norm_``
    lightning    ``ComponentClip``, a callback; ``configure_gradient_clipping`` for the hook of that name

The calls return what the trainer's own do, for its log: the norm of all components together. None imports its
trainer, but for Lightning, whose callbacks are of its class.
"""
