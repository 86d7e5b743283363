"""The Trainer of Hugging Face transformers, clipping by component: in its own place, or as a callback.

The mixin does all that the callback does, in one pass less over the gradients, and only with it does one parameter's
inf leave the others' gradients as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import transformers
from torch import Tensor, nn
from transformers import Trainer

from ..result import ClipResult
from ._already import refuse_double_clipping
from ._trainer_callback import ComponentClipCallback
from ._trainer_clipping import TrainerClipping
from .accelerate import check_gradients_are_here

__all__ = ["ComponentClipCallback", "ComponentClipTrainerMixin"]

# What of Trainer is replaced, and isn't part of what it promises.
_PRIVATE: dict[str, list[str] | None] = {
    "_clip_grad_norm": ["self", "model"],
    "_get_grad_norm": ["self", "model", "grad_norm"],
    "_save_optimizer_and_scheduler": ["self", "output_dir"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_inner_training_loop": None,  # with whatever parameters: they are handed on
}

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class ComponentClipTrainerMixin(_Base):  # type: ignore[misc]  # mypy doesn't look into transformers
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
        RuntimeError: this version of transformers has another Trainer than this class is made for; DeepSpeed,
            Megatron-LM or XLA have the gradients; or, at a step, a clipper is attached to the optimizer.

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

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        # With auto_find_batch_size it begins again, with smaller batches, after there was too little memory.
        self._clipping.start_again()
        return super()._inner_training_loop(*args, **kwargs)

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
        optimizers = accelerator._optimizers
        scaler = getattr(accelerator, "scaler", None)
        clipper = self._clipping.clipper_for(model, self.args.max_grad_norm, scaled=scaler is not None)
        refuse_double_clipping(optimizers, scaler, self._clipping.clipped, "ComponentClipTrainerMixin")
        accelerator.unscale_gradients()
        return self._clipping.clip_(clipper, scaler, optimizers)

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


def _check_trainer(cls: type[ComponentClipTrainerMixin]) -> None:
    """Raises unless a class inherits from both, in the order that lets this mixin's methods be the ones called."""
    order = cls.__mro__
    if order.index(Trainer) < order.index(ComponentClipTrainerMixin):
        raise TypeError(f"{cls.__name__}: put ComponentClipTrainerMixin before Trainer among its bases")
    for name, expected in _PRIVATE.items():
        method = getattr(super(ComponentClipTrainerMixin, cls), name, None)
        found = None if method is None else list(inspect.signature(method).parameters)
        if found is None or expected not in (None, found):
            was = "there" if expected is None else f"({', '.join(expected)})"
            has = "no such method" if found is None else f"({', '.join(found)})"
            raise RuntimeError(
                f"{cls.__name__}: ComponentClipTrainerMixin isn't made for transformers {transformers.__version__}: "
                f"Trainer.{name} was {was}, here it is {has}; use ComponentClipCallback, with "
                "max_grad_norm=0"
            )


def _lineage(cls: type) -> str:
    order = cls.__mro__
    return ", ".join(c.__name__ for c in order[: order.index(Trainer) + 1] if c is not ComponentClipTrainerMixin)
