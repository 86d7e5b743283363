"""``ComponentClip``, the callback for Lightning's ``Trainer``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from typing_extensions import Unpack

from ...arguments import warn_caller
from ...clipper import ComponentClipper
from ...core.options import ClipOptions
from ...result import ClipResult, ClipStatistics
from ...thresholds.caps import MaxNorm
from .._common import checked, learner
from .clipping import FitClipping, warn_of_gradient_clip_val

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
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
    """Clips each component's gradient to its own norm before every optimizer step of a ``Trainer``.

    It runs in ``on_before_optimizer_step``: after accumulation and unscaling, once for each step, under automatic and
    manual optimization. With several optimizers each step clips what its optimizer owns. It supports one device,
    ``ddp``, ``fsdp`` (where Lightning refuses to clip by norm) and ``ModelParallelStrategy``. Fused optimizers, which
    unscale by themselves and which Lightning refuses to clip, are unscaled first. Callbacks that come later in the
    list see clipped gradients.

    A threshold's state is part of Lightning's checkpoints. A step that a loss scaler skips teaches it nothing. The
    callback can be copied and pickled at any time; a copy looks up the module's parameters when its own fit starts.

    Args:
        max_norm: as for ``fused_component_clip_``: the cap of each component, not of all together.
        norm_type: as for ``fused_component_clip_``.
        error_if_nonfinite: as for ``fused_component_clip_``; not with a scaled loss.
        process_group: as for ``fused_component_clip_``; FSDP's is found without it.
        log: True logs ``grad_2.0_norm_total`` (Lightning's name, for ``norm_type`` 2), the norm of all components
            together before clipping, and ``clip_rate``, the number of components clipped divided by the number with a
            gradient, both summed over the steps since the last log. "components" also logs ``grad_2.0_norm/NAME`` and
            ``clip_rate/NAME`` for each. It uses ``LightningModule.log`` when the Trainer's loggers are due, and there
            is no host sync before.
        options: ``components``, ``eps``, ``nonfinite``, ``backend``, as for ``fused_component_clip_``. Names are
            those of the ``LightningModule``.

    Attributes:
        clipper: the ``ComponentClipper`` in use; None before the first fit, and in a copy before its own.
        last: the ``ClipResult`` of the last step; None before the first.

    Raises:
        TypeError, ValueError: a wrong argument; those that need names are checked when a fit starts.
        RuntimeError: when a fit starts, if DeepSpeed or XLA's FSDP clip the gradients; at a step, if the optimizer
            insists on unscaling by itself, or another clipper is attached to it.

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
        process_group: ProcessGroup | DeviceMesh | None = None,
        log: bool | str = False,
        **options: Unpack[ClipOptions],
    ) -> None:
        checked(norm_type, error_if_nonfinite, options)
        if not (isinstance(log, bool) or log == "components"):
            raise ValueError(f"log: expected a bool or 'components', not {log!r}")
        self.max_norm = max_norm
        self.last: ClipResult | None = None
        self._options: dict[str, Any] = {
            "norm_type": norm_type,
            "error_if_nonfinite": error_if_nonfinite,
            "process_group": process_group,
            **options,
        }
        self._log = log
        self._statistics = ClipStatistics()
        self._clipping: FitClipping | None = None
        self._batches = 0
        self._is_log_due = False  # since a step, until its batch ends

    @property
    def clipper(self) -> ComponentClipper | None:
        """The ``ComponentClipper`` in use, if any."""
        return None if self._clipping is None else self._clipping.clipper

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks up the module's parameters."""
        warn_of_gradient_clip_val(
            trainer, "clips as well, after ComponentClip has clipped each component: leave one of them out"
        )
        self._batches, self.last = 0, None
        self._set_up(trainer, pl_module)

    def _set_up(self, trainer: Trainer, module: LightningModule) -> FitClipping:
        self._clipping = FitClipping(trainer, module, self.max_norm, self._options)
        self._statistics, self._is_log_due = ClipStatistics(), False
        return self._clipping

    def __getstate__(self) -> dict[str, Any]:
        # What a fit sets up belongs to its module, whose copy has other parameters, and may be on other ranks.
        return {**self.__dict__, "_clipping": None, "_statistics": ClipStatistics()}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Clips what the optimizer owns."""
        clipping = self._clipping or self._set_up(trainer, pl_module)  # if added in the middle of a fit
        result = clipping.clip_(trainer, pl_module, optimizer, "ComponentClip")
        if result is not None:
            self.last = result
            if self._log:
                self._statistics.add(result, id(optimizer))
                self._is_log_due = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs, if there was a step and the loggers are due."""
        self._batches += 1
        is_due, self._is_log_due = self._is_log_due, False
        if not is_due or not (trainer._logger_connector.should_update_logs or trainer.fast_dev_run):
            return
        assert self._clipping is not None
        clipper, statistics = self._clipping.clipper, self._statistics
        norm = f"grad_{float(self._options['norm_type'])}_norm"
        values = {f"{norm}_total": clipper.total_norm(statistics.norms), "clip_rate": statistics.clip_rate}
        if self._log == "components":
            values |= {f"{norm}/{name}": value for name, value in zip(clipper.names, statistics.norms, strict=True)}
            rates = zip(clipper.names, statistics.clip_rates, strict=True)
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
