"""``ComponentClipLogCallback``, for a Trainer whose optimizer clips."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate.state import AcceleratorState
from transformers import TrainerCallback, TrainerState, TrainingArguments

from ...arguments import type_name
from ...core.optimizers import clipping_optimizer
from ...result import ClipResult
from .._common import innermost, is_deepspeed
from ..accelerate import check_gradients_are_here
from .reporters import begin_reporting, end_reporting
from .step_log import StepLog, warn_of_max_grad_norm


class ComponentClipLogCallback(TrainerCallback):  # type: ignore[misc]  # mypy doesn't look into transformers
    """Logs what a ``ComponentClipAdamW`` clips: the numbers that ``ComponentClipCallback`` logs.

    The optimizer clips without it; a Trainer that has the optimizer needs no other callback or mixin of this package.
    Its keyword arguments go into ``optimizer_cls_and_kwargs``, with ``"named_parameters": model``, since Trainer's
    param groups have no names. Trainer's groups with and without weight decay may share components. Set
    ``max_grad_norm=0``, or Trainer clips all by one norm before; this callback warns if it isn't 0. Even then Trainer
    measures the gradients before the step, in a way that makes all of them NaN if one has an inf.

    ``clip_rate``, ``clip_ratio_max``, ``component_norm_max`` and ``component_norm_nonfinite`` are those of the steps
    since the last log, and go where ``ComponentClipCallback`` writes them. Checkpoints need no callback: what caps
    have learnt is part of the optimizer's state.

    Args:
        log_norms: ``fnmatch`` pattern of components whose own norms are logged as ``component_norm/<name>``.
        on_clip: called with each ``ClipResult``, such as ``ClipRecorder.record``.

    Attributes:
        last: the ``ClipResult`` of the last step; None before the first.

    Raises:
        TypeError: a wrong argument; or, when training begins, an optimizer that doesn't clip.
        ValueError: at the first step, ``log_norms`` matches no component.
        RuntimeError: Megatron-LM, XLA or SageMaker's model parallelism keep the gradients to themselves; or DeepSpeed
            gives the optimizer partitions, which ``ComponentClipTrainerMixin`` and ``ComponentClipCallback`` clip.

    Example:
        >>> import tempfile, torch
        >>> from transformers import Trainer, TrainingArguments
        >>> from cwclip_kernels.integrations.transformers import ComponentClipLogCallback
        >>> from cwclip_kernels.optim import ComponentClipAdamW
        >>> class Model(torch.nn.Linear):
        ...     def forward(self, x):
        ...         return {"loss": super().forward(x).sum()}
        >>> folder, model = tempfile.TemporaryDirectory(), Model(2, 1)
        >>> args = TrainingArguments(folder.name, max_grad_norm=0, max_steps=1, use_cpu=True, disable_tqdm=True)
        >>> optimizer = ComponentClipAdamW, {"lr": 1e-3, "max_norm": 0.05, "named_parameters": model}
        >>> log = ComponentClipLogCallback()
        >>> data = [{"x": [3.0, 4.0]}]
        >>> trainer = Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=optimizer, callbacks=[log])
        >>> _ = trainer.train()
        {'train_runtime': ...}
        >>> log.last.as_dict()
        {'weight': (5.0, 0.0099...), 'bias': (1.0, 0.0499...)}
        >>> folder.cleanup()
    """

    def __init__(
        self, *, log_norms: str | None = None, on_clip: Callable[[ClipResult], object] | None = None
    ) -> None:
        self._log = StepLog(log_norms, on_clip)

    @property
    def last(self) -> ClipResult | None:
        """The ``ClipResult`` of the last step; None before the first."""
        return self._log.last

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Checks that gradients can be clipped here, before anything is prepared."""
        _check(AcceleratorState())

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Checks the optimizer, and begins a run."""
        optimizer = kwargs["optimizer"]
        _check(optimizer.accelerator_state)
        if clipping_optimizer(optimizer) is None:
            raise TypeError(
                f"optimizer: {type_name(innermost(optimizer))} doesn't clip by itself, so that nothing would be "
                "logged: use ComponentClipAdamW, or ComponentClipCallback, which clips"
            )
        warn_of_max_grad_norm(args)
        self._log.begin()
        begin_reporting(self._log)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Ends the run."""
        end_reporting(self._log)

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Adds what the step found and did."""
        optimizer: Any = clipping_optimizer(kwargs["optimizer"])
        if optimizer.last is not None and optimizer.last is not self._log.last:  # there was a step
            self._log.add(optimizer.last)
            if self._log.steps == 1:
                self._log.logged(optimizer.last.names)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any
    ) -> None:
        """Adds the numbers of the steps since the last log, if the Trainer's log hasn't got them before."""
        self._log.add_to(logs, state)


def _check(accelerator_state: AcceleratorState) -> None:
    """Raises RuntimeError unless the optimizer can clip here."""
    check_gradients_are_here(accelerator_state)
    if is_deepspeed(accelerator_state):
        raise RuntimeError(
            "accelerator: DeepSpeed gives an optimizer flat partitions instead of parameters, so ComponentClipAdamW "
            "can't clip there; use torch.optim.AdamW, with ComponentClipTrainerMixin or ComponentClipCallback"
        )
