"""``LiveLine``: what clipping does now, in one line of a terminal or notebook."""

from __future__ import annotations

import heapq
import math
import sys
import weakref
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..arguments import checked_int
from ..core.modes import outside_autograd
from ..result import ClipResult, ClipStatistics
from .to_host import ToHost

_MAX_NAME = 36  # characters


class LiveLine:
    """A line with the clip rate, how many norms were inf or NaN so far, and the worst components now.

    The clip rate is that of the steps since the line's last update, the worst components are those of the last step
    with the largest norm over cap (the largest norm, where no component has a cap). Every ``every`` steps some K
    numbers are copied to the host, and shown by the first call that finds them arrived: no step waits for the device.

    It writes nothing where the output isn't a terminal or notebook. Beside an open tqdm bar, such as a Trainer's, or
    another live display that doesn't share, and in a notebook without ipywidgets, each update is a line of its own.
    Only one process should have one, such as rank 0.

    Args:
        every: steps between updates, over which the clip rate is taken.
        worst: how many components are named.
        console: rich's ``Console``; by default the one that rich itself uses.
        force: writes a line for each update where the output isn't a terminal, too.

    Raises:
        TypeError, ValueError: an invalid argument.
        RuntimeError: rich isn't installed.

    Example:
        >>> import torch
        >>> from rich.console import Console
        >>> from cwclip_kernels import ComponentClipper
        >>> from cwclip_kernels.telemetry import LiveLine
        >>> model = torch.nn.Linear(2, 1)
        >>> clipper = ComponentClipper(model, max_norm=0.5)
        >>> with LiveLine(every=1, console=Console(width=100), force=True) as line:
        ...     model(torch.tensor([[3.0, 4.0]])).sum().backward()
        ...     line.record(clipper.clip_())  # or on_clip=line.record
        step 0 | clip rate 100.0 % | 0 non-finite | norm/cap: weight 10, bias 2
    """

    def __init__(self, every: int = 50, worst: int = 3, *, console: Any = None, force: bool = False) -> None:
        try:
            from rich import get_console
        except ImportError as error:
            raise RuntimeError(f"a live line needs rich ({error}): pip install 'cwclip_kernels[telemetry]'") from None
        self._every = checked_int(every, "every", 1)
        self._worst = checked_int(worst, "worst", 1)
        self._console = get_console() if console is None else console
        if not callable(getattr(self._console, "print", None)) or not hasattr(self._console, "is_terminal"):
            raise TypeError(f"console: expected rich's Console or None, not {type(console).__qualname__}")
        if self._console.is_jupyter:  # rich only warns there without ipywidgets
            self._can_redraw, self._is_shown = find_spec("ipywidgets") is not None, True
        else:
            self._can_redraw = self._console.is_terminal and not self._console.is_dumb_terminal
            self._is_shown = self._can_redraw or force
        self._live: Any = None
        self._statistics = ClipStatistics()
        self._names: tuple[str, ...] = ()
        self._next_step = self._in_window = self._nonfinite = 0
        self._sent: list[tuple[int, tuple[str, ...], ToHost]] = []

    @outside_autograd
    def record(self, result: ClipResult, step: int | None = None) -> None:
        """Adds a step, and now and then updates the line; nothing waits for the device.

        Args:
            result: what clipping returned.
            step: the step's number; by default one more than the last, from 0.
        """
        if not self._is_shown:
            return
        number = self._next_step if step is None else checked_int(step, "step")
        self._next_step = number + 1
        if result.names != self._names:
            self._statistics, self._names, self._in_window = ClipStatistics(), result.names, 0
        self._statistics.add(result)
        self._in_window += 1
        if self._in_window >= self._every:
            self._send(number, result)
        self._show(wait=False)

    def close(self) -> None:
        """Shows what is under way, and ends the line, which stays. Steps since the last update aren't shown."""
        self._show(wait=True)
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __enter__(self) -> LiveLine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a LiveLine belongs to one terminal: make another one instead of a copy")

    def _send(self, step: int, result: ClipResult) -> None:
        norms, statistics = result.norms, self._statistics
        counted = torch.stack((statistics.clip_rate.to(norms), statistics.nonfinite.to(norms)))
        values = torch.cat((norms, result.caps.to(norms).expand_as(norms), counted))
        self._sent.append((step, result.names, ToHost(values)))
        statistics.reset()
        self._in_window = 0

    def _show(self, wait: bool) -> None:
        line = None
        while self._sent and (wait or self._sent[0][2].has_arrived()):
            step, names, sent = self._sent.pop(0)
            line = self._text(step, names, sent.read())
        if line is not None:
            self._write(line)

    def _text(self, step: int, names: tuple[str, ...], values: Tensor) -> str:
        norms, caps = (part.tolist() for part in values[:-2].reshape(2, -1))
        rate, nonfinite = values[-2:].tolist()
        self._nonfinite += int(nonfinite)
        if all(cap == math.inf for cap in caps):
            what, sizes = "norm", norms
        else:
            what, sizes = "norm/cap", [_ratio(norm, cap) for norm, cap in zip(norms, caps, strict=True)]
        worst = heapq.nlargest(self._worst, zip(map(_rank, sizes), names, sizes, strict=True))
        shown = ", ".join(f"{_end_of(name)} {size:.3g}" for _, name, size in worst)
        parts = f"step {step}", f"clip rate {100 * rate:.1f} %", f"{self._nonfinite} non-finite", f"{what}: {shown}"
        return " | ".join(parts)

    def _write(self, line: str) -> None:
        from rich.errors import LiveError
        from rich.live import Live
        from rich.text import Text

        text = Text(line, no_wrap=True, overflow="ellipsis")
        bars = None if self._console.is_jupyter else _tqdm_with_bars()
        if self._can_redraw and bars is None:
            try:
                if self._live is None:
                    # stderr stays as it is: bars are drawn there, without ends of lines.
                    live = Live(text, console=self._console, auto_refresh=False, redirect_stderr=False)
                    live.start()
                    weakref.finalize(self, live.stop)  # which shows the cursor again
                    self._live = live
                self._live.update(text, refresh=True)
                return
            except LiveError:  # of an older rich, beside another live display
                self._can_redraw = False
        if self._live is not None:
            self._live.stop()
            self._live = None
        cleared: AbstractContextManager[Any] = nullcontext() if bars is None else bars.external_write_mode()
        with cleared:
            if self._console.is_terminal:
                self._console.print(text, no_wrap=True, overflow="ellipsis")
            else:
                self._console.print(text, soft_wrap=True)


def _end_of(name: str) -> str:
    """A long name's end, which tells components apart."""
    return name if len(name) <= _MAX_NAME else f"\N{HORIZONTAL ELLIPSIS}{name[1 - _MAX_NAME :]}"


def _ratio(norm: float, cap: float) -> float:
    if norm == 0 or cap == math.inf:
        return norm if not math.isfinite(norm) else 0.0
    return norm / cap if cap else math.inf


def _rank(size: float) -> float:
    return size if math.isfinite(size) else math.inf  # NaN, too


def _tqdm_with_bars() -> Any:
    """tqdm's class, where bars are open; else None."""
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    return tqdm if tqdm is not None and any(not bar.disable for bar in getattr(tqdm, "_instances", ())) else None
