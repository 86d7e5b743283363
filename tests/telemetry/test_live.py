"""The live line: what it says, where it writes, and that no step waits for it."""

import copy
import io
import math
import sys

import pytest
import torch

pytest.importorskip("rich")

from rich.console import Console
from rich.live import Live

from cwclip_kernels import ClipResult
from cwclip_kernels.telemetry import ClipRecorder, LiveLine, read_run
from helpers import DEVICE
from no_sync import NoSync
from recorded_runs import result

NAMES = ("a", "b", "c", "d")


def clip(norms, cap=1.0):
    norms = torch.tensor(norms, device=DEVICE)
    coefs = torch.where((norms > cap) | ~norms.isfinite(), 0.5, 1.0)
    return ClipResult(NAMES, norms, coefs, torch.tensor(cap, dtype=torch.float64, device=DEVICE))


def console(terminal=True, width=100):
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None)


def lines_of(out):
    return out.file.getvalue().replace("\x1b[2K", "\n").replace("\r", "").splitlines()


def test_what_the_line_says():
    out = console(terminal=False)
    with LiveLine(every=2, worst=2, console=out, force=True) as line:
        line.record(clip([4.0, 0.5, 0.0, 0.5]))  # one of three with a gradient
        assert lines_of(out) == []
        line.record(clip([0.5, 3.0, 0.0, math.inf]))  # two of three
        line.record(clip([0.5, 0.25, 0.0, 0.5]), step=7)
        line.record(clip([0.25, 0.5, math.nan, 2.0]))
        line.record(clip([9.0, 9.0, 9.0, 9.0]))  # half a window
    assert lines_of(out) == [
        "step 1 | clip rate 50.0 % | 1 non-finite | norm/cap: d inf, b 3",
        "step 8 | clip rate 28.6 % | 2 non-finite | norm/cap: c nan, d 2",
    ]


def test_without_caps_it_names_the_largest_norms():
    out = console(terminal=False)
    with LiveLine(every=1, worst=1, console=out, force=True) as line:
        line.record(clip([4.0, 0.5, 5.0, 0.5], cap=math.inf))
    assert lines_of(out) == ["step 0 | clip rate 0.0 % | 0 non-finite | norm: c 5"]


def test_in_a_terminal_one_line_is_written_again_and_stays():
    out = console(width=60)
    with LiveLine(every=1, console=out) as line:
        for _ in range(3):
            line.record(clip([4.0, 3.0, 2.0, 0.5]))
        assert "\n" not in out.file.getvalue()
    text = out.file.getvalue()
    assert text.count("\r\x1b[2K") == 3  # twice again, and once to end
    assert text.count("\n") == 1
    assert "\x1b[?25h" in text.rpartition("\n")[2]  # the cursor is back
    assert lines_of(out)[-2].endswith("norm/cap: a 4, b\N{HORIZONTAL ELLIPSIS}")
    assert all(len(line.replace("\x1b[?25l", "")) <= 60 for line in lines_of(out)[:-1])


def test_quiet_where_nobody_looks():
    out = console(terminal=False)
    with LiveLine(every=1, console=out) as line:
        line.record(clip([4.0, 3.0, 2.0, 0.5]))
    assert out.file.getvalue() == ""


def test_beside_a_bar_of_tqdm_each_update_is_a_line_above(monkeypatch):
    tqdm = pytest.importorskip("tqdm").tqdm
    out = console()
    monkeypatch.setattr(sys, "stdout", out.file)
    with LiveLine(every=1, console=out) as line, tqdm(total=3, file=out.file, mininterval=0, ncols=40) as bar:
        for _ in range(3):
            line.record(clip([4.0, 3.0, 2.0, 0.5]))
            bar.update()
    shown = [part for text in out.file.getvalue().splitlines() for part in text.split("\r") if part.strip()]
    ours = [text for text in shown if text.startswith("step ")]
    assert [text.partition(" |")[0] for text in ours] == ["step 0", "step 1", "step 2"]
    assert sum("it/s" in text or "/3" in text for text in shown) >= 3
    assert not any("step" in text and "/3" in text for text in shown)  # never on one line
    assert "\x1b[2K" not in out.file.getvalue()


def test_beside_another_live_display():
    out = console()
    with Live("theirs", console=out, auto_refresh=False), LiveLine(every=1, console=out) as line:
        line.record(clip([4.0, 3.0, 2.0, 0.5]))
    assert "theirs" in out.file.getvalue()
    assert "step 0 | clip rate 75.0 %" in out.file.getvalue()


def test_in_a_notebook_without_widgets(monkeypatch):
    shown = []
    module = type(sys)("IPython.display")
    module.display = shown.append
    monkeypatch.setitem(sys.modules, "IPython", type(sys)("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr("cwclip_kernels.telemetry.live.find_spec", lambda name: None)
    with LiveLine(every=1, console=Console(force_jupyter=True)) as line:
        line.record(clip([4.0, 3.0, 2.0, 0.5]))
        line.record(clip([4.0, 3.0, 2.0, 0.5]))
    assert [str(each.text).partition(" |")[0] for each in shown] == ["step 0", "step 1"]


def test_no_step_waits_for_the_device():
    line = LiveLine(every=100, console=console())
    line.record(result())
    with NoSync():
        for _ in range(50):
            line.record(result())
    line.close()


def test_with_a_recorder_and_other_components(tmp_path):
    out = console(terminal=False)
    with ClipRecorder(tmp_path / "run", live=LiveLine(every=1, console=out, force=True)) as recorder:
        recorder.record(result(), step=5)
    assert lines_of(out)[0].startswith("step 5 | clip rate")
    assert read_run(tmp_path / "run.jsonl").steps == [5]
    with LiveLine(every=2, console=out, force=True) as line:
        line.record(result())
        line.record(result(2, ("x" * 50, "y")))  # another model: another window
        line.record(result(2, ("x" * 50, "y")))
    assert lines_of(out)[1].startswith("step 2 |")
    assert "\N{HORIZONTAL ELLIPSIS}" + 35 * "x" + " " in lines_of(out)[1]


def test_what_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="every: expected a whole number >= 1"):
        LiveLine(every=0)
    with pytest.raises(TypeError, match="worst: expected a whole number"):
        LiveLine(worst="all")
    with pytest.raises(TypeError, match="console: expected rich's Console or None, not StringIO"):
        LiveLine(console=io.StringIO())
    with pytest.raises(TypeError, match="belongs to one terminal"):
        copy.deepcopy(LiveLine())
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(RuntimeError, match=r"a live line needs rich .*cwclip_kernels\[telemetry\]"):
        LiveLine()
