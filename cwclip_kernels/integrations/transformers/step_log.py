"""What goes into a Trainer's log about clipping: numbers of the steps since the last log."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

from transformers import TrainerState, TrainingArguments

from ...arguments import type_name
from ...components.naming import Aliases
from ...components.patterns import matches, no_match
from ...result import ClipResult, ClipStatistics
from .._common import warn_already_clipped


class StepLog:
    """Collects the results of steps.

    Args:
        log_norms: ``fnmatch`` pattern of components whose own norms are logged as well.
        on_clip: called with each ``ClipResult``.

    Attributes:
        last: the ``ClipResult`` of the last step; None before the first.
        steps: how many since ``begin``.
    """

    def __init__(self, log_norms: str | None, on_clip: Callable[[ClipResult], object] | None) -> None:
        if log_norms is not None and not isinstance(log_norms, str):
            raise TypeError(f"log_norms: expected a pattern of component names or None, not {type_name(log_norms)}")
        self._log_norms, self._on_clip = log_norms, on_clip
        self.begin()

    def begin(self) -> None:
        """Begins a run."""
        self.last: ClipResult | None = None
        self.steps = 0
        self._is_logged = True  # whether the last step has been, or there was none
        self._statistics = ClipStatistics()

    def add(self, result: ClipResult) -> None:
        """Adds a step, without a host sync."""
        if self.last is not None and self.last.names != result.names:  # param groups came or went
            self._statistics.reset()
        self.last = result
        self.steps += 1
        self._is_logged = False
        self._statistics.add(result)
        if self._on_clip is not None:
            self._on_clip(result)

    def numbers(self) -> dict[str, float]:
        """For the log: statistics of the steps since the last call; waits for the device."""
        found = self._statistics.as_dict()
        self._statistics.reset()
        if self.last is not None and self._log_norms is not None:
            logged, norms = self.logged(self.last.names), self.last.norms.tolist()
            found |= {f"component_norm/{self.last.names[i]}": norms[i] for i in logged}
        return found

    def add_to(self, logs: MutableMapping[str, Any] | None, state: TrainerState) -> None:
        """Adds the numbers to a log of steps, and to the Trainer's history, which has a copy of it.

        Logs of evaluations, and those without a step since the last one, stay as they are.
        """
        if not self._is_logged and logs is not None and "loss" in logs and "learning_rate" in logs:
            numbers = self.numbers()
            self._is_logged = True
            logs.update(numbers)
            state.log_history[-1].update(numbers)

    def logged(self, names: tuple[str, ...], aliases: Aliases = ()) -> list[int]:
        """Positions of the components that ``log_norms`` matches; ValueError if there are none."""
        if self._log_norms is None:
            return []
        found = [i for i, name in enumerate(names) if matches(name, self._log_norms)]
        if not found:
            raise ValueError(
                f"log_norms: {self._log_norms!r} {no_match(self._log_norms, names, 'components', aliases)}"
            )
        return found


def warn_of_max_grad_norm(args: TrainingArguments) -> None:
    """Warns once if Trainer itself clips before the callbacks run."""
    warn_already_clipped(
        f"max_grad_norm of TrainingArguments (1.0 by default) is {args.max_grad_norm!r},",
        args.max_grad_norm,
        "so Trainer first clips these gradients, all by one norm, which changes what components are clipped to; "
        "set max_grad_norm=0",
    )
