"""Component clipping where a trainer clips: one module for each, with the trainer's own call.

    torchtitan   ``clip_grad_norm_`` in place of ``torchtitan.distributed.utils.clip_grad_norm_``
    accelerate   ``clip_grad_norm_`` in place of ``Accelerator.clip_grad_norm_``

Each returns what the trainer's own does, the norm of all components together, for its log. None imports its trainer.
"""
