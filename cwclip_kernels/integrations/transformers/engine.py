"""A Trainer under DeepSpeed: whose ``gradient_clipping`` its configuration has."""

from __future__ import annotations

from typing import Any

from transformers import TrainingArguments


def check_configuration(args: TrainingArguments, accelerator: Any, *, clips_max_grad_norm: bool) -> None:
    """Raises RuntimeError if DeepSpeed is set to clip, too, and not just by default.

    Trainer replaces "auto" by ``max_grad_norm`` in its copy of the configuration, and newer versions of DeepSpeed
    clip to 1.0 where it says nothing. Neither is a wish to clip by one norm as well.

    Args:
        args: the Trainer's.
        accelerator: Accelerate's ``Accelerator``, or its ``state``.
        clips_max_grad_norm: whether ``max_grad_norm`` is the cap of components.
    """
    if args.deepspeed:
        from accelerate.utils.deepspeed import HfDeepSpeedConfig

        written = HfDeepSpeedConfig(args.deepspeed).get_value("gradient_clipping")
    else:  # started by accelerate's launcher
        written = accelerator.deepspeed_plugin.gradient_clipping
    if written == "auto":
        if args.max_grad_norm and not clips_max_grad_norm:
            raise RuntimeError(
                f"max_grad_norm of TrainingArguments (1.0 by default) is {args.max_grad_norm!r}, to which DeepSpeed "
                'would clip all by one norm, since its configuration has "gradient_clipping": "auto"; set '
                "max_grad_norm=0"
            )
    elif written:
        raise RuntimeError(
            f'TrainingArguments(deepspeed=...): the configuration has "gradient_clipping": {written!r}, by one norm; '
            'set it to "auto" to clip by component instead'
        )
