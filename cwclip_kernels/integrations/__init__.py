"""Component clipping in trainers, one module for each, most with a replacement for the trainer's own call.

    torchtitan     ``clip_grad_norm_`` in place of ``torchtitan.distributed.utils.clip_grad_norm_``
    accelerate     ``clip_grad_norm_`` in place of ``Accelerator.clip_grad_norm_``
    deepspeed      ``attach``, after which an engine's steps clip, also those that the other trainers make
    timm           ``dispatch_clip_grad`` in place of ``timm.utils.dispatch_clip_grad``
    fabric         ``clip_gradients`` in place of Lightning's ``Fabric.clip_gradients``
    lightning      ``ComponentClip``, a callback; ``configure_gradient_clipping`` for the hook of that name
    transformers   ``ComponentClipTrainerMixin`` and ``ComponentClipCallback`` for ``Trainer``

With ``optim.ComponentClipAdamW``, which clips in its own step, none of these is used, and each refuses it;
``transformers`` has ``ComponentClipLogCallback``, which logs what it clips.

Replacements return what the originals do: the norm of all components together. Only ``lightning`` and
``transformers`` import their trainers.
"""
