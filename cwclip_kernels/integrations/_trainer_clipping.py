"""What the ways into a trainer have in common: a clipper for its model, numbers for its logs, its checkpoints."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..arguments import check_type, type_name
from ..clipper import ComponentClipper
from ..components.naming import Aliases
from ..components.parameters import named_tensors
from ..components.patterns import matches, no_match
from ..components.resolve import resolve
from ..components.spec import Grouping
from ..core.caps import fixed_caps
from ..core.options import check_options
from ..result import ClipResult
from ..thresholds import Threshold
from ..thresholds.constant import MaxNorm
from ._fsdp1 import group_of, without_whole_frozen
from ._learning import learning_unless_skipped, learns

FILE = "component_clipping.pt"  # in a checkpoint's folder, where caps learn


class TrainerClipping:
    """Clips a trainer's model at each optimizer step.

    Args:
        max_norm: as for ``ComponentClipper``, or None for the trainer's own number.
        norm_type: as for ``ComponentClipper``.
        error_if_nonfinite: likewise.
        components: likewise; names are those of the model, whatever wraps it.
        eps: likewise.
        nonfinite: likewise.
        backend: likewise.
        log_norms: ``fnmatch`` pattern of components whose own norms are logged, too.
        on_clip: called with each ``ClipResult``, such as ``ClipRecorder.record``.

    Attributes:
        last: what the last step's clipping found and did; None before the first.
        steps: clipped since ``start``.
        clipped: the parameters whose gradients are clipped; none before ``clipper_for``.

    Raises:
        TypeError, ValueError: an argument that isn't what it should be.
    """

    def __init__(
        self,
        max_norm: MaxNorm | None = None,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        *,
        components: Grouping = None,
        eps: float = 1e-6,
        nonfinite: str = "propagate",
        backend: str | None = None,
        log_norms: str | None = None,
        on_clip: Callable[[ClipResult], object] | None = None,
    ) -> None:
        check_type(log_norms, "log_norms", str | None, "a pattern of component names or None")
        check_options(norm_type, error_if_nonfinite, eps, nonfinite, backend)
        self._max_norm = max_norm
        self._options: dict[str, Any] = {
            "norm_type": norm_type,
            "error_if_nonfinite": error_if_nonfinite,
            "components": components,
            "eps": eps,
            "nonfinite": nonfinite,
            "backend": backend,
        }
        self._log_norms = log_norms
        self._on_clip = on_clip
        self._untrained: dict[str, Any] | None = None
        self._at_start: dict[str, Any] | None = None
        self.start()

    def __getstate__(self) -> dict[str, Any]:
        # A copy looks the parameters up in the model that it is called with; the one that is trained may be wrapped
        # in what can't be copied.
        return {**self.__dict__, "_clipper": None, "_made_for": None, "clipped": (), "_left_out": []}

    def start(self, *, anew: bool = False) -> None:
        """Begins a training run: parameters are looked up again.

        Args:
            anew: whether caps that learn forget what an earlier run taught them.
        """
        if isinstance(self._max_norm, Threshold):
            if anew and self._untrained is None:
                self._untrained = self._max_norm.state_dict()
            elif anew and self._untrained is not None:
                self._max_norm.load_state_dict(self._untrained)
            self._at_start = self._max_norm.state_dict()
        self._forget()

    def start_again(self) -> None:
        """Begins the same run again, after a step failed: caps that learn are as they were when it began."""
        if isinstance(self._max_norm, Threshold) and self._at_start is not None:
            self._max_norm.load_state_dict(self._at_start)
        self._forget()

    def _forget(self) -> None:
        self.last: ClipResult | None = None
        self.steps = 0
        self._clipper: ComponentClipper | None = None
        self._made_for: tuple[nn.Module, object] | None = None
        self.clipped: tuple[Tensor, ...] = ()
        self._left_out: list[Tensor] = []
        self._numbers = ClipNumbers()

    def check(self, model: nn.Module, trainers_cap: float | None) -> None:
        """Raises TypeError or ValueError now for what would be wrong with the arguments at the first step."""
        components = resolve(named_tensors(model), self._options["components"])
        cap = self._cap(trainers_cap)
        if not isinstance(cap, Threshold):  # which would settle on a device, and that isn't known yet
            fixed_caps(cap, components)
        self._logged(components.names, components.aliases)

    def clipper_for(self, model: nn.Module, trainers_cap: float | None, *, scaled: bool = False) -> ComponentClipper:
        """The clipper of this model; changes no gradient.

        Args:
            model: prepared, with whatever wraps it.
            trainers_cap: what the trainer is told to clip to; None or 0: nothing.
            scaled: whether the loss is.
        """
        made_for = model, self._cap(trainers_cap)
        is_made = self._made_for is not None and all(map(_same, made_for, self._made_for))
        if self._clipper is None or not is_made or any(p.requires_grad for p in self._left_out):
            source, self._left_out = without_whole_frozen(model)
            group = group_of(named_tensors(source), [model], "that is trained")
            clipper = ComponentClipper(source, made_for[1], process_group=group, **self._options)
            clipped = clipper.parameters
            clipper.check_not_in_backward(clipped)
            if scaled and clipper.raises_nonfinite:
                raise ValueError(
                    "nonfinite: 'error' can't be used with fp16, where a scaled loss has inf now and then and the "
                    "step is skipped; use 'propagate', 'zero' or 'skip'"
                )
            if clipped and all(p.grad is None for p in clipped):
                raise RuntimeError(
                    "no parameter has a gradient when the optimizer is to step: an optimizer that steps inside "
                    "backward (LOMO, the layerwise ones) leaves nothing to clip; use another args.optim"
                )
            self._clipper, self._made_for, self.clipped = clipper, made_for, clipped
        return self._clipper

    def clip_(self, clipper: ComponentClipper, scaler: object = None, optimizers: Iterable[Optimizer] = ()) -> Tensor:
        """Clips, takes notes, and returns the norm of all components before: [].

        No host sync, but for caps that learn under a loss scale: these have to know whether the step is taken.

        Args:
            clipper: what ``clipper_for`` returned.
            scaler: the ``GradScaler`` that has unscaled the gradients, or None.
            optimizers: that are about to be stepped.
        """
        with learning_unless_skipped(clipper.max_norm, scaler, optimizers):
            self.last = clipper.clip_()
        self.steps += 1
        self._numbers.add(self.last)
        if self._on_clip is not None:
            self._on_clip(self.last)
        return clipper.total_norm(self.last.norms)

    def numbers(self) -> dict[str, float]:
        """For the log: what happened since the last call; waits for the device."""
        seen, self._numbers = self._numbers, ClipNumbers()
        found = seen.tell()
        if self.last is not None and self._log_norms is not None:
            logged = self._logged(self.last.names)
            norms = self.last.norms.tolist()
            found |= {f"component_norm/{self.last.names[i]}": norms[i] for i in logged}
        return found

    def save(self, folder: str | Path, **more: Any) -> None:
        """Writes what caps have learnt into a checkpoint's folder; nothing where they don't learn."""
        if isinstance(self._max_norm, Threshold) and learns(self._max_norm):
            torch.save({"max_norm": self._max_norm.state_dict(), **more}, Path(folder) / FILE)

    def load(self, *folders: str | Path, **more: Any) -> None:
        """Goes on from the first of these checkpoints that has been saved with ``more``; warns if none was."""
        if not isinstance(self._max_norm, Threshold) or not learns(self._max_norm):
            return
        for path in (Path(folder) / FILE for folder in folders):
            if path.is_file():
                saved = torch.load(path, map_location="cpu", weights_only=True)
                if all(saved.get(key) == value for key, value in more.items()):
                    self._max_norm.load_state_dict(saved["max_norm"])
                    return
        warnings.warn(
            f"{' and '.join(map(str, folders))}: no {FILE} of this run, so what {type_name(self._max_norm)} had "
            "learnt is lost and its caps begin anew; to go on from elsewhere call load_state_dict() of what you gave "
            "as max_norm",
            UserWarning,
            stacklevel=3,
        )

    def _cap(self, trainers_cap: float | None) -> MaxNorm:
        if self._max_norm is not None:
            return self._max_norm
        return trainers_cap if trainers_cap is not None and trainers_cap > 0 else math.inf

    def _logged(self, names: tuple[str, ...], aliases: Aliases = ()) -> list[int]:
        if self._log_norms is None:
            return []
        found = [i for i, name in enumerate(names) if matches(name, self._log_norms)]
        if not found:
            raise ValueError(
                f"log_norms: {self._log_norms!r} {no_match(self._log_norms, names, 'components', aliases)}"
            )
        return found


class ClipNumbers:
    """A few numbers about many steps, kept on the device until somebody looks."""

    def __init__(self) -> None:
        self._steps = 0
        self._sums: Tensor | None = None
        self._largest: Tensor | None = None

    @torch.no_grad()
    def add(self, result: ClipResult) -> None:
        """Takes a step's result; no host sync."""
        if not result.names:
            return
        norms, caps = result.norms, result.caps.to(result.norms.dtype)
        has_gradient, is_finite = norms != 0, norms.isfinite()
        tells = has_gradient & is_finite
        rate = (result.clipped & has_gradient).sum() / has_gradient.sum().clamp(min=1)
        sums = torch.stack([rate.to(norms.dtype), (~is_finite).sum().to(norms.dtype)])
        largest = torch.stack([torch.where(tells, norms, 0).amax(), torch.where(tells, norms / caps, 0).amax()])
        if self._sums is None or self._largest is None:
            self._sums, self._largest = sums, largest
        else:
            self._sums = self._sums + sums
            self._largest = torch.maximum(self._largest, largest)
        self._steps += 1

    def tell(self) -> dict[str, float]:
        """What there is to tell; waits for the device.

        ``clip_rate``: share of the components with a gradient that were clipped, mean over the steps;
        ``component_norm_max``: largest finite norm; ``clip_ratio_max``: largest finite norm over its cap, above 1
        where something was clipped; ``component_norm_nonfinite``: how many norms were inf or NaN.
        """
        if self._sums is None or self._largest is None:
            return {}
        rates, nonfinite, norm, ratio = torch.cat([self._sums, self._largest]).tolist()
        return {
            "clip_rate": rates / self._steps,
            "clip_ratio_max": ratio,
            "component_norm_max": norm,
            "component_norm_nonfinite": nonfinite,
        }


def _same(one: object, other: object) -> bool:
    return one is other or (isinstance(one, float | int) and isinstance(other, float | int) and one == other)
