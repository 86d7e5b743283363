"""What a recorder hands to trackers that the caller has opened; stand-ins with the methods of the real ones."""

import logging
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from cwclip_kernels import ClipResult
from cwclip_kernels.result import ClipStatistics
from cwclip_kernels.telemetry import ClipRecorder, read_run
from recorded_runs import NAMES, check_run, result


class Events:
    """A SummaryWriter."""

    def __init__(self):
        self.scalars, self.histograms, self.closed = {}, [], False

    def add_scalar(self, tag, value, step):
        self.scalars.setdefault(step, {})[tag] = value

    def add_histogram(self, tag, values, step):
        self.histograms.append((tag, step, values.tolist()))

    def flush(self):
        pass

    def close(self):
        self.closed = True

    def found(self):
        assert not self.closed
        return self.scalars


class Wandb:
    """A W&B run, which gives each call a row unless it is told the step."""

    def __init__(self):
        self.axes, self.rows = {}, []

    def define_metric(self, name, step_metric=None, hidden=None):
        self.axes[name] = step_metric

    def log(self, data, step=None, commit=None):
        assert step is None, "W&B ignores a step that is less than its count of rows"
        self.rows.append(dict(data))

    def finish(self):
        raise AssertionError("closed")

    def found(self):
        assert self.axes == {"clip/step": None, "clip/*": "clip/step"}
        return {row.pop("clip/step"): row for row in self.rows}


class MlflowRun:
    def __init__(self, monkeypatch):
        self.info = SimpleNamespace(run_id="r1")
        self.metrics, self.requests = {}, 0
        entities = SimpleNamespace(Metric=lambda *fields: SimpleNamespace(fields=fields))
        module = SimpleNamespace(MlflowClient=lambda: self, entities=entities)
        monkeypatch.setitem(sys.modules, "mlflow", module)

    def log_batch(self, run_id, metrics):
        assert run_id == "r1"
        assert len(metrics) <= 1000
        self.requests += 1
        for metric in metrics:
            tag, value, timestamp, step = metric.fields
            assert timestamp > 1.6e12  # milliseconds
            self.metrics.setdefault(step, {})[tag] = value

    def found(self):
        assert self.requests == 3  # one for each buffer
        return self.metrics


class Logger:
    """One of Lightning's."""

    def __init__(self):
        self.metrics = {}

    def log_metrics(self, metrics, step=None):
        self.metrics[step] = dict(metrics)

    def found(self):
        return self.metrics


class Function:
    def __init__(self):
        self.numbers = {}

    def __call__(self, numbers, step):
        self.numbers[step] = numbers

    def found(self):
        return self.numbers


def numbers_of(r):
    finite = r.norms[r.norms.isfinite() & (r.norms != 0)].double()  # 0: no gradient
    statistics = ClipStatistics()
    statistics.add(r)
    found = {"clip/rate": statistics.clip_rate.item(), "clip/nonfinite": (~r.norms.isfinite()).sum().item()}
    if len(finite):
        found |= {
            "clip/median_norm": finite.quantile(0.5).item(),
            "clip/max_norm": finite.max().item(),
        }
    return found


def results():
    """With inf and NaN, components without a gradient, nothing finite."""
    no_gradient = ClipResult(NAMES, torch.tensor([0.0, 2.0, 0.5]), torch.tensor([1.0, 0.5, 1.0]), torch.tensor(1.0))
    nothing = ClipResult(NAMES, torch.full((3,), math.nan), torch.full((3,), math.nan), torch.tensor(1.0))
    return [result(), result(bad=True), no_gradient, nothing, result()]


