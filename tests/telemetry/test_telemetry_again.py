"""A run that is recorded on: files go on counting, whatever a killed run left of them; copies; conversions."""

import copy
import itertools
import os
import pickle
import subprocess
import sys
import warnings

import pytest
import torch

from cwclip_kernels import ComponentClipper
from cwclip_kernels.telemetry import ClipRecorder, read_run, writers
from numpys import INTEGERS, of_numpy
from recorded_runs import KILLED, NAMES, check_run, recorded, result

FILES = ["jsonl", "csv"]


def lasting(count):
    return [result() for _ in range(count)]


# ------------------------------------------------------------------------------------------------------------
# Going on
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [("jsonl",), ("csv",), ("jsonl", "csv"), ("csv", "jsonl")])
@pytest.mark.parametrize("counts", [(4, 4), (1, 1, 1), (3, 5)])
def test_a_run_in_several_parts_is_one_run(tmp_path, kinds, counts):
    results = lasting(sum(counts))
    left = iter(results)
    for count in counts:
        recorded(tmp_path / "run", itertools.islice(left, count), every=2, formats=kinds)
    for kind in kinds:
        check_run(read_run(tmp_path / f"run.{kind}"), results)


def test_the_loop_of_the_readme_after_a_resume(tmp_path):
    model = torch.nn.Linear(3, 2)
    for _ in range(2):
        clipper = ComponentClipper(model, 0.1)
        with ClipRecorder(tmp_path / "run", every=100) as recorder:
            for _ in range(4):
                model.zero_grad()
                model(torch.randn(2, 3)).sum().backward()
                recorder.record(clipper.clip_())
    assert read_run(tmp_path / "run.jsonl").steps == list(range(8))


@pytest.mark.parametrize("kind", FILES)
def test_numbers_that_are_given_are_gone_on_from(tmp_path, kind):
    """The last that was recorded counts, not the largest: as within one recorder."""
    first = lasting(5)
    with ClipRecorder(tmp_path / "run", formats=(kind,)) as recorder:
        for step, r in zip((0, 10, 20, 30, 20), first, strict=True):  # from step 30 it went back to 20
            recorder.record(r, step=step)
    second = lasting(3)
    with ClipRecorder(tmp_path / "run", formats=(kind,)) as recorder:
        recorder.record(second[0])
        recorder.record(second[1])
        recorder.record(second[2], step=10)
    wanted = {0: first[0], 10: second[2], 20: first[4], 21: second[0], 22: second[1], 30: first[3]}
    check_run(read_run(tmp_path / f"run.{kind}"), list(wanted.values()), list(wanted))


def test_files_that_disagree_go_on_from_the_largest(tmp_path):
    first, more, last = lasting(3), lasting(2), lasting(1)
    recorded(tmp_path / "run", first, formats=("jsonl", "csv"))
    recorded(tmp_path / "run", more, formats=("csv",))
    recorded(tmp_path / "run", last, formats=("jsonl", "csv"))
    check_run(read_run(tmp_path / "run.jsonl"), first + last, [0, 1, 2, 5])
    check_run(read_run(tmp_path / "run.csv"), first + more + last)


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("left", ["nothing", "half a header", "a header"])
def test_files_without_a_step(tmp_path, kind, left):
    recorded(tmp_path / "run", lasting(1), formats=(kind,))
    file = tmp_path / f"run.{kind}"
    header = file.read_bytes().split(b"\n")[0] + b"\n"
    file.write_bytes({"nothing": b"", "half a header": header[:-7], "a header": header}[left])
    if left == "a header":
        assert read_run(file).steps == []
    results = lasting(2)
    recorded(tmp_path / "run", results, formats=(kind,))
    check_run(read_run(file), results)


