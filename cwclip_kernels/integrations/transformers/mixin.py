"""``ComponentClipTrainerMixin``, which clips where ``Trainer`` would."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import transformers
from torch import Tensor, nn
from transformers import Trainer

from ...result import ClipResult
from .._common import is_deepspeed
from ..accelerate import check_gradients_are_here
from .callback import ComponentClipCallback
from .clipping import TrainerClipping
from .engine import check_configuration

# Private methods of Trainer that are replaced, with their parameters.
_PRIVATE = {
    "_clip_grad_norm": "(self, model)",
    "_get_grad_norm": "(self, model, grad_norm)",
    "_save_optimizer_and_scheduler": "(self, output_dir)",
    "_load_optimizer_and_scheduler": "(self, checkpoint)",
    "_inner_training_loop": "",  # any parameters, which are passed on
}

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class ComponentClipTrainerMixin(_Base):  # type: ignore[misc]  # mypy doesn't look into transformers
    """A ``Trainer`` that clips each component's gradient by its own norm, where it would clip all by one.

    Put it before ``Trainer``, or any class derived from it. The cap of each component is ``max_grad_norm`` of the
    ``TrainingArguments`` (0 clips nothing), unless ``component_clipping`` has a ``max_norm``. It clips once per
    optimizer step, after accumulation and unscaling, under DistributedDataParallel, FSDP 1 and 2, and DeepSpeed,
    whose configuration should have ``"gradient_clipping": "auto"``, or nothing of it.

    Beside ``grad_norm`` (of all components, before clipping) Trainer's log gets numbers of the steps since the last
    log: ``clip_rate`` (components clipped divided by components with a gradient, both summed over these steps),
    ``clip_ratio_max`` (largest norm over its cap), ``component_norm_max`` and ``component_norm_nonfinite``. What caps
    have learnt is in each checkpoint that has the optimizer's state; a resumed run goes on to the same bits.

    Args:
        args: as for ``Trainer``, like ``kwargs``.
        component_clipping: keyword arguments of ``ComponentClipCallback``: ``max_norm`` (in place of
            ``max_grad_norm``), ``components``, ``nonfinite`` ...; ``log_norms``, a pattern of components whose norms
            are logged as ``component_norm/<name>``; ``on_clip``, called with each ``ClipResult``.
        kwargs: as for ``Trainer``.

    Attributes:
        component_clipping: default of the argument, for subclasses to set.
        last: the ``ClipResult`` of the last step; None before the first. ``last_clip`` is its older name.

    Raises:
        TypeError, ValueError: ``component_clipping`` is wrong, or doesn't fit the model.
        RuntimeError: this version of transformers has another Trainer than this class is made for; Megatron-LM, XLA
            or SageMaker's model parallelism clip the gradients; DeepSpeed's configuration has a number as
            ``gradient_clipping``, or its engine isn't served; or, at a step, a clipper is attached to the optimizer,
            or it clips in its own step (``ComponentClipAdamW``, with which ``ComponentClipLogCallback`` goes).

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
        >>> trainer.last.as_dict()
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
                f"{type(self).__name__} is no Trainer: its bases should be ComponentClipTrainerMixin, Trainer"
            )
        options = self.component_clipping if component_clipping is None else component_clipping
        self._clipping = TrainerClipping(**options)
        super().__init__(*args, **kwargs)
        check_gradients_are_here(self.accelerator)
        if is_deepspeed(self.accelerator):
            check_configuration(self.args, self.accelerator, clips_max_grad_norm=True)
        if not any(hasattr(p, "ds_id") for p in self.model.parameters()):  # partitioned by DeepSpeed, of size 0 here
            self._clipping.check(self.model, self.args.max_grad_norm)

    @property
    def last(self) -> ClipResult | None:
        """The ``ClipResult`` of the last step; None before the first."""
        return self._clipping.last

    last_clip = last

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``."""
        if any(isinstance(callback, ComponentClipCallback) for callback in self.callback_handler.callbacks):
            raise ValueError("callbacks: ComponentClipCallback would clip again what has been clipped; leave it out")
        self._clipping.start(anew=self.model_init is not None)
        return super().train(*args, **kwargs)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        # With auto_find_batch_size it begins again with smaller batches after it ran out of memory.
        self._clipping.start(again=True)
        return super()._inner_training_loop(*args, **kwargs)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        if is_deepspeed(self.accelerator):
            self._clipping.attach(self.model_wrapped, self.args.max_grad_norm)
        return prepared

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As ``Trainer.log``, with the numbers of the steps since the last log."""
        if "loss" in logs and "learning_rate" in logs:
            if not self._clipping.steps and not is_deepspeed(self.accelerator):  # which may have skipped all
                order = type(self).__mro__
                classes = ", ".join(c.__name__ for c in order[: order.index(Trainer) + 1])
                raise RuntimeError(
                    f"steps were taken, and nothing was clipped: transformers {transformers.__version__}, or one of "
                    f"these classes, doesn't call _clip_grad_norm: {classes}; use ComponentClipCallback, with "
                    "max_grad_norm=0"
                )
            logs.update(self._clipping.numbers())
        super().log(logs, *args, **kwargs)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | None:
        accelerator, cap = self.accelerator, self.args.max_grad_norm
        if is_deepspeed(accelerator):
            return self._clipping.norm_in(self.model_wrapped, cap)
        scaler, unscale = getattr(accelerator, "scaler", None), accelerator.unscale_gradients
        return self._clipping.clip_(model, cap, accelerator._optimizers, scaler, unscale, "ComponentClipTrainerMixin")

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Tensor | None:
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
        found = "no such method" if method is None else f"({', '.join(inspect.signature(method).parameters)})"
        if method is None or expected not in ("", found):
            raise RuntimeError(
                f"{cls.__name__}: ComponentClipTrainerMixin isn't made for transformers {transformers.__version__}: "
                f"Trainer.{name} was {expected or 'there'}, here it is {found}; use ComponentClipCallback, with "
                "max_grad_norm=0"
            )
