"""``configure_gradient_clipping``, for the hook of that name of a ``LightningModule``."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from typing_extensions import Unpack

from ...core.options import ClipOptions
from ...result import ClipResult
from ...thresholds.caps import MaxNorm
from .._common import checked
from .callback import ComponentClip
from .clipping import FitClipping, warn_of_gradient_clip_val

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

_of_modules: weakref.WeakKeyDictionary[LightningModule, tuple[weakref.ref[Trainer], FitClipping]]
_of_modules = weakref.WeakKeyDictionary()


def configure_gradient_clipping(
    module: LightningModule,
    optimizer: Optimizer,
    max_norm: MaxNorm,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    *,
    process_group: ProcessGroup | DeviceMesh | None = None,
    **options: Unpack[ClipOptions],
) -> ClipResult | None:
    """Clips the gradients that an optimizer owns, each component's to its own norm, in place.

    For the body of ``LightningModule.configure_gradient_clipping``; or, under manual optimization, where Lightning
    doesn't call that, of ``on_before_optimizer_step(self, optimizer)``. Names are read once for a module, and again
    when arguments change: for caps that change use a tensor or a threshold. Your module has to save a threshold's
    state; to have Lightning do that, use the callback: ``configure_callbacks`` may return
    ``[ComponentClip(threshold)]``.

    Args:
        module: the ``LightningModule``, in a fit.
        optimizer: whose gradients are clipped.
        max_norm: as for ``ComponentClip``, or the ``gradient_clip_val`` that Lightning passes.
        norm_type: as for ``ComponentClip``, like all that follow.
        error_if_nonfinite: see there.
        process_group: see there.
        options: see there.

    Returns:
        Norms before clipping, coefficients and caps of all components of the module, with norm 0 for those that
        aren't the optimizer's. None if nothing was clipped because no step will follow, as under a loss scale after a
        ``training_step`` that returned None.

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
    checked(norm_type, error_if_nonfinite, options)
    arguments: dict[str, Any] = {
        "norm_type": norm_type,
        "error_if_nonfinite": error_if_nonfinite,
        "process_group": process_group,
        **options,
    }
    trainer = module.trainer
    if any(isinstance(callback, ComponentClip) for callback in trainer.callbacks):
        raise RuntimeError(
            "module: the Trainer has a ComponentClip, which would clip again what configure_gradient_clipping has "
            "clipped; leave one of them out"
        )
    known_trainer, clipping = _of_modules.get(module, (lambda: None, None))
    if clipping is None or known_trainer() is not trainer or not clipping.is_for(max_norm, arguments):
        _warn_of_another_cap(trainer, module, max_norm)
        clipping = FitClipping(trainer, module, max_norm, arguments)
        _of_modules[module] = weakref.ref(trainer), clipping
    return clipping.clip_(trainer, module, optimizer, "configure_gradient_clipping")


def _warn_of_another_cap(trainer: Trainer, module: LightningModule, max_norm: MaxNorm) -> None:
    if isinstance(max_norm, int | float) and max_norm == trainer.gradient_clip_val:
        return
    if module._current_fx_name == "configure_gradient_clipping":  # which replaces Lightning's own clipping
        effect = "has no effect where configure_gradient_clipping clips by component: pass it on as max_norm"
    else:
        effect = "clips as well, after each component has been clipped: leave one of them out"
    warn_of_gradient_clip_val(trainer, effect)
