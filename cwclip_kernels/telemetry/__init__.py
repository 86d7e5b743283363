"""What clipping found and did at each step: recorded without stalling the step, read again, plotted."""

from .caps import SuggestedCap, Suggestion, suggest
from .live import LiveLine
from .plots import plot_run
from .recorder import ClipRecorder
from .runs import Run, read_run
from .status import write_status_json
from .suggestion import plot_suggestion

__all__ = [
    "ClipRecorder",
    "LiveLine",
    "Run",
    "SuggestedCap",
    "Suggestion",
    "plot_run",
    "plot_suggestion",
    "read_run",
    "suggest",
    "write_status_json",
]
