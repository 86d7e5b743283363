"""What caps have learnt travels with an engine's own checkpoints, in their client state."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ....arguments import type_name, warn_caller
from .base import unknown

KEY = "cwclip_kernels"


class Checkpoints:
    """``save_checkpoint`` and ``load_checkpoint`` of one engine, replaced until ``remove()``.

    ``state`` returns what is to be saved, {} for nothing, and ``load`` takes it. Without them a trainer saves it.
    """

    def __init__(
        self,
        engine: Any,
        state: Callable[[], dict[str, Any]] = dict,
        load: Callable[[Mapping[str, Any]], object] = dict,
    ) -> None:
        self._engine, self._state, self._load = engine, state, load
        for name in ("save_checkpoint", "load_checkpoint"):
            if name in vars(engine):
                raise RuntimeError(f"engine: its {name} is replaced already, by something else")
            if not callable(getattr(engine, name, None)):
                raise RuntimeError(unknown(engine, f"it has no {name}()"))
        engine.save_checkpoint, engine.load_checkpoint = self._save_checkpoint, self._load_checkpoint

    def remove(self) -> None:
        """Puts the engine's own methods back."""
        for name in ("save_checkpoint", "load_checkpoint"):
            vars(self._engine).pop(name, None)

    def _save_checkpoint(
        self, save_dir: Any, tag: Any = None, client_state: Any = None, *rest: Any, **more: Any
    ) -> Any:
        state = dict(client_state or {})
        learnt = self._state()
        if learnt:
            state[KEY] = learnt
        return type(self._engine).save_checkpoint(self._engine, save_dir, tag, state, *rest, **more)

    def _load_checkpoint(self, load_dir: Any, *rest: Any, **more: Any) -> Any:
        load = type(self._engine).load_checkpoint
        asked = inspect.signature(load).bind(self._engine, load_dir, *rest, **more).arguments
        path, client_state = load(self._engine, load_dir, *rest, **more)
        if path is None:
            return path, client_state
        # The optimizer goes on with the clip_grad that was saved, whatever the configuration says.
        optimizer = self._engine.optimizer
        saved = getattr(optimizer, "clip_grad", 0)
        if saved:
            optimizer.clip_grad = 0.0
            warn_caller(
                f"{load_dir}: this run was clipped with gradient_clipping={saved!r} by DeepSpeed; it goes on with "
                "clipping by component alone"
            )
        learnt = client_state.pop(KEY, None) if client_state else None
        only_module = asked.get("load_module_only", False) or not asked.get("load_optimizer_states", True)
        if only_module or not self._state():  # caps that don't learn, or of which a trainer takes care
            return path, client_state
        if learnt is not None:
            self._load(learnt)
        else:
            warn_caller(
                f"{load_dir}: nothing that caps had learnt was saved there, so they begin anew; to load it from "
                f"elsewhere call load_state_dict() of the {type_name(self._load.__self__)}"  # type: ignore[attr-defined]
            )
        return path, client_state
