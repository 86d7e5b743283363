"""What Lightning's callback and its helper share: clipping what an optimizer owns, unscaled. Imports no Lightning."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..arguments import type_name
from ..backends.memory import upload
from ..clipper import ComponentClipper
from ..components.parameters import named_tensors
from ..result import ClipResult
from ..thresholds import Threshold
from ..thresholds.constant import MaxNorm
from ._already import refuse_double_clipping
from ._fsdp1 import group_of, without_whole_frozen
from ._learning import learning_unless_skipped
from ._optimizers import innermost

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class Clipping:
    """A clipper of a whole module, and of what each optimizer owns."""

    def __init__(
        self, trainer: Trainer, module: LightningModule, max_norm: MaxNorm, arguments: dict[str, Any]
    ) -> None:
        for kind in type(trainer.strategy).__mro__:
            if kind.__name__ in _ELSEWHERE:
                raise RuntimeError(f"Trainer(strategy=...): {_ELSEWHERE[kind.__name__]}")
        self._max_norm = dict(max_norm) if isinstance(max_norm, Mapping) else max_norm
        self._arguments = arguments
        named = named_tensors(module)
        source, self._left_out = without_whole_frozen(module)
        group = arguments["process_group"]
        if group is None:
            group = group_of(named_tensors(source), [trainer.strategy.model], "of this trainer")
        self.clipper = ComponentClipper(source, max_norm, **{**arguments, "process_group": group})
        self._clipped = self.clipper.parameters
        self.clipper.check_not_in_backward(self._clipped)
        if self.clipper.raises_nonfinite and _scaler_of(trainer) is not None:
            raise ValueError(
                "error_if_nonfinite: a scaled loss makes norms inf now and then, when the step is skipped; use "
                "nonfinite='propagate', 'zero' or 'skip'"
            )
        self._known = {id(p) for p in named.tensors}
        self._parts: dict[int, tuple[tuple[int, ...], ComponentClipper, tuple[int, ...]]] = {}

    def is_for(self, max_norm: MaxNorm, arguments: dict[str, Any]) -> bool:
        """Whether it is what a call with these arguments needs, in the same fit."""
        if self._arguments != arguments:
            return False
        if isinstance(max_norm, Tensor | Threshold) or isinstance(self._max_norm, Tensor | Threshold):
            return max_norm is self._max_norm
        if isinstance(max_norm, Mapping):
            return dict(max_norm) == self._max_norm
        return type(max_norm) is type(self._max_norm) and max_norm == self._max_norm

    def clip_(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer, ours: str) -> ClipResult | None:
        """Clips what the optimizer owns; None if these gradients won't be stepped."""
        scaler = _scaler_of(trainer)
        refuse_double_clipping([optimizer], scaler, self._clipped, ours)
        if any(p.requires_grad for p in self._left_out):
            raise ValueError(
                "module: a parameter that FullyShardedDataParallel has left whole was frozen when the fit began, and "
                "isn't now, so that it would go unclipped; wrap what has it, too, or unfreeze it before the fit"
            )
        optimizer = innermost(optimizer)
        if scaler is not None and not _is_unscaled(scaler, trainer, module, optimizer):
            return None
        part = self._part_of(optimizer)[1]
        with learning_unless_skipped(self.clipper.max_norm, scaler, [optimizer]):
            return part.clip_()

    def owned_by(self, optimizer: Optimizer) -> tuple[int, ...]:
        """Which of the components are the optimizer's."""
        return self._part_of(innermost(optimizer))[2]

    def _part_of(self, optimizer: Optimizer) -> tuple[tuple[int, ...], ComponentClipper, tuple[int, ...]]:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        ids = tuple(map(id, parameters))
        known = self._parts.get(id(optimizer))
        if known is None or known[0] != ids:
            for p in parameters:
                if id(p) not in self._known:
                    raise ValueError(
                        f"optimizer: {type_name(optimizer)} owns a parameter of shape {list(p.shape)} that the "
                        "module doesn't have, or didn't when the fit began, and which would go unclipped; make it an "
                        "attribute of the module in __init__ or configure_model"
                    )
            part = self.clipper.part(parameters)
            owned = tuple(sorted({component for _, component, _ in part._session.components.members}))
            known = self._parts[id(optimizer)] = ids, part, owned
        return known


_ELSEWHERE = {
    "DeepSpeedStrategy": "DeepSpeed keeps its gradients to itself and clips them in its own step, all by one norm: "
    "use Trainer(gradient_clip_val=...), or strategy='fsdp' to clip by component",
    "XLAFSDPStrategy": "XLA's FSDP keeps a part of each gradient on each device, and its norms are known to itself "
    "alone: use Trainer(gradient_clip_val=...)",
}


