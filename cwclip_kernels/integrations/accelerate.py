"""A replacement for ``Accelerator.clip_grad_norm_`` that clips by component."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Unpack

from ..components.parameters import Parameters, named_tensors
from ..core.optimizers import parameters_of
from ..core.options import ClipOptions
from ..distributed.elsewhere import check_model
from ..distributed.units import units_of
from ..thresholds.constant import MaxNorm
from ._common import (
    ClipCall,
    clipper_arguments,
    is_deepspeed,
    learning_unless_skipped,
    refuse_double_clipping,
)
from .deepspeed.clipping import attached_to

if TYPE_CHECKING:
    from accelerate import Accelerator


def clip_grad_norm_(
    accelerator: Accelerator,
    parameters: Parameters,
    max_norm: MaxNorm,
    norm_type: float = 2,
    *,
    error_if_nonfinite: bool = False,
    **options: Unpack[ClipOptions],
) -> Tensor:
    """Clips each component's gradient by its own norm, in place, and returns the norm of all of them together.

    Call it where ``accelerator.clip_grad_norm_(parameters, max_norm)`` would be: after ``accelerator.backward``,
    under ``if accelerator.sync_gradients:``, before the optimizer's step. Gradients of a scaled loss are unscaled
    first, as there. It supports one process, ``DistributedDataParallel``, FSDP 1 and 2 and tensor parallelism.

    Under DeepSpeed ``accelerator.backward`` also steps. Call ``integrations.deepspeed.attach(model, max_norm, ...)``
    once, after ``prepare``, and the engine clips in its steps. This call isn't needed then; it returns the norm of
    all gradients before clipping, as Accelerate's own does there. Its arguments have to be those of ``attach``.

    Args:
        accelerator: what prepared model and optimizer.
        parameters: as for ``fused_component_clip_``. Where ``components`` needs names pass the prepared model itself,
            or its ``named_parameters()``.
        max_norm: the cap of each component, not of all together.
        norm_type: order of the norms, and of the total.
        error_if_nonfinite: as for ``fused_component_clip_``.
        options: ``components``, ``eps``, ``nonfinite``, ``process_group`` and ``backend`` of
            ``fused_component_clip_``. The process group of FSDP 1 is found without it.

    Returns:
        [] norm of all components before clipping, the same on all ranks; without those that a callable in
        ``components`` leaves alone. float32 (float64 if any gradient is), on the gradients' device; no host sync,
        unless caps that learn have to know whether a loss scaler will skip the step.

    Raises:
        TypeError, ValueError: as ``fused_component_clip_``; or, under FSDP 1, parameters of no prepared model; or,
            under DeepSpeed, others than were attached.
        RuntimeError: as ``fused_component_clip_``; or gradients are still being accumulated; Megatron-LM, XLA or
            SageMaker's model parallelism clip them; nothing is attached to DeepSpeed's engine; or a clipper is
            attached to the optimizer, or it clips in its own step (``ComponentClipAdamW``). No gradient is changed.

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
    check_gradients_are_here(accelerator)
    if not accelerator.sync_gradients:
        raise RuntimeError(
            "accelerator: these gradients are still being accumulated, and clipped parts don't add up to a clipped "
            "whole; call it under `if accelerator.sync_gradients:`"
        )
    if is_deepspeed(accelerator):
        arguments = clipper_arguments(norm_type, error_if_nonfinite, options)
        return _norm_of_step(accelerator, parameters, max_norm, arguments)
    is_fsdp2 = getattr(accelerator, "is_fsdp2", False)  # unknown to Accelerate before 1.6
    if accelerator.distributed_type.value == "FSDP" and not is_fsdp2:
        models = [*accelerator._models, *([parameters] if isinstance(parameters, nn.Module) else [])]
        options["process_group"] = cast(Any, units_of(models, options.get("process_group")))
    for model in getattr(accelerator, "_models", ()):
        if model not in _checked:  # once, as it takes a walk through the model
            check_model(model)
            _checked.add(model)
    call = ClipCall(parameters, max_norm, norm_type, error_if_nonfinite, options)
    call.caps()  # raises before anything is unscaled
    optimizers, scaler = getattr(accelerator, "_optimizers", ()), getattr(accelerator, "scaler", None)
    refuse_double_clipping(optimizers, scaler, call.tensors, "clip_grad_norm_")
    accelerator.unscale_gradients()
    with learning_unless_skipped(max_norm, scaler, _owners(call.tensors, optimizers)):
        return call.total_norm(call.clip_())


_checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _owners(tensors: Sequence[Tensor], optimizers: Iterable[Optimizer]) -> Iterator[Optimizer]:
    ids = set(map(id, tensors))
    yield from (o for o in optimizers if not ids.isdisjoint(map(id, parameters_of(o))))


def _norm_of_step(
    accelerator: Accelerator, parameters: Parameters, max_norm: MaxNorm, arguments: dict[str, Any]
) -> Tensor:
    """The norm before clipping of the step that a DeepSpeed engine took in ``accelerator.backward``."""
    engine = getattr(getattr(accelerator, "deepspeed_engine_wrapped", None), "engine", None)
    clipping = None if engine is None else attached_to(engine)
    if engine is None or clipping is None:
        raise RuntimeError(
            "accelerator: DeepSpeed steps within accelerator.backward(), so that no gradients are left to clip. Set "
            'accelerator.deepspeed_plugin.deepspeed_config["gradient_clipping"] = 0 before prepare(), and call '
            "cwclip_kernels.integrations.deepspeed.attach(model, max_norm) once, with the model that it returns"
        )
    other = clipping.other_argument(max_norm, arguments)
    if other is not None:
        raise ValueError(
            f"{other}: not what was attached to DeepSpeed's engine, which has clipped with that; pass the same here, "
            "or call remove() on what attach() returned, and attach anew"
        )
    known = {id(p) for p in engine.module.parameters() if p.requires_grad}
    if known != {id(p) for p in named_tensors(parameters).tensors if p.requires_grad}:
        raise ValueError(
            "parameters: not those of DeepSpeed's engine, all of which it has clipped; pass the prepared model"
        )
    norm = clipping.global_norm()
    if norm is None:
        raise RuntimeError("accelerator: DeepSpeed's engine hasn't taken a step yet; call it after backward()")
    return norm


def check_gradients_are_here(accelerator: Any) -> None:
    """Raises RuntimeError if an ``Accelerator``, or its ``state``, is of a kind that clips by itself alone."""
    kind = accelerator.distributed_type.value
    if "smdistributed.modelparallel.torch" in sys.modules:  # transformers imports it if it is used
        kind = "SAGEMAKER"
    if kind in _ELSEWHERE:
        raise RuntimeError(f"accelerator: {_ELSEWHERE[kind]}")


_ELSEWHERE = {
    "MEGATRON_LM": "Megatron-LM clips in its own step, all by one norm: set its gradient_clipping "
    "(MegatronLMPlugin(gradient_clipping=...)), or use FSDP 2 to clip by component",
    "SAGEMAKER": "SageMaker's model parallelism keeps parts of parameters on other ranks, and clips in "
    "optimizer.clip_master_grads(), all by one norm; use that, or FSDP 2 to clip by component",
    "XLA": "XLA's gradients are summed over devices only in Accelerate's own clip_grad_norm_; use that",
}