# The last step is cut anywhere: in jsonl a line, in csv one line for each component.
@pytest.mark.parametrize("kind", FILES)
def test_a_last_step_that_was_cut_off_comes_again(tmp_path, kind):
    results = lasting(3)
    recorded(tmp_path / "whole", results, formats=(kind,))
    recorded(tmp_path / "part", results[:2], formats=(kind,))
    whole = (tmp_path / f"whole.{kind}").read_bytes()
    start = (tmp_path / f"part.{kind}").stat().st_size
    file = tmp_path / f"run.{kind}"
    for end in range(start, len(whole) + 1):
        file.write_bytes(whole[:end])
        more = lasting(2)
        recorded(tmp_path / "run", more, formats=(kind,))
        kept = results if end == len(whole) else results[:2]
        check_run(read_run(file), kept + more)


@pytest.mark.slow
def test_a_program_that_is_killed_and_started_again(tmp_path):
    for _ in range(2):
        subprocess.run([sys.executable, "-c", KILLED, tmp_path / "run", "kill"], check=False, timeout=120)
    assert read_run(tmp_path / "run.jsonl").steps == list(range(12))


def test_lines_longer_than_a_block_are_found(tmp_path):
    names = tuple(f"layer.{i}.weight" for i in range(2000))
    results = [result(len(names), names) for _ in range(4)]
    for kind in FILES:
        recorded(tmp_path / "run", results[:2], formats=(kind,))
        file = tmp_path / f"run.{kind}"
        assert file.stat().st_size > 1 << 17
        recorded(tmp_path / "run", results[2:], formats=(kind,))
        check_run(read_run(file), results)


def test_a_last_line_of_something_else_is_refused_and_stays(tmp_path):
    recorded(tmp_path / "run", lasting(2), formats=("jsonl", "csv"))
    for kind, line in (("jsonl", "{}\n"), ("jsonl", "oops\n"), ("csv", "a,b\n"), ("csv", "\n")):
        file = tmp_path / f"run.{kind}"
        before = file.read_text()
        file.write_text(before + line)
        with pytest.raises(ValueError, match=f"path: the last line of .*run.{kind} is not a step"):
            recorded(tmp_path / "run", lasting(1), formats=(kind,))
        assert file.read_text() == before + line
        file.write_text(before)


def test_nothing_is_made_where_one_of_the_files_is_refused(tmp_path):
    recorded(tmp_path / "run", lasting(1), formats=("csv",))
    before = (tmp_path / "run.csv").read_text()
    with pytest.raises(ValueError, match=r"run.csv exists and holds a run of other components"):
        recorded(tmp_path / "run", [result(names=("x", "y", "z"))], formats=("jsonl", "csv"))
    assert [path.name for path in tmp_path.iterdir()] == ["run.csv"]
    assert (tmp_path / "run.csv").read_text() == before


def test_a_table_of_more_components_is_of_others(tmp_path):
    recorded(tmp_path / "run", lasting(2), formats=("csv",))
    for names in (NAMES[:2], (*NAMES, "more")):
        with pytest.raises(ValueError, match="holds a run of other components"):
            recorded(tmp_path / "run", [result(len(names), names)], formats=("csv",))


def test_a_disk_that_is_full_in_the_middle_of_a_line(tmp_path, monkeypatch):
    """A part of the text is written, and the rest isn't: the next try begins at the same place."""
    results = lasting(6)
    opened = writers.Path.open
    is_full = False

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *arguments):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            if not is_full:
                return self.file.write(data)
            self.file.write(data[:11])
            self.file.flush()
            raise OSError(28, "No space left on device")

    def open_(path, mode="r", *arguments, **options):
        file = opened(path, mode, *arguments, **options)
        return Full(file) if mode == "ab" else file

    monkeypatch.setattr(writers.Path, "open", open_)
    with ClipRecorder(tmp_path / "run", every=2, formats=("jsonl", "csv")) as recorder:
        recorder.record(results[0])
        is_full = True
        with pytest.raises(OSError, match="No space left"):
            recorder.record(results[1])
        is_full = False
        for r in results[2:]:
            recorder.record(r)
    for kind in FILES:
        check_run(read_run(tmp_path / f"run.{kind}"), results)


