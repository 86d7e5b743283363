"""Which engines are served, and by what; the others are refused, each with its reason."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ....arguments import type_name
from ....components.parameters import NamedTensors
from ....core.optimizers import clipping_optimizer
from .base import TRIED, EngineOptimizer, check_in_module, names_in
from .whole import Bf16, Fused16, Unfused16, loss_scaling
from .zero import Zero3, Zero12

# DeepSpeed's class for each of ours; others derived from them (ZenFlow, SuperOffload) step in their own way.
KINDS: dict[str, type[EngineOptimizer]] = {
    "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer": Zero12,
    "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3": Zero3,
    "deepspeed.runtime.bf16_optimizer.BF16_Optimizer": Bf16,
    "deepspeed.runtime.fp16.fused_optimizer.FP16_Optimizer": Fused16,
    "deepspeed.runtime.fp16.unfused_optimizer.FP16_UnfusedOptimizer": Unfused16,
}


def check_engine(engine: Any, replaces_clipping: bool = False) -> None:
    """Raises TypeError unless it is a ``DeepSpeedEngine``, and RuntimeError if its gradients can't be clipped here.

    With ``replaces_clipping`` the clipping of its configuration is no reason not to.
    Ranks must agree on all that is asked here, as they do if they have the same configuration.
    """
    import deepspeed

    if not isinstance(engine, deepspeed.DeepSpeedEngine):
        raise TypeError(f"engine: expected what deepspeed.initialize() returns, not {type_name(engine)}")
    refused = _refused_setting(engine, replaces_clipping) or _refused_optimizer(engine)
    if refused is not None:
        raise RuntimeError(f"engine: {refused}")


def _refused_setting(engine: Any, replaces_clipping: bool) -> str | None:
    import deepspeed

    clipping = engine.gradient_clipping()
    if clipping and not replaces_clipping:
        return (
            f'its configuration has "gradient_clipping": {clipping!r}, by one norm, which is DeepSpeed\'s default in '
            'some versions; set "gradient_clipping": 0 to clip by component instead'
        )
    if isinstance(engine, deepspeed.PipelineEngine):
        return "a PipelineEngine isn't served, whose stages have other parameters each; use ZeRO without pipeline"
    mpu = engine.mpu
    parallel = [
        ask()
        for ask in (getattr(mpu, f"get_{kind}model_parallel_world_size", None) for kind in ("tensor_", "slice_", ""))
        if ask is not None
    ]
    if getattr(engine, "autotp_size", lambda: 0)() > 1 or max(parallel, default=1) > 1:
        return (
            "model parallelism isn't served: nothing says which parts of a parameter are copies, and would count "
            "twice in its norm; use ZeRO, or FSDP2 with tensor parallelism"
        )
    if getattr(engine, "amp_enabled", lambda: False)():
        return 'apex ("amp") isn\'t served; use "bf16" or "fp16" of DeepSpeed'
    compiled = getattr(engine._config, "compile_config", None)
    if getattr(compiled, "deepcompile", False):
        return 'DeepCompile ("compile": {"deepcompile": true}) isn\'t served, which replaces parts of the step'
    return None


def _refused_optimizer(engine: Any) -> str | None:
    optimizer, basic = engine.optimizer, getattr(engine, "basic_optimizer", None)
    if optimizer is None or type(optimizer).__name__ in ("DummyOptim", "DeepSpeedZeRoOffload"):
        return "it has no optimizer, so nothing is stepped; give deepspeed.initialize() one"
    clipping = clipping_optimizer(basic)
    if clipping is not None:
        return (
            f"{type_name(clipping)} clips in its own step, where DeepSpeed gives it flat partitions instead of "
            "parameters; use torch.optim.AdamW"
        )
    if "onebit" in type(basic).__module__:
        return f"{type_name(basic)} averages gradients in its own step, so they can't be clipped before"
    groups = getattr(basic, "param_groups", ())
    if any(group.get("use_muon") for group in groups):
        return "Muon isn't served: it clips orthogonalized updates, whose norms don't depend on the gradients'"
    if not isinstance(optimizer, torch.optim.Optimizer) and _path_of(optimizer) not in KINDS:
        return f"its {type_name(optimizer)} isn't served, only {', '.join(path.rpartition('.')[2] for path in KINDS)}"
    for name, value, reason in _REFUSED:
        if getattr(optimizer, name, value) != value:
            return reason
    if issubclass(KINDS.get(_path_of(optimizer), EngineOptimizer), (Fused16, Unfused16)):
        return _refused_without_zero(engine)
    if getattr(optimizer, "has_moe_layers", False) and _path_of(optimizer).endswith("Stage3"):
        return "experts under ZeRO stage 3 aren't served; use stage 2"
    return None


def _refused_without_zero(engine: Any) -> str | None:
    """In some versions the optimizers for bf16 and fp16 without ZeRO don't fit their own engine."""
    optimizer = engine.optimizer
    scaling, is_zero = loss_scaling(optimizer), engine.zero_optimization()
    dtype = "bf16" if engine.bfloat16_enabled() else "fp16"
    case = f"{dtype} with float32 accumulation in ZeRO stage 1" if is_zero else f"{dtype} without ZeRO"
    # Where use_grad_scaling is missing every loss is scaled.
    if getattr(scaling, "use_grad_scaling", True) and "scale_if_loss" in names_in(type(engine).backward):
        return (
            f"{case} isn't served: engine.backward() of this DeepSpeed doesn't multiply the loss by the loss scale, "
            f"and its {type_name(optimizer)} divides gradients by it all the same; use ZeRO stage 2"
        )
    if dtype == "bf16" and not is_zero and scaling is optimizer:  # DeepSpeed's issue 7837
        return (
            f"{case} isn't served: engine.step() of this DeepSpeed leaves gradients in place, and the next backward "
            "pass adds to them; use ZeRO stage 2, or a newer DeepSpeed"
        )
    return None


