"""Accelerate's call, by component."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..components.parameters import Parameters, as_items, named_tensors
from ..components.spec import Grouping
from ..core.cache import session_for
from ..core.options import check_options
from ..thresholds.constant import MaxNorm
from ._already import refuse_double_clipping
from ._fsdp1 import group_of, without_whole_frozen
from ._learning import learning_unless_skipped
from ._optimizers import owning

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


def clip_grad_norm_(
    accelerator: Accelerator,
    parameters: Parameters,
    max_norm: MaxNorm,
    norm_type: float = 2,
    *,
    error_if_nonfinite: bool = False,
    components: Grouping = None,
    nonfinite: str = "propagate",
    process_group: ProcessGroup | DeviceMesh | None = None,
    backend: str | None = None,
) -> Tensor:
    """Clips each component's gradient to its own norm, in place, and returns the norm of all of them together.

    In place of ``accelerator.clip_grad_norm_(parameters, max_norm)``, where that is: after ``accelerator.backward``,
    under ``if accelerator.sync_gradients:``, before the optimizer's step. Gradients of a scaled loss are unscaled
    first, as there. It serves one process, ``DistributedDataParallel``, FSDP 1 and 2 and tensor parallelism.

    Args:
        accelerator: what prepared model and optimizer.
        parameters: as for ``fused_component_clip_``. Pass the prepared model itself, or its ``named_parameters()``,
            where ``components`` needs names.
        max_norm: the cap of each component, not of all together.
        norm_type: order of the norms, and of the total.
        error_if_nonfinite: as for ``fused_component_clip_``.
        components: likewise.
        nonfinite: likewise.
        process_group: likewise. That of a model prepared with FSDP 1 is found without it.
        backend: likewise.

    Returns:
        [] norm of all components before clipping, the same on all ranks: float32 (float64 if any gradient is), on the
        gradients' device; no host sync, unless a threshold has to know whether a loss scaler will skip the step. What
        a callable of ``components`` leaves alone doesn't count.

    Raises:
        TypeError, ValueError: as ``fused_component_clip_``; or, under FSDP 1, parameters of no prepared model, of
            several, or some that are sharded beside some that aren't. No gradient is clipped.
        RuntimeError: as ``fused_component_clip_``; or gradients are still being accumulated; they belong to
            DeepSpeed, Megatron-LM or XLA; or a clipper is attached to the optimizer. No gradient is clipped.

    Example:
        >>> import torch
        >>> from accelerate import Accelerator
        >>> from cwclip_kernels.integrations.accelerate import clip_grad_norm_
        >>> accelerator = Accelerator(cpu=True)
        >>> model = accelerator.prepare(torch.nn.Linear(2, 1))
        >>> accelerator.backward(model(torch.tensor([[3.0, 4.0]])).sum())
        >>> if accelerator.sync_gradients:
        ...     clip_grad_norm_(accelerator, model.parameters(), 0.05)
        tensor(5.0990)
        >>> model.weight.grad, model.bias.grad
        (tensor([[0.0300, 0.0400]]), tensor([0.0500]))

    References:
        https://huggingface.co/docs/accelerate, ``Accelerator.clip_grad_norm_``.
    """
    options = check_options(norm_type, error_if_nonfinite, 1e-6, nonfinite, backend)
    check_gradients_are_here(accelerator)
    if not accelerator.sync_gradients:
        raise RuntimeError(
            "accelerator: these gradients are still being accumulated, and clipped parts don't add up to a clipped "
            "whole; call it under `if accelerator.sync_gradients:`"
        )
    is_fsdp2 = getattr(accelerator, "is_fsdp2", False)  # unknown to Accelerate before 1.6
    if accelerator.distributed_type.value == "FSDP" and not is_fsdp2 and process_group is None:
        parameters = parameters if isinstance(parameters, nn.Module) else as_items(parameters)
        parameters, _ = without_whole_frozen(parameters)
        process_group = group_of(named_tensors(parameters), accelerator._models, "prepared by this accelerator")
    tensors, session = session_for(parameters, components, partial(options.in_words, max_norm), process_group)
    policy = session.caps_for(max_norm, tensors, options.rule)
    optimizers, scaler = getattr(accelerator, "_optimizers", ()), getattr(accelerator, "scaler", None)
    refuse_double_clipping(optimizers, scaler, tensors, "clip_grad_norm_")
    accelerator.unscale_gradients()
    with learning_unless_skipped(max_norm, scaler, owning(optimizers, tensors)):
        norms = session.clip_(tensors, policy, options)[0]
    return session.total(norms, options.rule.norm_type)


def check_gradients_are_here(accelerator: Any) -> None:
    """Raises RuntimeError, with what to do instead, where gradients are clipped before anyone else can get at them.

    Args:
        accelerator: an ``Accelerator``, or its ``state``.
    """
    kind = accelerator.distributed_type.value
    if kind not in _ELSEWHERE:
        return
    config = getattr(getattr(accelerator, "deepspeed_plugin", None), "deepspeed_config", {})
    now = f"; it is {config['gradient_clipping']!r} now" if "gradient_clipping" in config else ""
    raise RuntimeError(f"accelerator: {_ELSEWHERE[kind]}{now}")


_ELSEWHERE = {
    "DEEPSPEED": "DeepSpeed keeps its gradients to itself and clips them in its own step, all by one norm. Clip by "
    "component under FSDP 2, or leave it to DeepSpeed's gradient_clipping (DeepSpeedPlugin(gradient_clipping=...), "
    "or max_grad_norm of transformers' TrainingArguments)",
    "MEGATRON_LM": "Megatron-LM clips in its own step, all by one norm: set its gradient_clipping "
    "(MegatronLMPlugin(gradient_clipping=...)), or use FSDP 2 to clip by component",
    "XLA": "XLA's gradients are added up over devices in Accelerate's own clip_grad_norm_ alone; use that",
}