# ------------------------------------------------------------------------------------------------------------
# TensorBoard
# ------------------------------------------------------------------------------------------------------------


class Board:
    """What is asked of TensorBoard: event files, and its own reader of them."""

    def __init__(self, monkeypatch):
        self.read, self.files = [], {}

        class SummaryWriter:
            def __init__(own, path):
                os.makedirs(path, exist_ok=True)
                own.path = os.path.join(path, f"events.out.tfevents.{len(self.files):03}")
                open(own.path, "wb").close()
                self.files[own.path] = []

            def add_scalar(own, tag, value, step):
                self.files[own.path].append((tag, step))

            add_histogram = add_scalar

            def flush(own):
                pass

            close = flush

        class EventFileLoader:
            def __init__(own, path):
                own.path = path

            def Load(own):
                self.read.append(own.path)
                for tag, step in self.files[own.path]:
                    value = type("Value", (), {"tag": tag})
                    yield type("Event", (), {"step": step, "summary": type("Summary", (), {"value": [value]})})

        def module(name, **content):
            made = type(sys)(name)
            vars(made).update(content)
            monkeypatch.setitem(sys.modules, name, made)

        module("torch.utils.tensorboard", SummaryWriter=SummaryWriter)
        for name in ("tensorboard", "tensorboard.backend", "tensorboard.backend.event_processing"):
            module(name, __path__=[])
        module("tensorboard.backend.event_processing.event_file_loader", EventFileLoader=EventFileLoader)

    def steps(self):
        return [step for file in self.files.values() for tag, step in file if tag == "clip/rate"]


def test_event_files_go_on(tmp_path, monkeypatch):
    board = Board(monkeypatch)
    for _ in range(3):
        recorded(tmp_path / "run", lasting(3), every=2, formats=("tensorboard",))
    assert board.steps() == list(range(9))
    with ClipRecorder(tmp_path / "run", formats=("tensorboard",)) as recorder:
        recorder.record(result(), step=4)  # from an older checkpoint
    recorded(tmp_path / "run", lasting(2), formats=("tensorboard",))
    assert board.steps()[9:] == [4, 5, 6]


@pytest.mark.parametrize("kind", FILES)
def test_event_files_are_read_where_nothing_else_tells(tmp_path, monkeypatch, kind):
    board = Board(monkeypatch)
    both = ("tensorboard", kind)
    recorded(tmp_path / "run", lasting(3), formats=both)
    recorded(tmp_path / "run", lasting(2), formats=both)
    assert board.read == []
    assert board.steps() == list(range(5))
    (tmp_path / f"run.{kind}").unlink()
    recorded(tmp_path / "run", lasting(2), formats=both)
    assert board.steps() == list(range(7))
    assert read_run(tmp_path / f"run.{kind}").steps == [5, 6]


def test_what_else_is_in_the_folder_does_not_count(tmp_path, monkeypatch):
    board = Board(monkeypatch)
    recorded(tmp_path / "run", lasting(2), formats=("tensorboard",))
    (own,) = board.files
    board.files[own].append(("loss", 1000))
    recorded(tmp_path / "run", lasting(1), formats=("tensorboard",))
    assert board.steps() == [0, 1, 2]


def test_with_tensorboard_itself(tmp_path):
    pytest.importorskip("tensorboard")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own
        for _ in range(2):
            recorded(tmp_path / "run", lasting(3), every=2, formats=("tensorboard",))
        writer = writers.TensorBoard(tmp_path / "run", NAMES)
        writer.look()
        assert writer.next_step == 6
        newest = max((tmp_path / "run").iterdir())
        os.truncate(newest, newest.stat().st_size - 3)  # killed
        recorded(tmp_path / "run", lasting(1), formats=("tensorboard",))


# ------------------------------------------------------------------------------------------------------------
# Copies, conversions
# ------------------------------------------------------------------------------------------------------------

