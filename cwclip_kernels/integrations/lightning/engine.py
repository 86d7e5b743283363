"""Clipping in the steps of ``DeepSpeedStrategy``'s engine. Imports neither Lightning nor DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...result import ClipResult
from ...thresholds.constant import MaxNorm
from ..deepspeed.clipping import EngineClipping

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def has_engine(trainer: Trainer) -> bool:
    """Whether DeepSpeed's engine steps."""
    return any(kind.__name__ == "DeepSpeedStrategy" for kind in type(trainer.strategy).__mro__)


class EngineFit:
    """What ``FitClipping`` is elsewhere. Lightning's checkpoints, which DeepSpeed writes, are those of the callback.

    ``on_clip`` is called in the engine's step, which Lightning makes after all of its hooks.
    """

    clipper = None  # no ``ComponentClipper``

    def __init__(
        self,
        trainer: Trainer,
        max_norm: MaxNorm,
        arguments: dict[str, Any],
        on_clip: Callable[[ClipResult], object] | None = None,
    ) -> None:
        engine, value = trainer.strategy.deepspeed_engine, trainer.gradient_clip_val
        is_cap = isinstance(max_norm, int | float) and max_norm == value
        if value and not is_cap:
            raise RuntimeError(
                f"Trainer(gradient_clip_val={value!r}): DeepSpeed would clip all by this one norm; leave it out"
            )
        replaces = is_cap and engine.gradient_clipping() == value
        self._clipping = EngineClipping(
            engine, max_norm, arguments, on_clip, replaces_clipping=replaces, in_checkpoints=False
        )
        self.names = self._clipping.names

    def is_for(self, max_norm: MaxNorm, arguments: dict[str, Any]) -> bool:
        """Whether it serves these arguments."""
        return self._clipping.other_argument(max_norm, arguments) is None

    def clip_(self, *_: object) -> None:
        """Does nothing: the engine's step, which follows, clips."""

    def total_norm(self, norms: Tensor) -> Tensor:
        """The norm of all components together: []."""
        return self._clipping.total_norm(norms)

    def remove(self) -> None:
        """Ends clipping."""
        self._clipping.remove()
