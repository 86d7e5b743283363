"""Models whose parameters other libraries have cut into plain tensors, which don't say so: refused by name."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from .shards import is_dtensor


def check_model(model: nn.Module) -> None:
    """Raises ValueError if norms of its parameters would be those of parts. It asks for names, and imports nothing.

    ``smdistributed.modelparallel`` keeps parts, and float16's master copies, wherever it likes. Some versions of
    transformers 5 keep what a ``tp_plan`` cuts as plain tensors; in others these are DTensors, which work.
    """
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    for name, module in model.named_modules():
        for kind in type(module).__mro__:
            if kind.__name__ == "DistributedModel" and kind.__module__.startswith("smdistributed.modelparallel"):
                raise ValueError(
                    f"parameters: in {name or 'this'!r}, SageMaker's model parallelism keeps parts of parameters on "
                    "other ranks, whose norms it alone knows; clip by its optimizer's clip_master_grads(), all by "
                    "one norm, or shard with fully_shard (FSDP2)"
                )
        if several and _is_cut_by_plan(module):
            raise ValueError(
                f"parameters: those of {name!r} are cut by a tp_plan of transformers into plain tensors, of which "
                "each rank would take its part for the whole; upgrade transformers to a version whose tensor "
                "parallelism has DTensors (5.24 has), or shard with fully_shard (FSDP2)"
            )


# Parts of the names of plans that cut parameters; others gather, replicate or route.
_CUTS = ("colwise", "rowwise", "grouped_gemm", "moe_tp")


def _is_cut_by_plan(module: nn.Module) -> bool:
    plan: Any = vars(module).get("_hf_tp_plan")
    mesh: Any = vars(module).get("_hf_device_mesh")
    if not isinstance(plan, str) or not any(cut in plan for cut in _CUTS) or (mesh is not None and mesh.size() == 1):
        return False
    own = [p for p in module._parameters.values() if p is not None]
    return any(p.requires_grad for p in own) and not any(map(is_dtensor, own))
