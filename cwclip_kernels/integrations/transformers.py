"""The Trainer of Hugging Face transformers, clipping by component: in its own place, or as a callback.

The mixin does all that the callback does, in one pass less over the gradients, and only with it does one parameter's
inf leave the others' gradients as they are.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import transformers
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..caps import MaxNorm
from ..clipper import ClipResult
from ..components import Grouping
from .accelerate import check_gradients_are_here
from .already import warn_already_clipped
from .trainer_clipping import TrainerClipping

# What of Trainer is replaced, and isn't part of what it promises.
_PRIVATE = {
    "_clip_grad_norm": ["self", "model"],
    "_get_grad_norm": ["self", "model", "grad_norm"],
    "_save_optimizer_and_scheduler": ["self", "output_dir"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
}

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class ComponentClipTrainerMixin(_Base):
    """A ``Trainer`` that clips each component's gradient to its own norm, where it would clip all by one.

    Put it before ``Trainer``, or any class derived from it. The cap of each component is ``max_grad_norm`` of the
    ``TrainingArguments`` (0 clips nothing), unless ``component_clipping`` says more. It clips once per optimizer
    step, after accumulation and unscaling, under DistributedDataParallel, FSDP 1 and 2.

    Trainer's log has, beside ``grad_norm`` (of all components, before clipping), ``clip_rate``, ``clip_ratio_max``,
    ``component_norm_max`` and ``component_norm_nonfinite`` of the steps since the last log. What caps that learn have
    learnt is in each checkpoint that has the optimizer's state, and ``resume_from_checkpoint`` goes on to the bit.

    Args:
        args: as for ``Trainer``, like all but the next.
        component_clipping: keyword arguments of ``ComponentClipper``: ``max_norm`` (a number, mapping, tensor or one
            of ``thresholds``, in place of ``max_grad_norm``), ``components``, ``nonfinite`` ...; and ``log_norms``, a
            pattern of components whose norms are logged as ``component_norm/<name>``, ``on_clip``, called with each
            ``ClipResult``.
        kwargs: as for ``Trainer``.

    Attributes:
        component_clipping: what instances take that are given none; of a class.
        last_clip: the ``ClipResult`` of the last step; None before the first.

    Raises:
        TypeError, ValueError: ``component_clipping`` isn't what it should be, or doesn't fit the model.
        RuntimeError: this version of transformers has another Trainer than this class is made for; or DeepSpeed,
            Megatron-LM or XLA have the gradients.

    Example:
        >>> import tempfile, torch
        >>> from transformers import Trainer, TrainingArguments
        >>> from cwclip_kernels.integrations.transformers import ComponentClipTrainerMixin
        >>> class Model(torch.nn.Linear):
        ...     def forward(self, x):
        ...         return {"loss": super().forward(x).sum()}
        >>> class ClippingTrainer(ComponentClipTrainerMixin, Trainer):
        ...     pass
        >>> folder = tempfile.TemporaryDirectory()
        >>> args = TrainingArguments(folder.name, max_grad_norm=0.05, max_steps=1, use_cpu=True, disable_tqdm=True)
        >>> trainer = ClippingTrainer(Model(2, 1), args, train_dataset=[{"x": [3.0, 4.0]}])
        >>> _ = trainer.train()  # doctest: +ELLIPSIS
        {'train_runtime': ...}
        >>> trainer.last_clip.as_dict()
        {'weight': (5.0, 0.0099...), 'bias': (1.0, 0.0499...)}
        >>> folder.cleanup()

    References:
        https://huggingface.co/docs/transformers/main_classes/trainer (5.24).
    """

    component_clipping: ClassVar[Mapping[str, Any]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if issubclass(cls, Trainer):
            _check_trainer(cls)

    def __init__(self, *args: Any, component_clipping: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if not isinstance(self, Trainer):
            raise TypeError(
                f"{type(self).__name__} is no Trainer: give it ComponentClipTrainerMixin and then Trainer as bases"
            )
        options = self.component_clipping if component_clipping is None else component_clipping
        self._clipping = TrainerClipping(**options)
        super().__init__(*args, **kwargs)
        check_gradients_are_here(self.accelerator)
        self._clipping.check(self.model, self.args.max_grad_norm)

    @property
    def last_clip(self) -> ClipResult | None:
        """What the last step's clipping found and did; None before the first."""
        return self._clipping.last

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``."""
        if any(isinstance(callback, ComponentClipCallback) for callback in self.callback_handler.callbacks):
            raise ValueError("callbacks: ComponentClipCallback would clip again what has been clipped; drop it")
        self._clipping.start(anew=self.model_init is not None)
        return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As ``Trainer.log``, with the numbers of the steps since the last log."""
        if "loss" in logs and "learning_rate" in logs:
            if not self._clipping.steps:
                raise RuntimeError(
                    "steps have been taken, and nothing was clipped: this training loop doesn't call "
                    f"_clip_grad_norm, as that of transformers {transformers.__version__} or of one of the classes "
                    f"{_lineage(type(self))}; use ComponentClipCallback, with max_grad_norm=0"
                )
            logs.update(self._clipping.numbers())
        super().log(logs, *args, **kwargs)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        accelerator = self.accelerator
        is_scaled = getattr(accelerator, "scaler", None) is not None
        clipper = self._clipping.clipper_for(model, self.args.max_grad_norm, scaled=is_scaled)
        accelerator.unscale_gradients()
        return self._clipping.clip_(clipper)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Tensor:
        # With max_grad_norm=0 Trainer clips to inf here, to learn the norm; a single inf is NaN everywhere then.
        return self._clip_grad_norm(model) if grad_norm is None else grad_norm

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self._clipping.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._clipping.load(checkpoint)


