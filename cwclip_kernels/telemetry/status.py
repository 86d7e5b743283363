"""One step in the layout of the paper's own trainer, so that its plotting script reads our runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..components.parameters import Parameters, named_tensors
from ..core.formula import wide_dtype
from ..distributed.shards import is_dtensor

if TYPE_CHECKING:
    from ..result import ClipResult

_KEYS = ("current_grad_norm", "current_param_norm")
_STATISTICS = tuple(f"{what}_{of}_value" for of in ("grad", "param") for what in ("max", "min", "mean"))


@torch.no_grad()
def write_status_json(folder: str | Path, step: int, parameters: Parameters, result: ClipResult) -> Path:
    """Writes ``status_{step}.json`` after clipping, as the trainer of Yang & Ma (EMNLP 2022) does.

    Top level: ``step``, and for each parameter that has a gradient and a component of its own name: ``shape``,
    ``n_element``, ``clipped_num`` (n_element if it was clipped, else 0), ``previous_grad_norm``,
    ``current_grad_norm``, ``current_param_norm``, ``{max,min,mean}_{grad,param}_value``. ``current_grad_norm`` is
    measured, not the cap that the paper's trainer writes whether it clipped or not. The script that draws the paper's
    figures looks for these files in ``gradClipMemoryJsons`` of each ``seed*`` folder. It knows no component but
    parameters.

    Reads gradients and parameters several times and waits for the device: for every 20th step, say. Where they are
    DTensors all ranks call it together, each is gathered for its turn, and rank 0 writes.

    Args:
        folder: where to; made if it isn't there.
        step: its number.
        parameters: those that were clipped, with names.
        result: what ``ComponentClipper.clip_()`` returned, with ``components="parameter"``.

    Returns:
        The file.

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
        Yang & Ma, "Improving Stability of Fine-Tuning Pretrained Language Models via Component-Wise Gradient Norm
        Clipping", EMNLP 2022, arXiv 2210.10325; keys as in the authors' code.
    """
    named = named_tensors(parameters)
    place = {name: i for i, name in enumerate(result.names)}
    pairs = list(zip(named.names, named.tensors, strict=True))
    if pairs and not any(name in place for name, _ in pairs):
        raise ValueError(
            "result: no component has the name of a parameter; the layout knows no other components than parameters"
        )
    shown = [(name, p, p.grad) for name, p in pairs if name in place and p.grad is not None]
    norms, coefs = result.norms.tolist(), result.coefs.tolist()
    status: dict[str, object] = {"step": step}
    if shown:
        rows = _measured([g for _, _, g in shown], [p.detach() for _, p, _ in shown])
        for (name, p, _), row in zip(shown, rows, strict=True):
            at = place[name]
            status[name] = {
                "shape": list(p.shape),
                "n_element": p.numel(),
                "clipped_num": p.numel() if coefs[at] != 1 else 0,
                "previous_grad_norm": norms[at],
                **row,
            }
    folder = Path(folder)
    file = folder / f"status_{step}.json"
    if any(is_dtensor(p) for _, p in pairs) and torch.distributed.get_rank() != 0:
        return file
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text(json.dumps(status), encoding="utf-8")
    unfinished.replace(file)  # whole, or not at all
    return file


def _measured(grads: Sequence[Tensor], params: Sequence[Tensor]) -> list[dict[str, float]]:
    """Norms and statistics of each gradient and parameter, with one copy to the host."""
    home = grads[0].device
    rows = [torch.stack((*_statistics(g, home), *_statistics(p, home))) for g, p in zip(grads, params, strict=True)]
    norms, others = (0, 4), (1, 2, 3, 5, 6, 7)
    table = torch.stack(rows)[:, [*norms, *others]].tolist()
    return [dict(zip((*_KEYS, *_STATISTICS), row, strict=True)) for row in table]


def _statistics(tensor: Any, home: torch.device) -> list[Tensor]:
    """Norm, maximum, minimum and mean, of nothing 0."""
    wide = wide_dtype(home)
    if is_dtensor(tensor):
        tensor = tensor.full_tensor()
    if tensor.is_sparse:
        tensor = tensor.to_dense()
    if not tensor.numel():
        return [torch.zeros((), dtype=wide, device=home)] * 4
    kind = torch.promote_types(tensor.dtype, wide)
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    mean = real.mean(dtype=torch.promote_types(real.dtype, wide))
    return [x.to(home, wide) for x in (torch.linalg.vector_norm(tensor, dtype=kind), real.max(), real.min(), mean)]
