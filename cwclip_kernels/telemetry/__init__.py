"""What clipping found and did, step by step: recorded without stalling the step, read again, drawn.

recorder.py   ClipRecorder: a ring buffer on the device, drained to files now and then
writers.py    the files: JSON lines, CSV, TensorBoard
runs.py       read_run: those files, and the paper's status files, as tensors
status.py     write_status_json: one step in the layout of the paper's own trainer
plots.py      plot_run: the paper's figures (needs matplotlib)
"""

from .plots import plot_run
from .recorder import ClipRecorder
from .runs import Run, read_run
from .status import write_status_json

__all__ = ["ClipRecorder", "Run", "plot_run", "read_run", "write_status_json"]
