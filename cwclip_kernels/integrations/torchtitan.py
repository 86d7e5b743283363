"""torchtitan's call, by component.

In the trainer, this import in place of ``dist_utils.clip_grad_norm_``; or, with torchtitan left as it is, before the
training starts:

    from cwclip_kernels.integrations.torchtitan import clip_grad_norm_
    from torchtitan.distributed import utils as dist_utils
    dist_utils.clip_grad_norm_ = clip_grad_norm_
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from ..arguments import check_type
from ..components.parameters import Parameters
from ..components.spec import Grouping
from ..core.cache import session_for
from ..core.options import check_options
from ..thresholds.constant import MaxNorm

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
    *,
    components: Grouping = None,
    nonfinite: str = "propagate",
    backend: str | None = None,
) -> Tensor:
    """Clips each component's gradient to its own norm, in place, and returns the norm of all of them together.

    The arguments up to ``ep_enabled`` are those of ``torchtitan.distributed.utils.clip_grad_norm_``; give it others
    with ``functools.partial``. Under any of torchtitan's parallelisms norms are those of the logical gradients.

    Args:
        parameters: as for ``fused_component_clip_``. torchtitan passes them without names, so for "module", "layer"
            and "type" as ``components`` edit its call to pass (name, parameter) pairs.
        max_norm: the cap of each component, not of all together: torchtitan's ``training.max_norm``, which wants a
            smaller number then, such as 0.05.
        norm_type: order of the norms, and of the total.
        error_if_nonfinite: RuntimeError if a component's norm is inf or NaN, on all ranks alike, no gradient changed.
        foreach: changes nothing, whatever it is: ``backend`` chooses how gradients are read.
        pp_mesh: the stages of the pipeline.
        ep_enabled: changes nothing, whatever it is: parameters on different meshes may come together.
        components: what is clipped together; each parameter by itself if None. "all" is torchtitan's own rule.
        nonfinite: as for ``fused_component_clip_``.
        backend: likewise.

    Returns:
        [] norm of all components before clipping, over all stages; a plain Tensor, the same on all ranks. float32
        (float64 if any gradient is), on the gradients' device; no host sync. What a callable of ``components``
        leaves alone doesn't count.

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
    options = check_options(norm_type, error_if_nonfinite, 1e-6, nonfinite, backend)
    tensors, session = session_for(
        parameters, components, partial(options.in_words, max_norm, pp_mesh), pp_mesh=pp_mesh
    )
    norms = session.clip_(tensors, session.caps_for(max_norm, tensors, options.rule), options)[0]
    return session.total(norms, options.rule.norm_type)
