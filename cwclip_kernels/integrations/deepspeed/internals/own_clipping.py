"""DeepSpeed's own clipping by one norm, which ends where components are clipped."""

from __future__ import annotations

from typing import Any

from ....arguments import warn_caller
from .base import unknown


class OwnClipping:
    """An engine's ``gradient_clipping``, which is 0 until ``restore()``.

    Without ZeRO in float32 the engine reads its configuration at each step. Otherwise its optimizer has a copy, and
    loading a checkpoint replaces that by the number of the run that saved it.
    """

    def __init__(self, engine: Any) -> None:
        self._engine, self._configured = engine, engine.gradient_clipping()
        if self._configured:
            engine._config.gradient_clipping = 0.0
            if engine.gradient_clipping():
                raise RuntimeError(unknown(engine, "its gradient_clipping() isn't that of its configuration"))
        self._copied = getattr(engine.optimizer, "clip_grad", 0.0)
        if self._copied:
            engine.optimizer.clip_grad = 0.0
            if not self._configured:
                warn_caller(
                    f"engine: it has loaded a checkpoint of a run that was clipped with gradient_clipping="
                    f"{self._copied!r} by DeepSpeed; it goes on with clipping by component alone"
                )

    def restore(self) -> None:
        """Puts back what was there."""
        if self._configured:
            self._engine._config.gradient_clipping = self._configured
        if self._copied:
            self._engine.optimizer.clip_grad = self._copied
