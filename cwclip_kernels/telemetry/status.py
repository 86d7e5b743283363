"""One step in the format of the paper's own trainer, so that its plotting script reads our runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..components.parameters import Parameters, named_tensors
from ..core.formula import wide_dtype
from ..distributed.shards import is_dtensor
from ..result import ClipResult

_KEYS = ("current_{}_norm", "max_{}_value", "min_{}_value", "mean_{}_value")
_STATISTICS = [key.format(of) for of in ("grad", "param") for key in _KEYS]


@torch.no_grad()
def write_status_json(folder: str | Path, step: int, parameters: Parameters, result: ClipResult) -> Path:
    """Writes ``status_{step}.json`` after clipping, as the trainer of Yang & Ma (EMNLP 2022) does.

    The file holds ``step``, and for each parameter that has a gradient and a component of its own name: ``shape``,
    ``n_element``, ``clipped_num`` (n_element if it was clipped, else 0), ``previous_grad_norm``,
    ``current_grad_norm``, ``current_param_norm``, ``{max,min,mean}_{grad,param}_value``. ``current_grad_norm`` is
    measured, times the coefficient where an optimizer clips in its step; the paper's trainer writes the cap, clipped
    or not. The paper's plotting script looks for these files in
    the folder ``gradClipMemoryJsons`` of each ``seed*`` folder. Waits for the device: call it every 20 steps, say.
    With DTensors all ranks have to call it; each tensor is gathered in turn, and rank 0 writes.

    Args:
        folder: where to write, created if need be.
        step: its number.
        parameters: those that were clipped, with names.
        result: what ``ComponentClipper.clip_()`` returned, with ``components="parameter"``.

    Raises:
        ValueError: no parameter has a component of its name.

    Example:
        >>> import json, tempfile, torch
        >>> from cwclip_kernels import ComponentClipper
        >>> from cwclip_kernels.telemetry import write_status_json
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> model.weight.grad = torch.tensor([[3.0, 4.0]])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = write_status_json(folder, 20, model, ComponentClipper(model, 1.0).clip_())
        ...     status = json.loads(file.read_text())
        >>> status["step"], status["weight"]["clipped_num"], status["weight"]["previous_grad_norm"]
        (20, 2, 5.0)

    References:
        Yang & Ma, EMNLP 2022, arXiv 2210.10325; keys as in the authors' code.
    """
    named = named_tensors(parameters)
    found = result.as_dict()
    params = {name: p for name, p in zip(named.names, named.tensors, strict=True) if name in found}
    if named.names and not params:
        raise ValueError("result: no component has the name of a parameter; clip with components='parameter'")
    params = {name: p for name, p in params.items() if p.grad is not None}
    status: dict[str, object] = {"step": step}
    if params:
        device = next(iter(params.values())).device
        rows = [torch.cat((_statistics(p.grad, device), _statistics(p, device))) for p in params.values()]
        for (name, p), row in zip(params.items(), torch.stack(rows).tolist(), strict=True):
            norm, coef = found[name]
            if abs(row[0] - norm) < abs(row[0] - norm * coef):  # ComponentClipAdamW leaves gradients as they were
                row[:4] = [coef * value for value in row[:4]]
            status[name] = {
                "shape": list(p.shape),
                "n_element": p.numel(),
                "clipped_num": p.numel() if coef != 1 else 0,
                "previous_grad_norm": norm,
                **dict(zip(_STATISTICS, row, strict=True)),
            }
    file = Path(folder) / f"status_{step}.json"
    if any(map(is_dtensor, named.tensors)) and torch.distributed.get_rank() != 0:
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text(json.dumps(status), encoding="utf-8")
    unfinished.replace(file)  # atomic
    return file


def _statistics(tensor: Any, device: torch.device) -> Tensor:
    """[4]: norm, maximum, minimum and mean; 0 if it is empty."""
    wide = wide_dtype(device)
    if is_dtensor(tensor):
        tensor = tensor.full_tensor()
    if tensor.is_sparse:
        tensor = tensor.to_dense()
    if not tensor.numel():
        return torch.zeros(4, dtype=wide, device=device)
    norm = torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, wide))
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    mean = real.mean(dtype=torch.promote_types(real.dtype, wide))
    return torch.stack([value.to(device, wide) for value in (norm, real.max(), real.min(), mean)])
