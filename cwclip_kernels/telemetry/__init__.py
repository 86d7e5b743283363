"""What clipping found and did at each step: recorded without stalling the step, read again, plotted."""

from .live import LiveLine
from .plots import plot_run
from .recorder import ClipRecorder
from .runs import Run, read_run
from .status import write_status_json

__all__ = ["ClipRecorder", "LiveLine", "Run", "plot_run", "read_run", "write_status_json"]
