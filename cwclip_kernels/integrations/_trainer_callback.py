"""A callback that clips by component in a Trainer of transformers that can't be given another class."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from typing import Any

from accelerate.state import AcceleratorState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..components.spec import Grouping
from ..result import ClipResult
from ..thresholds.constant import MaxNorm
from ._already import refuse_double_clipping, warn_already_clipped
from ._optimizers import innermost
from ._trainer_clipping import TrainerClipping
from .accelerate import check_gradients_are_here


class ComponentClipCallback(TrainerCallback):  # type: ignore[misc]  # mypy doesn't look into transformers
    """Clips each component's gradient to its own norm, for a Trainer that can't be given another class.

    Set ``max_grad_norm=0``, or Trainer clips all by one norm before. Even so it measures the gradients before this
    callback is asked, by clipping them to inf, which makes all of them NaN where one has an inf: only
    ``ComponentClipTrainerMixin`` keeps them apart.

    ``trainer.state.log_history`` gets the same numbers as with the mixin, and so do callbacks that come later; the
    Trainer's own reporters (TensorBoard, ...) come earlier. What caps that learn have learnt is in each checkpoint,
    and taken from there when training resumes from ``args.resume_from_checkpoint`` or a checkpoint in
    ``args.output_dir``.

    Args:
        max_norm: as for ``ComponentClipper``: a number, a mapping, a tensor, or one of ``thresholds``.
        norm_type: as for ``ComponentClipper``.
        error_if_nonfinite: likewise.
        components: likewise; names are those of the model, whatever wraps it.
        eps: likewise.
        nonfinite: likewise.
        backend: likewise.
        log_norms: ``fnmatch`` pattern of components whose own norms are logged, too.
        on_clip: called with each ``ClipResult``, such as ``ClipRecorder.record``.

    Attributes:
        last_clip: the ``ClipResult`` of the last step; None before the first.

    Raises:
        TypeError, ValueError: an argument that isn't what it should be.
        RuntimeError: when the Trainer is made, or training begins, if DeepSpeed, Megatron-LM or XLA have the
            gradients; at a step, if a clipper is attached to the optimizer.

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
        >>> clip.last_clip.as_dict()
        {'weight': (5.0, 0.0099...), 'bias': (1.0, 0.0499...)}
        >>> folder.cleanup()
    """

    def __init__(
        self,
        max_norm: MaxNorm,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        *,
        components: Grouping = None,
        eps: float = 1e-6,
        nonfinite: str = "propagate",
        backend: str | None = None,
        log_norms: str | None = None,
        on_clip: Callable[[ClipResult], object] | None = None,
    ) -> None:
        self._clipping = TrainerClipping(
            max_norm,
            norm_type,
            error_if_nonfinite,
            components=components,
            eps=eps,
            nonfinite=nonfinite,
            backend=backend,
            log_norms=log_norms,
            on_clip=on_clip,
        )
        self._batch_size: int | None = None  # of the run that has begun and not ended

    @property
    def last_clip(self) -> ClipResult | None:
        """What the last step's clipping found and did; None before the first."""
        return self._clipping.last

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Looks whether gradients can be clipped here, before anything is prepared."""
        check_gradients_are_here(AcceleratorState())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The same for a callback that was added later; and goes on from a checkpoint."""
        check_gradients_are_here(kwargs["optimizer"].accelerator_state)
        warn_already_clipped(
            "max_grad_norm of TrainingArguments (1.0 by default)", args.max_grad_norm, "set max_grad_norm=0"
        )
        if args.auto_find_batch_size and self._begins_again(state):
            self._clipping.start_again()
        else:
            self._clipping.start(anew=state.is_hyper_param_search)
        self._batch_size = state.train_batch_size
        self._clipping.check(kwargs["model"], None)
        if state.global_step:
            told = args.resume_from_checkpoint
            own = _checkpoint(args, state)
            self._clipping.load(*([told, own] if isinstance(told, str) else [own]), run=_fingerprint(state))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Clips; before that it unscales, if nobody has."""
        optimizer = kwargs["optimizer"]
        scaler = getattr(optimizer, "scaler", None)
        clipper = self._clipping.clipper_for(kwargs["model"], None, scaled=scaler is not None)
        refuse_double_clipping([optimizer], scaler, self._clipping.clipped, "ComponentClipCallback")
        if scaler is not None:
            inner = innermost(optimizer)
            if scaler._per_optimizer_states[id(inner)]["stage"].name == "READY":
                scaler.unscale_(inner)
        self._clipping.clip_(clipper, scaler, [optimizer])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes note that the next run is another one."""
        self._batch_size = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds the numbers of the steps since the last log."""
        if logs is not None and "loss" in logs and "learning_rate" in logs:
            numbers = self._clipping.numbers()
            logs.update(numbers)
            state.log_history[-1].update(numbers)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Puts what caps have learnt beside the optimizer's state."""
        if args.should_save and not args.save_only_model and os.path.isdir(_checkpoint(args, state)):
            self._clipping.save(_checkpoint(args, state), run=_fingerprint(state))

    def _begins_again(self, state: TrainerState) -> bool:
        """Whether this is the run that has begun before, again, with batches that fit into memory."""
        if self._batch_size is None:
            return False
        # One that goes on from a checkpoint has the batch size of that.
        return bool(state.global_step) or state.train_batch_size < self._batch_size


def _checkpoint(args: TrainingArguments, state: TrainerState) -> str:
    return os.path.join(str(args.output_dir), f"checkpoint-{state.global_step}")


def _fingerprint(state: TrainerState) -> str:
    """What tells a run's checkpoint from another's of the same step: all that had been logged."""
    return hashlib.sha256(json.dumps(state.log_history, sort_keys=True).encode()).hexdigest()
