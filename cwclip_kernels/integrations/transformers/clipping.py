"""What mixin and callback share: a clipper for the Trainer's model, statistics for its log, its checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Unpack

from ...arguments import warn_caller
from ...components.parameters import named_tensors
from ...components.resolve import resolve
from ...core.caps import fixed_caps
from ...core.options import ClipOptions
from ...distributed.elsewhere import check_model
from ...result import ClipResult
from ...thresholds import ByPattern, Threshold
from ...thresholds.by_pattern import settled
from ...thresholds.constant import MaxNorm
from .._common import ModelClipping, clipper_arguments, learner, learning_unless_skipped, refuse_double_clipping
from ..deepspeed.clipping import EngineClipping, attached_to
from .step_log import StepLog

FILE = "component_clipping.pt"  # in a checkpoint's folder, where caps learn


class TrainerClipping(StepLog):
    """Clips a trainer's model at each optimizer step. Arguments are those of ``ComponentClipCallback``."""

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
        super().__init__(log_norms, on_clip)
        self._arguments = clipper_arguments(norm_type, error_if_nonfinite, options)
        self._max_norm = None if max_norm is None else settled(max_norm)
        self._untrained: dict[str, Any] | None = None  # states of a threshold: before any run,
        self._at_start: dict[str, Any] | None = None  # and before this one
        self.start()

    def __getstate__(self) -> dict[str, Any]:
        # A copy looks up the parameters of the model that it is called with; this one may be wrapped in something
        # that can't be copied.
        return {**self.__dict__, "_made": None}

    def start(self, *, again: bool = False, anew: bool = False) -> None:
        """Begins a run; ``again``: the same one, after a step failed; ``anew``: caps forget earlier runs."""
        policy = self._max_norm
        if isinstance(policy, Threshold):
            state = self._at_start if again else self._untrained if anew else None
            if state is not None:
                policy.load_state_dict(state)
            self._at_start = policy.state_dict()
            if anew and not again:
                self._untrained = self._at_start
        self.begin()
        self._made: tuple[nn.Module, ModelClipping] | None = None

    def check(self, model: nn.Module, trainers_cap: float | None) -> None:
        """Raises TypeError or ValueError now for arguments that would be wrong at the first step."""
        check_model(model)
        components = resolve(named_tensors(model), self._arguments.get("components"))
        cap = settled(self._cap(trainers_cap))
        if not isinstance(cap, Threshold):  # which would settle on a device, and that isn't known yet
            fixed_caps(cap, components)
        elif isinstance(cap, ByPattern):
            cap.match(components.names, components.aliases, components.spellings)
        self.logged(components.names, components.aliases)

    def clip_(
        self,
        model: nn.Module,
        trainers_cap: float | None = None,  # None or 0: nothing is clipped
        optimizers: Sequence[Optimizer] = (),
        scaler: object = None,
        unscale: Callable[[], object] = lambda: None,
        ours: str = "",  # for messages
    ) -> Tensor:
        """Clips before a step, and returns the norm of all components before: []. No host sync unless caps learn."""
        clipping = self._clipping_of(model, self._cap(trainers_cap), scaler is not None)
        refuse_double_clipping(optimizers, scaler, clipping.clipped, ours)
        unscale()
        clipper = clipping.clipper
        with learning_unless_skipped(clipper.max_norm, scaler, optimizers):
            result = clipper.clip_()
        self.add(result)
        return clipper.total_norm(result.norms)

    def attach(self, engine: Any, trainers_cap: float | None = None) -> None:
        """Clips in the steps of a DeepSpeed engine, which is what ``clip_`` does elsewhere.

        Checkpoints are the Trainer's, as elsewhere. Nothing here keeps the engine, for which there may be no memory
        beside the next one.
        """
        attached = attached_to(engine)
        if attached is not None:
            attached.remove()
        cap = self._cap(trainers_cap)
        clipping = EngineClipping(
            engine, cap, self._arguments, self.add, replaces_clipping=True, in_checkpoints=False
        )
        self.logged(clipping.names)

    def norm_in(self, engine: Any, trainers_cap: float | None = None) -> Tensor | None:
        """What ``clip_`` returns, for an engine that has taken its step."""
        attached = attached_to(engine)
        if attached is None:
            raise RuntimeError(
                f"steps were taken, and nothing was clipped: transformers {transformers.__version__} doesn't call "
                "_prepare_for_training; use ComponentClipCallback, with max_grad_norm=0"
            )
        if attached.other_argument(self._cap(trainers_cap), self._arguments) is not None:
            self.attach(engine, trainers_cap)  # for the next step
        return attached.global_norm()

    def _clipping_of(self, model: nn.Module, cap: MaxNorm, is_scaled: bool) -> ModelClipping:
        if self._made is not None and self._made[0] is model and self._made[1].is_for(cap, self._arguments):
            return self._made[1]
        clipping = ModelClipping(model, cap, self._arguments, model, is_scaled)
        if clipping.clipped and all(p.grad is None for p in clipping.clipped):
            raise RuntimeError(
                "no parameter has a gradient when the optimizer is to step: an optimizer that steps inside "
                "backward (LOMO, the layerwise ones) leaves nothing to clip; use another args.optim"
            )
        self._made = model, clipping
        return clipping

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
            f"{' and '.join(map(str, folders))}: no {FILE} of this run, so what {policy} had "
            "learnt is lost and its caps begin anew; to load it from elsewhere call load_state_dict() of what you "
            "passed as max_norm"
        )

    def _cap(self, trainers_cap: float | None) -> MaxNorm:
        if self._max_norm is not None:
            return self._max_norm
        return trainers_cap if trainers_cap is not None and trainers_cap > 0 else math.inf