@pytest.mark.parametrize("kind", ["events", "wandb", "mlflow", "logger", "function"])
@pytest.mark.parametrize("with_file", [True, False])
def test_each_tracker_gets_each_step(tmp_path, monkeypatch, kind, with_file):
    makers = {"events": Events, "wandb": Wandb, "logger": Logger, "function": Function}
    tracker = MlflowRun(monkeypatch) if kind == "mlflow" else makers[kind]()
    given = results()
    with ClipRecorder(tmp_path / "run" if with_file else None, every=2, writers=tracker) as recorder:
        for r in given:
            recorder.record(r)
    found = tracker.found()
    assert sorted(found) == list(range(5))
    for step, r in enumerate(given):
        assert found[step] == pytest.approx(numbers_of(r))
    if kind == "events":
        assert [step for _, step, _ in tracker.histograms] == [1, 4]  # nothing finite in step 3
    assert [path.name for path in tmp_path.iterdir()] == (["run.jsonl"] if with_file else [])


def test_several_at_once_and_numbers_of_steps(tmp_path):
    first, second, r = Logger(), Wandb(), result()
    with ClipRecorder(tmp_path / "run", writers=[first, second]) as recorder:
        recorder.record(r, step=20)
    assert first.found() == second.found() == {20: pytest.approx(numbers_of(r))}
    with ClipRecorder(tmp_path / "run", writers=(first,)) as recorder:  # goes on as its file does
        recorder.record(r)
    assert sorted(first.found()) == [20, 21]


def test_a_tracker_that_is_out_of_reach_for_a_while(tmp_path):
    """Nothing is lost, and the file gets nothing twice."""
    rows, is_away = Function(), [True]

    def log(numbers, step):
        if is_away[0]:
            raise ConnectionError("made up")
        rows(numbers, step)

    given = [result() for _ in range(4)]
    recorder = ClipRecorder(tmp_path / "run", every=2, writers=log)
    recorder.record(given[0])
    for r in given[1:3]:
        with pytest.raises(ConnectionError, match="made up"):
            recorder.record(r)
    is_away[0] = False
    recorder.record(given[3])
    recorder.close()
    assert sorted(rows.found()) == list(range(4))
    check_run(read_run(tmp_path / "run.jsonl"), given)
    assert len((tmp_path / "run.jsonl").read_text().splitlines()) == 5


def test_a_tracker_that_fails_in_between_gets_each_step_once(tmp_path):
    seen, fails = [], [3]

    def log(numbers, step):
        if step in fails:
            fails.remove(step)
            raise ConnectionError("made up")
        seen.append(step)

    recorder = ClipRecorder(tmp_path / "run", every=5, writers=log)
    for _ in range(12):
        try:
            recorder.record(result())
        except ConnectionError:
            assert seen == [0, 1, 2]
    recorder.close()
    assert seen == list(range(12))
    assert fails == []


class Client:
    log_batch = log_metric = print


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (3, "not int"),
        ("wandb", "not str"),
        ({"a": 1}, "not dict"),
        ([None], "not NoneType"),
        (Events, "not the class Events: open one first"),
        (Client(), "not Client, which has no run of its own: pass the MLflow run"),
        (logging.getLogger("x"), "not Logger"),
    ],
)
def test_what_is_no_tracker_is_refused(tmp_path, wrong, name):
    with pytest.raises(TypeError, match=f"writers: expected an open SummaryWriter, a W&B run, .*; {name}"):
        ClipRecorder(tmp_path / "run", writers=wrong)


def test_a_recorder_for_nothing():
    with pytest.raises(TypeError, match="path: expected the path of files, or None beside writers="):
        ClipRecorder()
    with pytest.raises(TypeError, match="live: expected a bool or a LiveLine, not str"):
        ClipRecorder("run", live="yes")


def test_statistics_are_of_components_with_a_gradient():
    """Of adapters most components are frozen."""
    found = Function()
    norms = torch.tensor([0.0] * 9 + [1.0, 3.0])
    with ClipRecorder(None, writers=found) as recorder:
        recorder.record(ClipResult(tuple(map(str, range(11))), norms, torch.ones(11), torch.tensor(9.0)))
    (numbers,) = found.numbers.values()
    assert numbers["clip/median_norm"] == 2.0
    assert numbers["clip/max_norm"] == 3.0
