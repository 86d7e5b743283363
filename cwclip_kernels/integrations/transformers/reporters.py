"""Numbers that reach TensorBoard, W&B and the like: a Trainer calls its reporting callbacks before the user's."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from .step_log import StepLog


class _BeforeReporters(TrainerCallback):  # type: ignore[misc]  # mypy doesn't look into transformers
    """Adds a ``StepLog``'s numbers to logs; the first of a Trainer's callbacks, so that all others see them."""

    def __init__(self, log: StepLog) -> None:
        self.log = log

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any
    ) -> None:
        self.log.add_to(logs, state)


def begin_reporting(log: StepLog) -> None:
    """Call it in ``on_train_begin``: from now on every callback's ``on_log`` gets the numbers.

    The callback that clips keeps its place in the list, since it matters what runs before and after clipping. If
    nothing in the call stack is a Trainer's ``CallbackHandler``, its own ``on_log`` has to add the numbers.
    """
    end_reporting(log)
    handler = _handler()
    if handler is not None:
        # A new list: the handler is going through the old one, and would call a callback again.
        handler.callbacks = [_BeforeReporters(log), *handler.callbacks]


def end_reporting(log: StepLog) -> None:
    """Call it in ``on_train_end``."""
    handler = _handler()
    if handler is not None:
        handler.callbacks = [
            callback
            for callback in handler.callbacks
            if not (isinstance(callback, _BeforeReporters) and callback.log is log)
        ]


def _handler() -> Any:
    """The ``CallbackHandler`` that has called; callbacks are handed neither it nor the Trainer."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, CallbackHandler):
            return caller
        frame = frame.f_back
    return None
