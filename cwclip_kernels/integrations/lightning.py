"""Clipping by component in Lightning: a callback, and a call for ``LightningModule.configure_gradient_clipping``.

    trainer = Trainer(callbacks=[ComponentClip(0.05)])

Both work with ``lightning.pytorch`` and ``pytorch_lightning``: the callback's base class is that of the one which is
imported already, or else which is installed.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from ..clipper import ComponentClipper
from ..components.spec import Grouping
from ..core.options import check_options
from ..result import ClipResult
from ..thresholds import Threshold
from ..thresholds.constant import MaxNorm
from ._learning import learns
from ._lightning import Clipping, Window, lightnings_own, warn_of_another_cap

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
else:
    try:
        # `pip install lightning` brings both, and importing the other one takes seconds.
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


_of_modules: weakref.WeakKeyDictionary[LightningModule, tuple[weakref.ref[Trainer], Clipping]]
_of_modules = weakref.WeakKeyDictionary()


class ComponentClip(Callback):  # type: ignore[misc]  # mypy doesn't look into Lightning
    """Clips each component's gradient to its own norm before every optimizer step of a ``Trainer``.

    It runs in ``on_before_optimizer_step``: after accumulation and unscaling, once for each step, under automatic and
    manual optimization. With several optimizers each step clips what its optimizer owns. It serves one device,
    ``ddp``, ``fsdp`` (where Lightning refuses to clip by norm) and ``ModelParallelStrategy``. Fused optimizers, which
    unscale by themselves and which Lightning refuses to clip, are unscaled first. Callbacks that come later in the
    list see clipped gradients.

    A threshold's state is part of Lightning's checkpoints. A step that a loss scaler skips teaches it nothing. The
    callback can be copied and pickled at any time; a copy looks the module's parameters up when its own fit starts.

    Args:
        max_norm: as for ``fused_component_clip_``: the cap of each component, not of all together.
        norm_type: likewise.
        error_if_nonfinite: likewise; not under a loss scale, which makes norms inf now and then.
        components: likewise. Names are those of the ``LightningModule``.
        eps: likewise.
        nonfinite: likewise.
        process_group: likewise. FSDP's is found without it.
        backend: likewise.
        log: True logs ``grad_2.0_norm_total`` (Lightning's name, for ``norm_type`` 2), the norm of all components
            together before clipping, and ``clip_rate``, the share of components with a gradient that were clipped,
            over the steps since it was logged last. "components" also logs ``grad_2.0_norm/NAME`` and
            ``clip_rate/NAME`` for each. Both by ``LightningModule.log``, when the Trainer's loggers are due; there
            is no host sync before.

    Attributes:
        clipper: the ``ComponentClipper`` at work; None before the first fit, and in a copy before its own.
        last: what the last step's clipping found and did; None before the first.

    Raises:
        TypeError, ValueError: an argument that isn't what it should be; those that need names when a fit starts.
        RuntimeError: when a fit starts, if gradients belong to DeepSpeed or XLA's FSDP; at a step, if the optimizer
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
        components: Grouping = None,
        eps: float = 1e-6,
        nonfinite: str = "propagate",
        process_group: ProcessGroup | DeviceMesh | None = None,
        backend: str | None = None,
        log: bool | str = False,
    ) -> None:
        check_options(norm_type, error_if_nonfinite, eps, nonfinite, backend)
        if not (isinstance(log, bool) or log == "components"):
            raise ValueError(f"log: expected a bool or 'components', not {log!r}")
        self.max_norm = max_norm
        self.last: ClipResult | None = None
        self._arguments: dict[str, Any] = {
            "norm_type": norm_type,
            "error_if_nonfinite": error_if_nonfinite,
            "components": components,
            "eps": eps,
            "nonfinite": nonfinite,
            "process_group": process_group,
            "backend": backend,
        }
        self._log = log
        self._window: Window | None = None
        self._clipping: Clipping | None = None
        self._batches = 0
        self._is_warned = False

    @property
    def clipper(self) -> ComponentClipper | None:
        """See the class."""
        return None if self._clipping is None else self._clipping.clipper

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's hook."""
        setting = lightnings_own(trainer)
        if setting is not None and not self._is_warned:
            self._is_warned = True
            warnings.warn(
                f"{setting} clips as well, after ComponentClip has clipped each component: leave one of them out",
                UserWarning,
                stacklevel=2,
            )
        self._batches, self.last = 0, None
        self._set_up(trainer, pl_module)

    def _set_up(self, trainer: Trainer, module: LightningModule) -> Clipping:
        self._clipping = Clipping(trainer, module, self.max_norm, self._arguments)
        self._window = Window(self._clipping.clipper, self._arguments["norm_type"]) if self._log else None
        return self._clipping

    def __getstate__(self) -> dict[str, Any]:
        # What a fit sets up belongs to its module, whose copy has other parameters, and may be on other ranks.
        return {**self.__dict__, "_clipping": None, "_window": None}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Lightning's hook: clips what the optimizer owns."""
        clipping = self._clipping or self._set_up(trainer, pl_module)  # one that has joined in the middle of a fit
        result = clipping.clip_(trainer, pl_module, optimizer, "ComponentClip")
        if result is not None:
            self.last = result
            if self._window is not None:
                self._window.add(result, clipping.owned_by(optimizer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Lightning's hook: logs, if that is wanted and due."""
        self._batches += 1
        window = self._window
        if window is None or not window.has_stepped:  # gradients are still being accumulated
            return
        window.has_stepped = False
        if trainer._logger_connector.should_update_logs or trainer.fast_dev_run:
            values = window.take(each=self._log == "components")
            pl_module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's hook."""
        if self._batches and self.last is None and not pl_module.automatic_optimization:
            warnings.warn(
                "ComponentClip hasn't seen a single optimizer step: those of self.optimizers(use_pl_optimizer=False) "
                "pass by Lightning's hooks; step what self.optimizers() returns",
                UserWarning,
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs of it: the state of a threshold that learns, if ``max_norm`` is one; else {}."""
        if isinstance(self.max_norm, Threshold) and learns(self.max_norm):
            return {"max_norm": self.max_norm.state_dict()}
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a ``state_dict()``.

        Raises:
            TypeError, ValueError: that of another threshold, or for other components.
        """
        if isinstance(self.max_norm, Threshold) and learns(self.max_norm) and "max_norm" in state_dict:
            self.max_norm.load_state_dict(state_dict["max_norm"])


def configure_gradient_clipping(
    module: LightningModule,
    optimizer: Optimizer,
    max_norm: MaxNorm,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    *,
    components: Grouping = None,
    eps: float = 1e-6,
    nonfinite: str = "propagate",
    process_group: ProcessGroup | DeviceMesh | None = None,
    backend: str | None = None,
) -> ClipResult | None:
    """Clips each component's gradient of what an optimizer owns to its own norm, in place.

    For the body of ``LightningModule.configure_gradient_clipping``; or, under manual optimization, where Lightning
    doesn't call that, of ``on_before_optimizer_step(self, optimizer)``. Names are read once for a module, and anew
    when arguments change: let caps that change be a tensor or a threshold. A threshold's state is the module's to
    save; to have Lightning do that, clip by the callback instead: ``configure_callbacks`` may return
    ``[ComponentClip(threshold)]``.

    Args:
        module: the ``LightningModule``, in a fit.
        optimizer: whose gradients are clipped.
        max_norm: as for ``ComponentClip``, or the ``gradient_clip_val`` that Lightning passes.
        norm_type: as for ``ComponentClip``.
        error_if_nonfinite: likewise.
        components: likewise.
        eps: likewise.
        nonfinite: likewise.
        process_group: likewise.
        backend: likewise.

    Returns:
        Norms before clipping, coefficients and caps of all components of the module, with norm 0 for those that
        aren't the optimizer's. None if nothing was clipped, since under a loss scale Lightning leaves out the step of
        a ``training_step`` that returned None.

    Raises:
        TypeError, ValueError, RuntimeError: as ``ComponentClip``; or the Trainer has a ``ComponentClip``, too; or
            gradients still carry the loss's scale.

    Example:
        >>> from lightning.pytorch import LightningModule
        >>> from cwclip_kernels.integrations.lightning import configure_gradient_clipping
        >>> class Model(LightningModule):
        ...     def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
        ...         result = configure_gradient_clipping(self, optimizer, 0.05)
        ...         self.log("clip_rate", result.clipped.float().mean())
    """
    trainer = module.trainer
    arguments: dict[str, Any] = {
        "norm_type": norm_type,
        "error_if_nonfinite": error_if_nonfinite,
        "components": components,
        "eps": eps,
        "nonfinite": nonfinite,
        "process_group": process_group,
        "backend": backend,
    }
    known_trainer, clipping = _of_modules.get(module, (None, None))
    if known_trainer is None or known_trainer() is not trainer:
        if clipping is None:
            warn_of_another_cap(trainer, module, max_norm)
        clipping = None
    if any(isinstance(callback, ComponentClip) for callback in trainer.callbacks):
        raise RuntimeError(
            "module: the Trainer has a ComponentClip, which would clip again what configure_gradient_clipping has "
            "clipped; leave one of them out"
        )
    if clipping is None or not clipping.is_for(max_norm, arguments):
        clipping = Clipping(trainer, module, max_norm, arguments)
        _of_modules[module] = weakref.ref(trainer), clipping
    return clipping.clip_(trainer, module, optimizer, "configure_gradient_clipping")
