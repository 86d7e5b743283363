"""The functions: component clipping in one call, and measuring without touching."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from .arguments import check_type
from .components.parameters import Parameters, named_tensors
from .components.resolve import resolve
from .components.spec import Grouping
from .core import traced, traced_scaling
from .core.cache import session_for
from .core.loss_scale import LossScale
from .core.modes import is_traced
from .core.options import check_norms, check_options, checked_coefs
from .thresholds.constant import MaxNorm

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


def fused_component_clip_(
    parameters: Parameters,
    max_norm: MaxNorm,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    *,
    components: Grouping = None,
    eps: float = 1e-6,
    nonfinite: str = "propagate",
    inv_scale: float | Tensor | None = None,
    found_inf: Tensor | None = None,
    process_group: ProcessGroup | DeviceMesh | None = None,
    pp_mesh: ProcessGroup | DeviceMesh | None = None,
    backend: str | None = None,
) -> Tensor:
    """Clips each component's gradient by its own norm, in place.

        norm_c = (sum over component c of |g|^p)^(1/p)
        coef_c = min(1, max_norm_c / (norm_c + eps));  g <- coef_c * g

    The first four arguments are those of ``torch.nn.utils.clip_grad_norm_``. Where coef_c is 1 nothing is written. No
    host sync, except for nonfinite="error", to add up duplicate indices of a sparse gradient, and where the gradients
    lie on several devices.

    Args:
        parameters: a Module, a Tensor, or an iterable of Tensors or of (name, Tensor) pairs, whose ``.grad`` is
            clipped: float32, bfloat16, float16, float64 or complex, dense or sparse COO, on any mix of devices. A
            tied parameter counts once, under its first name. Names are the model's own, whatever wraps it or its
            modules (``torch.compile``, ``DistributedDataParallel``, ``FullyShardedDataParallel``, activation
            checkpointing). If the names of all pairs begin with ``module.``, it is left out.
        max_norm: the caps. A number; a floating-point Tensor of shape [] or [K], used where it lies, without a sync;
            one of ``cwclip_kernels.thresholds``; or a mapping of ``fnmatch`` patterns on component names to numbers
            or thresholds, of which the first that matches counts and a component that none matches is not clipped.
            ``inf`` measures only, 0 zeroes.
        norm_type: order p of the norm: any real number, or inf ("inf"). 1, 2 and inf have kernels.
        error_if_nonfinite: same as ``nonfinite="error"``.
        components: what is clipped together. None or "parameter": each tensor alone. "module": what one module owns,
            including its parametrizations. "layer": what shares the name up to its last number
            (``encoder.layer.3``). "type": the same place in every layer
            (``encoder.layer.*.output.dense.weight``). "all": everything, as ``clip_grad_norm_``. A ``ComponentSpec``
            composes these and cuts single tensors. A callable (name, tensor) -> hashable key, or None to leave the
            tensor alone, is called for every tensor at every call (once by ``ComponentClipper``).
        eps: added to the norm before dividing, as ``clip_grad_norm_`` does; not where ``max_norm`` is a threshold
            that follows norms (``ParamRelative``, ``EMA``, ``ZScore``, ``Percentile``, one of your own), or for the
            components under one in a mapping.
        nonfinite: what becomes of a component whose norm is inf or NaN. "propagate": as torch, inf scales by 0 and
            NaN spreads, inside that component alone. "zero": zeroes it. "skip": leaves it as it is. "error":
            RuntimeError that names the components, no gradient changed; syncs with the host. A component whose cap
            is inf is only measured, whatever its norm.
        inv_scale: inverse of the loss scale: a number, or a Tensor of one element, used without a sync. Norms and
            caps are those of g * inv_scale, and that is what is left in ``.grad``, clipped, from the same pass. A
            parameter that belongs to no component keeps its scale.
        found_inf: Tensor of one element, set to 1 if any gradient of a component is inf or NaN, otherwise left as it
            is, as ``torch.amp.GradScaler`` uses it.
        process_group: for plain tensors of which each rank holds a part (ZeRO partitions; parameters of
            ``FullyShardedDataParallel`` that come without it): the ranks that together hold all. DTensors work
            without it, with norms and slices of the logical gradient. So does the module that
            ``FullyShardedDataParallel`` returned: each of its units says how and over which ranks it shards, and a
            group that is given has to be the same. What it ignores counts once, with this rank's gradient, which all
            ranks should have alike. Not for ``DistributedDataParallel``, where each rank has all.
        pp_mesh: ranks that hold different parameters of one model, such as stages of a pipeline. Components that
            several of them have parts of are added up over it; all others cause no traffic.
        backend: None for the best available, or "cuda", "triton", "cpu", "foreach", "reference": used or refused.

    All ranks that share sharded parameters make this call together and pass all of them, with or without gradients.
    The first call compares the ranks' components (with a callable in ``components`` every call: prefer
    ``ComponentClipper`` there); each later one costs one all-reduce of a number a component for each set of ranks
    that parameters are sharded over.

    Returns:
        [K] norms before clipping, float32 (float64 if any gradient of this call is), on the device of the first
        gradient. K and the order depend on ``parameters`` alone: without gradient, a component's norm is 0.

    Raises:
        TypeError, ValueError: an argument or gradient that isn't what it should be, or, on all ranks at the first
            call, components that differ between ranks; nothing is changed.
        RuntimeError: a non-finite norm under "error", on all ranks alike; or a named backend that can't serve;
            nothing is changed.

    Example:
        >>> import torch
        >>> from cwclip_kernels import fused_component_clip_
        >>> model = torch.nn.Linear(2, 1)
        >>> model.weight.grad = torch.tensor([[3.0, 4.0]])
        >>> model.bias.grad = torch.tensor([0.5])
        >>> fused_component_clip_(model, max_norm=1.0)
        tensor([5.0000, 0.5000])
        >>> model.weight.grad, model.bias.grad
        (tensor([[0.6000, 0.8000]]), tensor([0.5000]))

    References:
        Yang & Ma, "Improving Stability of Fine-Tuning Pretrained Language Models via Component-Wise Gradient
        Norm Clipping", EMNLP 2022, arXiv 2210.10325. eps: ``torch.nn.utils.clip_grad_norm_``.
    """
    options = check_options(norm_type, error_if_nonfinite, eps, nonfinite, backend)
    scale = LossScale.of(inv_scale, found_inf)
    if is_traced():
        traced.refuse_ranks(process_group is not None or pp_mesh is not None)
        named = named_tensors(parameters)
        resolved = resolve(named, components)
        traced.check_bound(max_norm, named.tensors, resolved)
        return traced.clip_(named.tensors, resolved, max_norm, options, scale)[0]
    settings = partial(options.in_words, max_norm, pp_mesh)
    tensors, session = session_for(parameters, components, settings, process_group, pp_mesh)
    return session.clip_(tensors, session.caps_for(max_norm, tensors, options.rule), options, scale)[0]


def component_norms(
    parameters: Parameters,
    norm_type: float = 2.0,
    *,
    components: Grouping = None,
    inv_scale: float | Tensor | None = None,
    found_inf: Tensor | None = None,
    process_group: ProcessGroup | DeviceMesh | None = None,
    pp_mesh: ProcessGroup | DeviceMesh | None = None,
    backend: str | None = None,
) -> Tensor:
    """Norm of each component's gradient, which stays as it is: ``torch.nn.utils.get_total_norm`` by component.

    Arguments and errors: :func:`fused_component_clip_`. With ``inv_scale`` the norms are those of g * inv_scale,
    and ``found_inf`` is set to 1 if any gradient of a component is inf or NaN.

    Returns:
        [K] norms, float32 (float64 if any gradient is), on the gradients' device; no host sync.

    Example:
        >>> import torch
        >>> from cwclip_kernels import component_norms
        >>> model = torch.nn.Linear(2, 1)
        >>> model.weight.grad = torch.tensor([[3.0, 4.0]])
        >>> component_norms(model)
        tensor([5., 0.])
        >>> component_norms(model, norm_type=1.0, components="all")
        tensor([7.])
    """
    options, scale = check_options(norm_type, backend=backend), LossScale.of(inv_scale, found_inf)
    if is_traced():
        traced.refuse_ranks(process_group is not None or pp_mesh is not None)
        named = named_tensors(parameters)
        return traced.norms_of(named.tensors, resolve(named, components), options.rule.norm_type, backend, scale)
    tensors, session = session_for(parameters, components, options.in_words, process_group, pp_mesh)
    return session.norms(tensors, options.rule.norm_type, backend, scale)


def component_clip_with_norms_(
    parameters: Parameters,
    max_norm: MaxNorm,
    norms: Tensor,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    *,
    components: Grouping = None,
    eps: float = 1e-6,
    nonfinite: str = "propagate",
    inv_scale: float | Tensor | None = None,
    process_group: ProcessGroup | DeviceMesh | None = None,
    pp_mesh: ProcessGroup | DeviceMesh | None = None,
    backend: str | None = None,
) -> Tensor:
    """Clips each component's gradient by norms that are known; ``torch.nn.utils.clip_grads_with_norm_`` for many.

        coef_c = min(1, max_norm_c / (norms_c + eps));  g <- coef_c * inv_scale * g, in place

    ``component_norms`` and then this is :func:`fused_component_clip_` in two halves, with room for what is to happen
    to the norms in between, such as a reduction of your own. Other arguments and errors are as there. Thresholds
    learn from these norms. Nothing is measured, and no rank asks another: all that share a component have to pass the
    same norm.

    Args:
        parameters: as for :func:`fused_component_clip_`.
        max_norm: the caps, likewise.
        norms: [K], floating-point, >= 0, of the unscaled gradients; used where it lies, without a sync.
        norm_type: of these norms. FromGlobal's and RMS caps depend on it.
        error_if_nonfinite: same as ``nonfinite="error"``.
        components: as for :func:`fused_component_clip_`, like all that follow.
        eps: added to the norm before dividing.
        nonfinite: what becomes of a component whose norm is given as inf or NaN.
        inv_scale: inverse of the loss scale, taken out in the same pass.
        process_group: ranks that hold parts of plain tensors.
        pp_mesh: ranks that hold other parameters of the model.
        backend: None for the best available.

    Returns:
        [K] the coefficients.

    Raises:
        TypeError, ValueError: an argument or gradient that isn't what it should be; nothing is changed.
        RuntimeError: a non-finite norm under "error", or a named backend that can't serve; nothing is changed.

    Example:
        >>> import torch
        >>> from cwclip_kernels import component_clip_with_norms_, component_norms
        >>> model = torch.nn.Linear(2, 1)
        >>> model.weight.grad = torch.tensor([[3.0, 4.0]])
        >>> component_clip_with_norms_(model, 1.0, norms=2 * component_norms(model))
        tensor([0.1000, 1.0000])
        >>> model.weight.grad
        tensor([[0.3000, 0.4000]])
    """
    options = check_options(norm_type, error_if_nonfinite, eps, nonfinite, backend)
    scale = LossScale.of(inv_scale, None)
    if is_traced():
        traced.refuse_ranks(process_group is not None or pp_mesh is not None)
        named = named_tensors(parameters)
        resolved = resolve(named, components)
        check_norms(norms, len(resolved.names))
        traced.check_bound(max_norm, named.tensors, resolved)
        return traced_scaling.clip_with_norms_(named.tensors, resolved, norms, max_norm, options, scale)[1]
    settings = partial(options.in_words, max_norm, pp_mesh)
    tensors, session = session_for(parameters, components, settings, process_group, pp_mesh)
    check_norms(norms, len(session.components.names))
    caps = session.caps_for(max_norm, tensors, options.rule)
    return session.clip_with_norms_(tensors, norms, caps, options, scale)[1]


def component_scale_(
    parameters: Parameters,
    coefs: float | Tensor,
    *,
    components: Grouping = None,
    zero_fill: bool = False,
    inv_scale: float | Tensor | None = None,
    process_group: ProcessGroup | DeviceMesh | None = None,
    pp_mesh: ProcessGroup | DeviceMesh | None = None,
    backend: str | None = None,
) -> None:
    """Multiplies each component's gradient by its coefficient, in place, in one pass and without a host sync.

        g <- coefs_c * inv_scale * g

    For rules of your own, from norms that ``component_norms`` has measured. Where the factor is 1 nothing is written.
    Other arguments and errors: :func:`fused_component_clip_`. No rank asks another: each scales what it holds, and
    all that share a component have to pass the same coefficient.

    Args:
        parameters: as for :func:`fused_component_clip_`.
        coefs: a number, or a floating-point Tensor of shape [] or [K] in the order of ``component_norms``, used where
            it lies.
        components: as for :func:`fused_component_clip_`, like all others but the next.
        zero_fill: whether a coefficient of 0 writes zeros, which erases inf and NaN, instead of multiplying.
        inv_scale: inverse of the loss scale, taken out in the same pass.
        process_group: ranks that hold parts of plain tensors.
        pp_mesh: ranks that hold other parameters of the model.
        backend: None for the best available.

    Raises:
        TypeError, ValueError: an argument or gradient that isn't what it should be; nothing is changed.
        RuntimeError: a named backend that can't serve; nothing is changed.

    Example:
        >>> import torch
        >>> from cwclip_kernels import component_norms, component_scale_
        >>> model = torch.nn.Linear(2, 1)
        >>> model.weight.grad, model.bias.grad = torch.tensor([[3.0, 4.0]]), torch.tensor([0.5])
        >>> component_scale_(model, 1 / component_norms(model))  # gradients of norm 1
        >>> model.weight.grad, model.bias.grad
        (tensor([[0.6000, 0.8000]]), tensor([1.]))
    """
    check_type(zero_fill, "zero_fill", bool, "a bool")
    options = check_options(nonfinite="zero" if zero_fill else "propagate", backend=backend)
    scale = LossScale.of(inv_scale, None)
    if is_traced():
        traced.refuse_ranks(process_group is not None or pp_mesh is not None)
        named = named_tensors(parameters)
        resolved = resolve(named, components)
        coefs = checked_coefs(coefs, len(resolved.names))
        traced_scaling.scale_(named.tensors, resolved, coefs, options, scale)
        return
    tensors, session = session_for(parameters, components, options.in_words, process_group, pp_mesh)
    session.scale_(tensors, checked_coefs(coefs, len(session.components.names)), options, scale)