class ComponentClipCallback(TrainerCallback):
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
        RuntimeError: when training begins, if DeepSpeed, Megatron-LM or XLA have the gradients.

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

    @property
    def last_clip(self) -> ClipResult | None:
        """What the last step's clipping found and did; None before the first."""
        return self._clipping.last

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Looks whether gradients can be clipped here, and goes on from a checkpoint."""
        check_gradients_are_here(kwargs["optimizer"].accelerator_state)
        warn_already_clipped(
            "max_grad_norm of TrainingArguments (1.0 by default)", args.max_grad_norm, "set max_grad_norm=0"
        )
        self._clipping.start(anew=state.is_hyper_param_search)
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
        if scaler is not None:
            inner = optimizer.optimizer
            if scaler._per_optimizer_states[id(inner)]["stage"].name == "READY":
                scaler.unscale_(inner)
        self._clipping.clip_(clipper)

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


def _check_trainer(cls: type[ComponentClipTrainerMixin]) -> None:
    """Raises unless a class inherits from both, in the order that lets this mixin's methods be the ones called."""
    order = cls.__mro__
    if order.index(Trainer) < order.index(ComponentClipTrainerMixin):
        raise TypeError(f"{cls.__name__}: put ComponentClipTrainerMixin before Trainer among its bases")
    for name, expected in _PRIVATE.items():
        method = getattr(super(ComponentClipTrainerMixin, cls), name, None)
        found = None if method is None else list(inspect.signature(method).parameters)
        if found != expected:
            has = "no such method" if found is None else f"({', '.join(found)})"
            raise RuntimeError(
                f"{cls.__name__}: ComponentClipTrainerMixin isn't made for transformers {transformers.__version__}: "
                f"Trainer.{name} was ({', '.join(expected)}), here it is {has}; use ComponentClipCallback, with "
                "max_grad_norm=0"
            )


def _lineage(cls: type) -> str:
    order = cls.__mro__
    return ", ".join(c.__name__ for c in order[: order.index(Trainer) + 1] if c is not ComponentClipTrainerMixin)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> str:
    return os.path.join(str(args.output_dir), f"checkpoint-{state.global_step}")


def _fingerprint(state: TrainerState) -> str:
    """What tells a run's checkpoint from another's of the same step: all that had been logged."""
    return hashlib.sha256(json.dumps(state.log_history, sort_keys=True).encode()).hexdigest()
