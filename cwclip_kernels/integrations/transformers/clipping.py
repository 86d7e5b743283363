"""What mixin and callback share: a clipper for the Trainer's model, statistics for its log, its checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Unpack

from ...arguments import type_name, warn_caller
from ...clipper import ComponentClipper
from ...components.naming import Aliases
from ...components.parameters import named_tensors
from ...components.patterns import matches, no_match
from ...components.resolve import resolve
from ...core.options import ClipOptions
from ...result import ClipResult, ClipStatistics
from ...thresholds import Threshold
from ...thresholds.caps import Caps, MaxNorm
from .._common import as_given, checked, clipper_of, is_same_cap, learner, learning_unless_skipped

FILE = "component_clipping.pt"  # in a checkpoint's folder, where caps learn


class TrainerClipping:
    """Clips a trainer's model at each optimizer step. Arguments are those of ``ComponentClipCallback``.

    Attributes:
        last: the ``ClipResult`` of the last step; None before the first.
        steps: clipped since ``start``.
        clipped: the parameters that the clipper clips.
    """

    def __init__(
        self,
        max_norm: MaxNorm | None = None,  # None: the trainer's own number
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        *,
        log_norms: str | None = None,
        on_clip: Callable[[ClipResult], object] | None = None,
        **options: Unpack[ClipOptions],
    ) -> None:
        if log_norms is not None and not isinstance(log_norms, str):
            raise TypeError(f"log_norms: expected a pattern of component names or None, not {type_name(log_norms)}")
        checked(norm_type, error_if_nonfinite, options)
        self._max_norm = max_norm
        self._options: dict[str, Any] = {"norm_type": norm_type, "error_if_nonfinite": error_if_nonfinite, **options}
        self._log_norms, self._on_clip = log_norms, on_clip
        self._untrained: dict[str, Any] | None = None  # states of the caps: before any run,
        self._at_start: dict[str, Any] | None = None  # and before this one
        self.start()

    def __getstate__(self) -> dict[str, Any]:
        # A copy looks up the parameters of the model that it is called with; this one may be wrapped in something
        # that can't be copied.
        return {**self.__dict__, "_clipper": None, "clipped": (), "_left_out": []}

    def start(self, *, anew: bool = False) -> None:
        """Begins a training run; ``anew``: caps that learn forget what earlier runs taught them."""
        if isinstance(self._max_norm, Threshold):
            if anew and self._untrained is None:
                self._untrained = self._max_norm.state_dict()
            elif anew and self._untrained is not None:
                self._max_norm.load_state_dict(self._untrained)
            self._at_start = self._max_norm.state_dict()
        self._reset()

    def start_again(self) -> None:
        """Begins the same run again, after a step failed: caps that learn are as they were when it began."""
        if isinstance(self._max_norm, Threshold) and self._at_start is not None:
            self._max_norm.load_state_dict(self._at_start)
        self._reset()

    def _reset(self) -> None:
        self.last: ClipResult | None = None
        self.steps = 0
        self._clipper: tuple[nn.Module, MaxNorm, ComponentClipper] | None = None  # with what it was made for
        self.clipped: tuple[Tensor, ...] = ()
        self._left_out: list[Tensor] = []
        self._statistics = ClipStatistics()

    def check(self, model: nn.Module, trainers_cap: float | None) -> None:
        """Raises TypeError or ValueError now for arguments that would be wrong at the first step."""
        components = resolve(named_tensors(model), self._options.get("components"))
        cap = self._cap(trainers_cap)
        if not isinstance(cap, Threshold):  # which would settle on a device, and that isn't known yet
            Caps(cap, components.names, aliases=components.aliases)
        self._logged(components.names, components.aliases)

    def clipper_for(self, model: nn.Module, trainers_cap: float | None, *, scaled: bool = False) -> ComponentClipper:
        """The clipper of this model; changes no gradient.

        Args:
            model: prepared, with whatever wraps it.
            trainers_cap: the trainer's own setting; None or 0: nothing is clipped.
            scaled: whether the loss is.
        """
        cap = self._cap(trainers_cap)
        if self._clipper is not None and not any(p.requires_grad for p in self._left_out):
            known_model, known_cap, clipper = self._clipper
            if model is known_model and is_same_cap(known_cap, as_given(cap)):
                return clipper
        clipper, self._left_out = clipper_of(model, cap, model, scaled, **self._options)
        self.clipped = clipper.parameters
        if self.clipped and all(p.grad is None for p in self.clipped):
            raise RuntimeError(
                "no parameter has a gradient when the optimizer is to step: an optimizer that steps inside "
                "backward (LOMO, the layerwise ones) leaves nothing to clip; use another args.optim"
            )
        self._clipper = model, as_given(cap), clipper
        return clipper

    def clip_(self, clipper: ComponentClipper, scaler: object = None, optimizers: Iterable[Optimizer] = ()) -> Tensor:
        """Clips, and returns the norm of all components before: [].

        No host sync, except for caps that learn under a loss scale, which have to know whether the step is taken.

        Args:
            clipper: what ``clipper_for`` returned.
            scaler: the ``GradScaler`` that has unscaled the gradients, or None.
            optimizers: that are about to be stepped.
        """
        with learning_unless_skipped(clipper.max_norm, scaler, optimizers):
            self.last = clipper.clip_()
        self.steps += 1
        self._statistics.add(self.last)
        if self._on_clip is not None:
            self._on_clip(self.last)
        return clipper.total_norm(self.last.norms)

    def numbers(self) -> dict[str, float]:
        """For the log: statistics of the steps since the last call; waits for the device."""
        found = self._statistics.as_dict()
        self._statistics.reset()
        if self.last is not None and self._log_norms is not None:
            logged, norms = self._logged(self.last.names), self.last.norms.tolist()
            found |= {f"component_norm/{self.last.names[i]}": norms[i] for i in logged}
        return found

    def save(self, folder: str | Path, **more: Any) -> None:
        """Writes what caps have learnt into a checkpoint's folder; nothing if they don't learn."""
        policy = learner(self._max_norm)
        if policy is not None:
            torch.save({"max_norm": policy.state_dict(), **more}, Path(folder) / FILE)

    def load(self, *folders: str | Path, **more: Any) -> None:
        """Goes on from the first of these checkpoints that was saved with ``more``; warns if none was."""
        policy = learner(self._max_norm)
        if policy is None:
            return
        for path in (Path(folder) / FILE for folder in folders):
            if path.is_file():
                saved = torch.load(path, map_location="cpu", weights_only=True)
                if all(saved.get(key) == value for key, value in more.items()):
                    policy.load_state_dict(saved["max_norm"])
                    return
        warn_caller(
            f"{' and '.join(map(str, folders))}: no {FILE} of this run, so what {type_name(policy)} had "
            "learnt is lost and its caps begin anew; to load it from elsewhere call load_state_dict() of what you "
            "passed as max_norm"
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