class Window:
    """What is to be logged, kept on the device until then.

    Attributes:
        has_stepped: whether there was a step; for the callback to set back.
    """

    def __init__(self, clipper: ComponentClipper, norm_type: float) -> None:
        self.has_stepped = False
        self._clipper = clipper
        self._norm = f"grad_{float(norm_type)}_norm"
        self._norms: Tensor | None = None
        self._clipped = self._seen = torch.zeros(())
        self._masks: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def add(self, result: ClipResult, owned: tuple[int, ...]) -> None:
        """Takes in a step of an optimizer that owns these components."""
        self.has_stepped = True
        if self._norms is None:
            self._norms = torch.zeros_like(result.norms)
            self._clipped, self._seen = (torch.zeros_like(result.norms, dtype=torch.float32) for _ in range(2))
        if len(owned) == len(result.names):
            self._norms = result.norms
        else:
            if owned not in self._masks:
                mask = torch.zeros(len(result.names), dtype=torch.bool, device="cpu")
                mask[list(owned)] = True
                self._masks[owned] = upload(mask, result.norms.device)
            self._norms = torch.where(self._masks[owned], result.norms, self._norms)
        self._clipped += result.clipped
        self._seen += result.norms != 0  # the others have no gradient, or are another optimizer's

    @torch.no_grad()
    def take(self, each: bool) -> dict[str, Tensor]:
        """Norms as they were last, and rates since this was called last."""
        assert self._norms is not None
        values = {
            f"{self._norm}_total": self._clipper.total_norm(self._norms),
            "clip_rate": self._clipped.sum() / self._seen.sum().clamp(min=1),
        }
        if each:
            rates = self._clipped / self._seen.clamp(min=1)
            for name, norm, rate in zip(self._clipper.names, self._norms, rates, strict=True):
                values[f"{self._norm}/{name}"] = norm
                values[f"clip_rate/{name}"] = rate
        self._clipped, self._seen = torch.zeros_like(self._clipped), torch.zeros_like(self._seen)
        return values


def _scaler_of(trainer: Trainer) -> Any:
    """The ``GradScaler`` at work, that of float16; None if there is none."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def _is_unscaled(scaler: Any, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> bool:
    """Sees to it that gradients don't carry the loss's scale; False if they do, and no step is to come."""
    states = scaler._per_optimizer_states
    now = trainer.fit_loop.total_batch_idx
    # A fused optimizer that was unscaled here, and then not stepped, since training_step had returned None.
    if states[id(optimizer)].get("cwclip_batch", now) != now:
        del states[id(optimizer)]
    if states[id(optimizer)]["stage"].name != "READY":
        return True
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        if module._current_fx_name in ("on_before_optimizer_step", "configure_gradient_clipping"):
            return False  # Lightning unscales before these, but for what it won't step
        raise RuntimeError(
            f"{type_name(optimizer)}: gradients still carry the loss's scale, and can't be clipped; call this in "
            "configure_gradient_clipping, or under manual optimization in on_before_optimizer_step"
        )
    if "grad_scaler" in inspect.signature(optimizer.step).parameters:
        raise RuntimeError(
            f"{type_name(optimizer)} unscales its gradients in its own step, and they can't be clipped before; use a "
            "fused optimizer of torch, or precision='bf16-mixed', which has no scale"
        )
    if scaler._scale is None:  # nothing has been scaled yet, so there is nothing to clip
        return False
    scaler.unscale_(optimizer)  # whose step knows then that it needn't
    states[id(optimizer)]["cwclip_batch"] = now
    return True


def lightnings_own(trainer: Trainer) -> str | None:
    """The setting by which Lightning clips by itself; None if it doesn't."""
    value = trainer.gradient_clip_val
    if value is None or not 0 < value < math.inf:
        return None
    algorithm = trainer.gradient_clip_algorithm
    shown = "" if algorithm is None else f", gradient_clip_algorithm={algorithm.value!r}"
    return f"Trainer(gradient_clip_val={value}{shown})"


def warn_of_another_cap(trainer: Trainer, module: LightningModule, max_norm: MaxNorm) -> None:
    setting = lightnings_own(trainer)
    if setting is None or (isinstance(max_norm, int | float) and max_norm == trainer.gradient_clip_val):
        return
    if module._current_fx_name == "configure_gradient_clipping":  # which replaces Lightning's own clipping
        effect = "has no effect where configure_gradient_clipping clips by component: pass it on as max_norm"
    else:
        effect = "clips as well, after each component has been clipped: leave one of them out"
    warnings.warn(f"{setting} {effect}", UserWarning, stacklevel=3)