COPIES = [copy.copy, copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))]


@pytest.mark.parametrize("copied", COPIES)
def test_a_recorder_at_work_is_not_copied(tmp_path, copied):
    results = lasting(3)
    recorder = ClipRecorder(tmp_path / "run")
    other = copied(recorder)
    recorder.record(results[0])
    with pytest.raises(TypeError, match=r"this ClipRecorder \(.*\) has files open, which a copy would write to"):
        copied(recorder)
    recorder.record(results[1])
    recorder.close()
    closed = copied(recorder)
    with pytest.raises(RuntimeError, match="is closed"):
        closed.record(results[2])
    other.record(results[2])
    other.close()
    check_run(read_run(tmp_path / "run.jsonl"), results)


@pytest.mark.parametrize("kind", FILES)
def test_a_model_that_is_converted_in_the_middle(tmp_path, kind):
    """Norms become float64 and are kept as they are; nothing is lost, and steps stay in order."""
    results = [result(dtype=torch.float32 if i < 3 else torch.float64) for i in range(7)]
    results.append(result())
    recorded(tmp_path / "run", results, every=2, formats=(kind,))
    run = read_run(tmp_path / f"run.{kind}")
    check_run(run, results)
    for i in range(3, 7):
        assert torch.equal(run.norms[i], results[i].norms.cpu())


@pytest.mark.slow
def test_a_converted_models_steps_are_written_at_the_end_of_the_program(tmp_path):
    code = KILLED.replace(
        "for _ in range(8):",
        "for i in range(8):\n    if i == 4: p.data, p.grad = p.data.double(), None; p.grad = p.data + 1",
    )
    assert code != KILLED
    subprocess.run([sys.executable, "-c", code, tmp_path / "run", "exit"], check=True, timeout=120)
    assert read_run(tmp_path / "run.jsonl").steps == list(range(8))


# ------------------------------------------------------------------------------------------------------------
# Steps that aren't ints, and inference mode
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("number", [int, *INTEGERS, torch.tensor, lambda i: torch.tensor([i])])
def test_steps_of_every_integer_type(tmp_path, kind, number):
    results = [result() for _ in range(3)]
    with ClipRecorder(tmp_path / "run", every=2, formats=(kind,)) as recorder:
        for i, r in enumerate(results[:2]):
            recorder.record(r, step=number(3 * i))
        recorder.record(results[2])
    check_run(read_run(tmp_path / f"run.{kind}"), results, [0, 3, 4])


@pytest.mark.parametrize(
    "step",
    [0.5, 1.0, *of_numpy("float32", 1), *map(torch.tensor, (1.0, [1, 2], True)), "1", True, [1]],
)
def test_a_step_that_is_no_whole_number_is_refused_and_nothing_else_lost(tmp_path, step):
    results = [result() for _ in range(2)]
    with ClipRecorder(tmp_path / "run") as recorder:
        with pytest.raises(TypeError, match="^step: expected a whole number, not "):
            recorder.record(results[0], step=step)
        assert list(tmp_path.iterdir()) == []
        recorder.record(results[0])
        with pytest.raises(TypeError, match="^step: expected a whole number, not "):
            recorder.record(results[1], step=step)
        recorder.record(results[1])
    check_run(read_run(tmp_path / "run.jsonl"), results)


@pytest.mark.parametrize("inside", list(itertools.product([True, False], repeat=3)))
@pytest.mark.parametrize("every", [1, 2, 4])
def test_steps_in_and_out_of_inference_mode(tmp_path, inside, every):
    results = []
    recorder = ClipRecorder(tmp_path / "run", every=every)
    for dtype in (torch.float32, torch.float64):  # new buffers for the second
        for mode in inside:
            with torch.inference_mode(mode):
                results.append(result(dtype=dtype))
                recorder.record(results[-1])
    with torch.inference_mode(not inside[-1]):
        recorder.close()
    check_run(read_run(tmp_path / "run.jsonl"), results)