# Attributes of optimizers, their usual value, and why there is no other.
_REFUSED: tuple[tuple[str, object, str], ...] = (
    (
        "compute_grad_norm",
        True,
        '"compute_grad_norm": false leaves out the norms that clipping needs; set it to true',
    ),
    (
        "torch_autocast_gradscaler",
        None,
        '"torch_autocast" with float16 isn\'t served, which unscales gradients after they are clipped; use bfloat16',
    ),
    ("swap_optimizer", False, "an optimizer offloaded to NVMe isn't served: its gradients aren't in memory; use cpu"),
    ("partial_offload", 1.0, 'a partly offloaded optimizer ("ratio" below 1) isn\'t served; offload all or nothing'),
    ("fused_adam_legacy", False, "\"legacy_fusion\" isn't served, which clips inside the optimizer's kernel"),
    ("fused_lamb_legacy", False, "LAMB isn't served here: DeepSpeed clips inside of its kernel"),
)


def engine_around(module: nn.Module, optimizer: object) -> Any:
    """The engine that steps a module with its optimizer, found by the hook that it has on the module.

    For those that aren't given the engine, as callbacks of transformers aren't.

    Raises:
        RuntimeError: there is no such hook.
    """
    import deepspeed

    for hook in module._forward_pre_hooks.values():
        for cell in getattr(hook, "__closure__", None) or ():
            engine = cell.cell_contents
            if isinstance(engine, deepspeed.DeepSpeedEngine) and engine.optimizer is optimizer:
                return engine
    raise RuntimeError(
        f"deepspeed {deepspeed.__version__}: its engine has no hook on {type_name(module)} to find it by, as in the "
        f"versions that this was made for ({TRIED})"
    )


def _path_of(optimizer: object) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def optimizer_of(engine: Any, named: NamedTensors) -> EngineOptimizer | None:
    """What is known of an engine's optimizer; None for one of torch's own, or derived from these.

    Raises:
        RuntimeError: it isn't as in the versions of DeepSpeed that were tried.
        ValueError: it has parameters that the module doesn't have.
    """
    kind = KINDS.get(_path_of(engine.optimizer))
    if kind is not None:
        return kind(engine.optimizer, named)
    check_in_module(parameters_of(engine), named)
    return None


def parameters_of(engine: Any) -> list[Tensor]:
    """The parameters that an engine without ZeRO steps."""
    optimizer = engine.optimizer
    groups = getattr(optimizer, "fp16_groups", None) or [group["params"] for group in optimizer.param_groups]
    return [parameter for group in groups for parameter in group]
