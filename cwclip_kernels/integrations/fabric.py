"""A replacement for Lightning Fabric's ``Fabric.clip_gradients`` that clips by component. Imports no Lightning."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Unpack

from ..arguments import type_name
from ..core.loss_scale import UNSCALED
from ..core.options import ClipOptions
from ..result import ClipResult
from ..thresholds.constant import MaxNorm
from ._common import (
    OptimizersClipping,
    checked,
    clipper_arguments,
    innermost,
    learning_unless_skipped,
    refuse_double_clipping,
    refuse_lightning_strategy,
)

if TYPE_CHECKING:
    from lightning.fabric import Fabric

OnClip = Callable[[ClipResult], object]

_of_modules: weakref.WeakKeyDictionary[nn.Module, OptimizersClipping] = weakref.WeakKeyDictionary()


def clip_gradients(
    fabric: Fabric,
    module: nn.Module,
    optimizer: Optimizer,
    max_norm: MaxNorm,
    norm_type: float = 2.0,
    error_if_nonfinite: bool | None = None,
    *,
    on_clip: OnClip | None = None,
    **options: Unpack[ClipOptions],
) -> Tensor:
    """Clips the gradients that an optimizer owns, each component's by its own norm, in place.

    Call it where ``fabric.clip_gradients(module, optimizer, max_norm=...)`` would be: after ``fabric.backward``,
    outside of ``fabric.no_backward_sync``, before the optimizer's step. Gradients of a scaled loss are unscaled
    first, also those of fused optimizers, which Fabric refuses. It supports one device, ``dp``, ``ddp``, ``fsdp`` and
    ``ModelParallelStrategy``. ``fabric.save(path, {"caps": threshold, ...})`` saves what a threshold has learnt.

    Args:
        fabric: what has set up module and optimizer.
        module: what ``fabric.setup`` returned; it has all parameters of the optimizer. Names are the model's own.
        optimizer: whose gradients are clipped.
        max_norm: the cap of each component, not of all together, as for ``fused_component_clip_``. Names are read
            again whenever arguments change: for caps that change use a tensor or a threshold.
        norm_type: order of the norms, and of the total.
        error_if_nonfinite: as for ``fused_component_clip_``. None: True, as in Fabric, unless there is a
            ``nonfinite``, or the loss is scaled, where such a step is skipped.
        on_clip: called with the ``ClipResult``, such as ``ClipRecorder.record``. It has all components of the module,
            with norm 0 for those that aren't the optimizer's.
        options: ``components``, ``eps``, ``nonfinite``, ``process_group`` and ``backend`` of
            ``fused_component_clip_``. FSDP's process group is found without it.

    Returns:
        [] norm of the optimizer's gradients before clipping, the same on all ranks; float32 (float64 if any parameter
        is), on the gradients' device. It syncs with the host for ``error_if_nonfinite``, and where caps that learn
        have to know whether a loss scaler will skip the step.

    Raises:
        TypeError, ValueError: as ``fused_component_clip_``; or the optimizer owns parameters that aren't the
            module's, or ``error_if_nonfinite=True`` with a scaled loss.
        RuntimeError: as ``fused_component_clip_``; DeepSpeed's engine or XLA clip the gradients; or a clipper is
            attached to the optimizer, or it clips in its own step (``ComponentClipAdamW``).

    Example:
        >>> import torch
        >>> from lightning.fabric import Fabric
        >>> from cwclip_kernels.integrations.fabric import clip_gradients
        >>> fabric, model = Fabric(accelerator="cpu", devices=1), torch.nn.Linear(2, 1)
        >>> model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> fabric.backward(model(torch.tensor([[3.0, 4.0]])).sum())
        >>> clip_gradients(fabric, model, optimizer, 0.05)
        tensor(5.0990)
        >>> model.weight.grad, model.bias.grad
        (tensor([[0.0300, 0.0400]]), tensor([0.0500]))

    References:
        https://lightning.ai/docs/fabric, ``Fabric.clip_gradients`` (2.6).
    """
    refuse_lightning_strategy(fabric.strategy, "Fabric")
    _refuse_engine(fabric)
    precision = fabric.strategy.precision
    scaler = getattr(precision, "scaler", None)
    scaler = scaler if scaler is not None and scaler.is_enabled() else None
    if error_if_nonfinite is None:
        error_if_nonfinite = scaler is None and "nonfinite" not in options
    arguments = clipper_arguments(norm_type, error_if_nonfinite, options)
    clipping = _of_modules.get(module)
    if clipping is None or not clipping.is_for(max_norm, arguments):
        hint = "pass a module that has all of them"
        clipping = OptimizersClipping(module, max_norm, arguments, module, scaler is not None, hint)
        _of_modules[module] = clipping
    inner = innermost(optimizer)
    refuse_double_clipping([inner], scaler, clipping.clipped, "clip_gradients")
    part = clipping.part_of(inner)
    if scaler is not None and getattr(inner, "_step_supports_amp_scaling", False):
        if "grad_scaler" in inspect.signature(inner.step).parameters:
            raise RuntimeError(
                f"{type_name(inner)} unscales its gradients in its own step, so they can't be clipped before; use a "
                "fused optimizer of torch, or precision='bf16-mixed', which has no scale"
            )
        scaler.unscale_(inner)  # so that its step won't
    else:
        precision.unscale_gradients(inner)
    with learning_unless_skipped(max_norm, scaler, [inner]):
        result = part.clip(UNSCALED)
    if on_clip is not None:
        on_clip(result)
    return part.total_norm(result.norms)


def _refuse_engine(fabric: Any) -> None:
    if any(kind.__name__ == "DeepSpeedStrategy" for kind in type(fabric.strategy).__mro__):
        raise RuntimeError(
            "fabric: DeepSpeed clips in its engine's step. Instead of this call, once, after fabric.setup(): "
            "cwclip_kernels.integrations.deepspeed.attach(fabric.strategy.model, max_norm), with "
            '"gradient_clipping": 0 in its configuration'
        )


class FabricClipping:
    """``Fabric.clip_gradients`` of one ``Fabric``, replaced until ``remove()`` or the end of a ``with`` block.

    Made by ``apply``.

    Attributes:
        last: the ``ClipResult`` of the last call; None before the first.
    """

    def __init__(self, fabric: Fabric, on_clip: OnClip | None, options: ClipOptions) -> None:
        checked(2.0, False, options)
        if isinstance(getattr(vars(fabric).get("clip_gradients"), "__self__", None), FabricClipping):
            raise RuntimeError("fabric: apply() was called for it already; call remove() on what that returned first")
        self.last: ClipResult | None = None
        self._fabric, self._on_clip, self._options = fabric, on_clip, options
        self._original = fabric.clip_gradients
        found = tuple(inspect.signature(self._original).parameters)
        if found != _EXPECTED:
            raise RuntimeError(
                f"apply() isn't made for this {type_name(fabric)}: clip_gradients took {', '.join(_EXPECTED)}, here "
                f"it takes {', '.join(found)}; call cwclip_kernels.integrations.fabric.clip_gradients by hand"
            )
        fabric.clip_gradients = self.clip_gradients

    def clip_gradients(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        clip_val: float | None = None,
        max_norm: MaxNorm | None = None,
        norm_type: float = 2.0,
        error_if_nonfinite: bool | None = None,
        **options: Unpack[ClipOptions],
    ) -> Tensor | None:
        """As ``Fabric.clip_gradients``, which it calls if there is a ``clip_val`` or no ``max_norm``."""
        if clip_val is not None or max_norm is None:
            self._original(module, optimizer, clip_val=clip_val, max_norm=max_norm)
            return None
        merged: Any = {**self._options, **options}
        return clip_gradients(
            self._fabric, module, optimizer, max_norm, norm_type, error_if_nonfinite, on_clip=self._add, **merged
        )

    def _add(self, result: ClipResult) -> None:
        self.last = result
        if self._on_clip is not None:
            self._on_clip(result)

    def remove(self) -> None:
        """Puts the original back; a method that has replaced ours since then stays."""
        if vars(self._fabric).get("clip_gradients") == self.clip_gradients:
            del self._fabric.clip_gradients

    def __enter__(self) -> FabricClipping:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


_EXPECTED = ("module", "optimizer", "clip_val", "max_norm", "norm_type", "error_if_nonfinite")


def apply(fabric: Fabric, *, on_clip: OnClip | None = None, **options: Unpack[ClipOptions]) -> FabricClipping:
    """Makes ``fabric.clip_gradients(module, optimizer, max_norm=...)`` clip by component, with these options.

    The call takes the same options, which count more than these. Clipping by value is what it was.

    Args:
        fabric: whose method is replaced; others keep theirs.
        on_clip: called with each ``ClipResult``.
        options: as for ``clip_gradients``.

    Returns:
        A handle: ``last`` is the last ``ClipResult``; ``remove()``, or the end of a ``with`` block, puts Fabric's
        method back.

    Raises:
        TypeError, ValueError: a wrong option.
        RuntimeError: this version's method has other parameters than Lightning 2.6's, or is replaced already.

    Example:
        >>> from lightning.fabric import Fabric
        >>> from cwclip_kernels.integrations import fabric as by_component
        >>> fabric = Fabric(accelerator="cpu", devices=1)
        >>> handle = by_component.apply(fabric, components="layer")
        >>> handle.remove()
    """
    return FabricClipping(fabric, on_clip, options)
