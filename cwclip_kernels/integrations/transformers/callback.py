"""``ComponentClipCallback``, for a Trainer that can't be subclassed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from typing import Any

from accelerate.state import AcceleratorState
from transformers import TrainerCallback, TrainerState, TrainingArguments
from typing_extensions import Unpack

from ...core.options import ClipOptions
from ...result import ClipResult
from ...thresholds.constant import MaxNorm
from .._common import innermost, is_deepspeed
from ..accelerate import check_gradients_are_here
from ..deepspeed.internals.engine import engine_around
from .clipping import TrainerClipping
from .engine import check_configuration
from .reporters import begin_reporting, end_reporting
from .step_log import warn_of_max_grad_norm


class ComponentClipCallback(TrainerCallback):  # type: ignore[misc]  # mypy doesn't look into transformers
    """Clips each component's gradient by its own norm, for a Trainer that can't be subclassed.

    Set ``max_grad_norm=0``, or Trainer clips all by one norm before. Even then it first measures the gradients, by
    clipping them to inf, which makes all of them NaN if one has an inf; only ``ComponentClipTrainerMixin`` avoids
    that. Under DeepSpeed, whose engine clips and steps before Trainer measures, neither happens; ``max_grad_norm``
    should be 0 there if the configuration has ``"gradient_clipping": "auto"``.

    The Trainer's log gets the same numbers as with the mixin, in ``trainer.state.log_history`` and in the ``on_log``
    of every callback, so that TensorBoard, W&B, MLflow and the others of ``args.report_to`` have them. What caps have
    learnt is saved with each checkpoint, and loaded when training resumes from ``args.resume_from_checkpoint`` or a
    checkpoint in ``args.output_dir``.

    Args:
        max_norm: as for ``ComponentClipper``: a number, a mapping, a tensor, or one of ``thresholds``.
        norm_type: as for ``ComponentClipper``.
        error_if_nonfinite: as for ``ComponentClipper``.
        log_norms: ``fnmatch`` pattern of components whose own norms are logged as well.
        on_clip: called with each ``ClipResult``, such as ``ClipRecorder.record``.
        options: ``components``, ``eps``, ``nonfinite``, ``process_group`` and ``backend`` of ``ComponentClipper``.
            Names are those of the model, whatever wraps it; FSDP's process group is found.

    Attributes:
        last: the ``ClipResult`` of the last step; None before the first. ``last_clip`` is its older name.

    Raises:
        TypeError, ValueError: a wrong argument.
        RuntimeError: when the Trainer is made, or training begins, if Megatron-LM, XLA or SageMaker's model
            parallelism clip the gradients, or DeepSpeed's engine is set to clip, too, or isn't served; at a step, if
            a clipper is attached to the optimizer, or it clips in its own step (``ComponentClipAdamW``, with which
            ``ComponentClipLogCallback`` goes).

    Example:
        >>> import tempfile, torch
        >>> from transformers import Trainer, TrainingArguments
        >>> from cwclip_kernels.integrations.transformers import ComponentClipCallback
        >>> class Model(torch.nn.Linear):
        ...     def forward(self, x):
        ...         return {"loss": super().forward(x).sum()}
        >>> folder = tempfile.TemporaryDirectory()
        >>> args = TrainingArguments(folder.name, max_grad_norm=0, max_steps=1, use_cpu=True, disable_tqdm=True)
        >>> clip = ComponentClipCallback(0.05)
        >>> _ = Trainer(Model(2, 1), args, train_dataset=[{"x": [3.0, 4.0]}], callbacks=[clip]).train()
        {'train_runtime': ...}
        >>> clip.last.as_dict()
        {'weight': (5.0, 0.0099...), 'bias': (1.0, 0.0499...)}
        >>> folder.cleanup()
    """

    def __init__(
        self,
        max_norm: MaxNorm,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        *,
        log_norms: str | None = None,
        on_clip: Callable[[ClipResult], object] | None = None,
        **options: Unpack[ClipOptions],
    ) -> None:
        self._clipping = TrainerClipping(
            max_norm, norm_type, error_if_nonfinite, log_norms=log_norms, on_clip=on_clip, **options
        )
        self._batch_size: int | None = None  # of a run that has begun and not ended

    @property
    def last(self) -> ClipResult | None:
        """The ``ClipResult`` of the last step; None before the first."""
        return self._clipping.last

    last_clip = last

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Checks that gradients can be clipped here, before anything is prepared."""
        _check(AcceleratorState(), args)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Checks the same for a callback that was added later, and goes on from a checkpoint."""
        optimizer, model = kwargs["optimizer"], kwargs["model"]
        has_engine = _check(optimizer.accelerator_state, args)
        is_again = args.auto_find_batch_size and self._begins_again(state)
        self._clipping.start(again=is_again, anew=state.is_hyper_param_search)
        self._batch_size = state.train_batch_size
        begin_reporting(self._clipping)
        if has_engine:
            self._clipping.attach(engine_around(model, innermost(optimizer)))
        else:
            warn_of_max_grad_norm(args)
            self._clipping.check(model, None)
        if state.global_step:
            named, own = args.resume_from_checkpoint, _checkpoint(args, state)
            folders = [named, own] if isinstance(named, str) else [own]
            self._clipping.load(*folders, run=_fingerprint(state))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any
    ) -> None:
        """Clips, after unscaling if that wasn't done."""
        optimizer = kwargs["optimizer"]
        if is_deepspeed(optimizer.accelerator_state):
            return  # its engine has clipped, and stepped
        scaler, inner = getattr(optimizer, "scaler", None), innermost(optimizer)

        def unscale() -> None:
            if scaler is not None and scaler._per_optimizer_states[id(inner)]["stage"].name == "READY":
                scaler.unscale_(inner)

        self._clipping.clip_(kwargs["model"], None, [optimizer], scaler, unscale, "ComponentClipCallback")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Ends the run, so that the next one is another."""
        self._batch_size = None
        end_reporting(self._clipping)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any
    ) -> None:
        """Adds the numbers of the steps since the last log, if the Trainer's log hasn't got them before."""
        self._clipping.add_to(logs, state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Saves what caps have learnt beside the optimizer's state."""
        if args.should_save and not args.save_only_model and os.path.isdir(_checkpoint(args, state)):
            self._clipping.save(_checkpoint(args, state), run=_fingerprint(state))

    def _begins_again(self, state: TrainerState) -> bool:
        """Whether the run that has begun begins again, with a smaller batch size, after it ran out of memory."""
        is_resumed = state.global_step > 0  # with the batch size of its checkpoint
        return self._batch_size is not None and (is_resumed or state.train_batch_size < self._batch_size)


def _check(accelerator_state: Any, args: TrainingArguments) -> bool:
    """Whether DeepSpeed's engine clips; RuntimeError if gradients can't be clipped here."""
    check_gradients_are_here(accelerator_state)
    has_engine = is_deepspeed(accelerator_state)
    if has_engine:
        check_configuration(args, accelerator_state, clips_max_grad_norm=False)
    return has_engine


def _checkpoint(args: TrainingArguments, state: TrainerState) -> str:
    return os.path.join(str(args.output_dir), f"checkpoint-{state.global_step}")


def _fingerprint(state: TrainerState) -> str:
    """Tells a run's checkpoint from another run's of the same step, by all that had been logged."""
    return hashlib.sha256(json.dumps(state.log_history, sort_keys=True).encode()).hexdigest()
