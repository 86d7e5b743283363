"""A replacement for ``torchtitan.distributed.utils.clip_grad_norm_`` that clips by component.

``apply()`` before training makes torchtitan use it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from typing_extensions import Unpack

from ..arguments import check_type
from ..components.parameters import Parameters
from ..core.options import ClipOptions
from ..thresholds.constant import MaxNorm
from ._common import ClipCall, checked
from ._patch import Patch

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def clip_grad_norm_(
    parameters: Parameters,
    max_norm: MaxNorm,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    pp_mesh: DeviceMesh | None = None,
    ep_enabled: bool = False,
    **options: Unpack[ClipOptions],
) -> Tensor:
    """Clips each component's gradient by its own norm, in place, and returns the norm of all of them together.

    Under any of torchtitan's parallelisms norms are those of the logical gradients.

    Args:
        parameters: as for ``fused_component_clip_``. torchtitan passes them without names, so for "module", "layer"
            and "type" as ``components`` edit its call to pass (name, parameter) pairs.
        max_norm: the cap of each component, not of all together: torchtitan's ``training.max_norm``, which should
            then be smaller, such as 0.05.
        norm_type: order of the norms, and of the total.
        error_if_nonfinite: RuntimeError if a component's norm is inf or NaN, on all ranks alike, no gradient changed.
        foreach: has no effect; ``backend`` chooses how gradients are read.
        pp_mesh: the stages of the pipeline.
        ep_enabled: has no effect; parameters on different meshes may come together.
        options: ``components``, ``eps``, ``nonfinite``, ``process_group`` and ``backend`` of
            ``fused_component_clip_``. ``components="all"`` is torchtitan's own rule.

    Returns:
        [] norm of all components before clipping, over all stages; a plain Tensor, the same on all ranks; without
        those that a callable in ``components`` leaves alone. float32 (float64 if any gradient is), on the gradients'
        device; no host sync.

    Raises:
        TypeError, ValueError, RuntimeError: as ``fused_component_clip_``; nothing is changed.

    Example:
        >>> import torch
        >>> from cwclip_kernels.integrations.torchtitan import clip_grad_norm_
        >>> model = torch.nn.Linear(2, 1)
        >>> model.weight.grad = torch.tensor([[3.0, 4.0]])
        >>> model.bias.grad = torch.tensor([0.5])
        >>> clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        tensor(5.0249)
        >>> model.weight.grad, model.bias.grad
        (tensor([[0.6000, 0.8000]]), tensor([0.5000]))

    References:
        https://github.com/pytorch/torchtitan, ``torchtitan/distributed/utils.py`` (0.3.0).
    """
    check_type(foreach, "foreach", bool | None, "a bool or None")
    check_type(ep_enabled, "ep_enabled", bool, "a bool")
    call = ClipCall(parameters, max_norm, norm_type, error_if_nonfinite, options, pp_mesh)
    return call.total_norm(call.clip_())


def apply(**options: Unpack[ClipOptions]) -> Patch:
    """Makes torchtitan call ``clip_grad_norm_`` of this module, with these options.

    Returns:
        A handle: ``remove()``, or the end of a ``with`` block, puts torchtitan's function back.

    Raises:
        TypeError, ValueError: a wrong option.
        RuntimeError: this version's function has another signature than torchtitan 0.3.0's, or is replaced already.

    Example:
        >>> from cwclip_kernels.integrations import torchtitan
        >>> handle = torchtitan.apply(nonfinite="zero")  # doctest: +SKIP
    """
    checked(2.0, False, options)
    return Patch("torchtitan.distributed.utils", "clip_grad_norm_", clip_grad_norm_, options)
