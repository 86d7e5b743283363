"""``ComponentClip`` for Lightning's ``Trainer``, and ``configure_gradient_clipping`` for the hook of that name."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from typing_extensions import Unpack

from ...arguments import warn_caller
from ...clipper import ComponentClipper
from ...core.options import ClipOptions
from ...result import ClipResult, ClipStatistics
from ...thresholds.constant import MaxNorm
from .._common import clipper_arguments, learner
from .clipping import FitClipping, warn_of_gradient_clip_val
from .engine import EngineFit, has_engine

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    try:
        # `pip install lightning` brings both names, and importing the one not in use takes seconds.
        if "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
            from pytorch_lightning import Callback
        else:
            from lightning.pytorch import Callback
    except ModuleNotFoundError:
        try:
            from pytorch_lightning import Callback
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                'cwclip_kernels.integrations.lightning needs Lightning: pip install "cwclip_kernels[lightning]"'
            ) from error


class ComponentClip(Callback):  # type: ignore[misc]  # mypy doesn't look into Lightning
    """Clips each component's gradient by its own norm before every optimizer step of a ``Trainer``.

    It runs in ``on_before_optimizer_step``: after accumulation and unscaling, once for each step, under automatic and
    manual optimization. With several optimizers each step clips what its optimizer owns. It supports one device,
    ``ddp``, ``fsdp`` and ``ModelParallelStrategy``; it also clips where Lightning refuses to: by norm under ``fsdp``,
    and with fused optimizers, whose gradients it unscales first. Later callbacks see clipped gradients.

    Under ``DeepSpeedStrategy`` it clips in the engine's step, which comes after that hook: see
    ``integrations.deepspeed.attach``. Leave ``gradient_clip_val`` unset.

    A threshold's state is part of Lightning's checkpoints; a step that a loss scaler skips teaches it nothing. The
    callback can be copied and pickled at any time; a copy looks up the module's parameters when its own fit starts.

    Args:
        max_norm: as for ``fused_component_clip_``: the cap of each component, not of all together.
        norm_type: as for ``fused_component_clip_``.
        error_if_nonfinite: as for ``fused_component_clip_``; not with a scaled loss.
        log: True logs ``grad_2.0_norm_total`` (Lightning's name, for ``norm_type`` 2), the norm of all components
            together before clipping, and ``clip_rate``, the components clipped divided by those with a gradient, both
            summed over the steps since the last log; "components" also ``grad_2.0_norm/NAME`` and ``clip_rate/NAME``
            of each. It calls ``LightningModule.log`` when the Trainer's loggers are due, without a host sync.
        on_clip: called with each ``ClipResult``, such as ``ClipRecorder.record``; with several optimizers at each of
            their steps, where what others own has norm 0.
        options: ``components``, ``eps``, ``nonfinite``, ``process_group`` and ``backend`` of
            ``fused_component_clip_``. Names are those of the ``LightningModule``; FSDP's process group is found.

    Attributes:
        last: the ``ClipResult`` of the last step; None before the first.

    Raises:
        TypeError, ValueError: a wrong argument; those that need names are checked when a fit starts.
        RuntimeError: when a fit starts, if XLA's FSDP clips the gradients, or DeepSpeed's engine is set to clip, too,
            or isn't served; at a step, if the optimizer insists on unscaling by itself, clips in its own step
            (``ComponentClipAdamW``), or has another clipper attached.

    Example:
        >>> import torch
        >>> from lightning.pytorch import LightningModule, Trainer
        >>> from cwclip_kernels.integrations.lightning import ComponentClip
        >>> class Model(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.head = torch.nn.Linear(2, 1)
        ...     def training_step(self, batch, batch_idx):
        ...         return self.head(batch).sum()
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> clip = ComponentClip(0.05)
        >>> quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False)
        >>> trainer = Trainer(accelerator="cpu", max_epochs=1, callbacks=[clip], enable_model_summary=False, **quiet)
        >>> trainer.fit(Model(), torch.tensor([[3.0, 4.0]]))
        >>> clip.last.names, clip.last.norms, clip.last.coefs
        (('head.weight', 'head.bias'), tensor([5., 1.]), tensor([0.0100, 0.0500]))

    References:
        https://lightning.ai/docs/pytorch/stable, ``Callback.on_before_optimizer_step``.
    """

    def __init__(
        self,
        max_norm: MaxNorm,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        *,
        log: bool | str = False,
        on_clip: Callable[[ClipResult], object] | None = None,
        **options: Unpack[ClipOptions],
    ) -> None:
        self._arguments = clipper_arguments(norm_type, error_if_nonfinite, options)
        if not (isinstance(log, bool) or log == "components"):
            raise ValueError(f"log: expected a bool or 'components', not {log!r}")
        self.max_norm = max_norm
        self.last: ClipResult | None = None
        self._log = log
        self._on_clip = on_clip
        self._statistics = ClipStatistics()
        self._clipping: FitClipping | EngineFit | None = None
        self._batches = 0
        self._is_log_due = False  # since a step, until its batch ends

    @property
    def clipper(self) -> ComponentClipper | None:
        """The ``ComponentClipper`` in use; None before the first fit, in a copy before its own, and for DeepSpeed."""
        return None if self._clipping is None else self._clipping.clipper

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks up the module's parameters."""
        self._batches, self.last = 0, None
        self._set_up(trainer, pl_module)

    def _set_up(self, trainer: Trainer, module: LightningModule) -> FitClipping | EngineFit:
        self._clipping = _set_up(trainer, module, self._clipping, self.max_norm, self._arguments, self._add)
        self._statistics, self._is_log_due = ClipStatistics(), False
        return self._clipping

    def __getstate__(self) -> dict[str, Any]:
        # What a fit sets up belongs to its module, whose copy has other parameters, and may be on other ranks.
        return {**self.__dict__, "_clipping": None, "_statistics": ClipStatistics(), "_is_log_due": False}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Clips what the optimizer owns."""
        clipping = self._clipping
        if clipping is None or not clipping.is_for(self.max_norm, self._arguments):  # added or changed during a fit
            clipping = self._set_up(trainer, pl_module)
        result = clipping.clip_(trainer, pl_module, optimizer, "ComponentClip")
        if result is not None:
            self._add(result, id(optimizer))

    def _add(self, result: ClipResult, source: object = None) -> None:
        self.last = result
        if self._log:
            self._statistics.add(result, source)
            self._is_log_due = True
        if self._on_clip is not None:
            self._on_clip(result)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs, if there was a step and the loggers are due."""
        self._batches += 1
        is_due, self._is_log_due = self._is_log_due, False
        if not is_due or not (trainer._logger_connector.should_update_logs or trainer.fast_dev_run):
            return
        assert self._clipping is not None
        clipping, statistics = self._clipping, self._statistics
        norm = f"grad_{float(self._arguments['norm_type'])}_norm"
        values = {f"{norm}_total": clipping.total_norm(statistics.norms), "clip_rate": statistics.clip_rate}
        if self._log == "components":
            values |= {f"{norm}/{name}": value for name, value in zip(clipping.names, statistics.norms, strict=True)}
            rates = zip(clipping.names, statistics.clip_rates, strict=True)
            values |= {f"clip_rate/{name}": value for name, value in rates}
        statistics.reset()
        pl_module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warns if every step went past Lightning's hooks."""
        if self._batches and self.last is None and not pl_module.automatic_optimization:
            warn_caller(
                "ComponentClip hasn't seen a single optimizer step: self.optimizers(use_pl_optimizer=False) returns "
                "optimizers whose steps don't call Lightning's hooks; step what self.optimizers() returns"
            )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs: the state of a ``max_norm`` that learns; else {}."""
        policy = learner(self.max_norm)
        return {} if policy is None else {"max_norm": policy.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a ``state_dict()``.

        Raises:
            TypeError, ValueError: that of another threshold, or for other components.
        """
        policy = learner(self.max_norm)
        if policy is not None and "max_norm" in state_dict:
            policy.load_state_dict(state_dict["max_norm"])


def _set_up(
    trainer: Trainer,
    module: LightningModule,
    before: FitClipping | EngineFit | None,
    max_norm: MaxNorm,
    arguments: dict[str, Any],
    on_clip: Callable[[ClipResult], object] | None = None,
    trainers_cap: MaxNorm | None = None,
) -> FitClipping | EngineFit:
    """What clips in this fit, or from now on with other arguments than ``before``."""
    if isinstance(before, EngineFit):
        before.remove()
    if has_engine(trainer):
        return EngineFit(trainer, max_norm, arguments, on_clip)
    warn_of_gradient_clip_val(trainer, module, trainers_cap)
    return FitClipping(trainer, module, max_norm, arguments)


_of_modules: weakref.WeakKeyDictionary[LightningModule, tuple[weakref.ref[Trainer], FitClipping | EngineFit]]
_of_modules = weakref.WeakKeyDictionary()


def configure_gradient_clipping(
    module: LightningModule,
    optimizer: Optimizer,
    max_norm: MaxNorm,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    **options: Unpack[ClipOptions],
) -> ClipResult | None:
    """Clips the gradients that an optimizer owns, each component's by its own norm, in place.

    For the body of ``LightningModule.configure_gradient_clipping``; or, under manual optimization, where Lightning
    doesn't call that, of ``on_before_optimizer_step(self, optimizer)``. Names are read again whenever arguments
    change: for caps that change use a tensor or a threshold. Your module has to save a threshold's state; Lightning
    does it for the callback, which ``configure_callbacks`` may return: ``[ComponentClip(threshold)]``.

    Under ``DeepSpeedStrategy`` the engine clips in its step, after this call, which returns None. Lightning warns
    there that the hook clips nothing, which is true of its own way to clip.

    Args:
        module: the ``LightningModule``, in a fit.
        optimizer: whose gradients are clipped.
        max_norm: as for ``ComponentClip``, or the ``gradient_clip_val`` that Lightning passes.
        norm_type: as for ``ComponentClip``.
        error_if_nonfinite: as for ``ComponentClip``.
        options: as for ``ComponentClip``.

    Returns:
        The ``ClipResult`` of all components of the module, with norm 0 for those that aren't the optimizer's. None if
        nothing was clipped because no step follows, as under a loss scale if ``training_step`` returned None; or
        because DeepSpeed's engine clips later.

    Raises:
        TypeError, ValueError, RuntimeError: as ``ComponentClip``, or if the Trainer has one, too, or gradients still
            carry the loss's scale.

    Example:
        >>> from lightning.pytorch import LightningModule
        >>> from cwclip_kernels.integrations.lightning import configure_gradient_clipping
        >>> class Model(LightningModule):
        ...     def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
        ...         result = configure_gradient_clipping(self, optimizer, 0.05)
        ...         self.log("clip_rate", result.clipped.float().mean())
    """
    arguments = clipper_arguments(norm_type, error_if_nonfinite, options)
    trainer = module.trainer
    if any(isinstance(callback, ComponentClip) for callback in trainer.callbacks):
        raise RuntimeError(
            "module: the Trainer has a ComponentClip, which would clip again what configure_gradient_clipping has "
            "clipped; leave one of them out"
        )
    known_trainer, clipping = _of_modules.get(module, (lambda: None, None))
    if clipping is None or known_trainer() is not trainer or not clipping.is_for(max_norm, arguments):
        clipping = _set_up(trainer, module, clipping, max_norm, arguments, trainers_cap=max_norm)
        _of_modules[module] = weakref.ref(trainer), clipping
    return clipping.clip_(trainer, module, optimizer, "configure_gradient_clipping")
