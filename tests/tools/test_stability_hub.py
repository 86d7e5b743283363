"""GLUE's tasks for the paper's experiment: small data in the hub's form, a hub that isn't there."""

import json
import sys
from types import SimpleNamespace

import pytest

from experiment_setup import BENCHMARKS  # noqa: F401
from stability import hub, metrics, options, report, tasks
from stability.problem import Problem


def columns_of(task, count, label=lambda i: i % 2):
    """GLUE's columns, `idx` among them."""
    texts = {column: [f"{column} {i}" for i in range(count)] for column in hub.FORMS[task].columns}
    return {**texts, "label": [label(i) for i in range(count)], "idx": list(range(count))}


class Split(dict):
    """As much of `datasets.Dataset` as is used."""

    column_names = property(list)

    def __len__(self):
        return len(self["label"])


def settings_for(task, *more):
    return options.settle(options.parser("").parse_args(["--task", task, *more]))[0]


@pytest.fixture
def hub_with(monkeypatch):
    """Stands in for the datasets package; `answer` is what the hub gives, or raises."""
    asked = []

    def install(answer):
        def load_dataset(*what, **how):
            asked.append((what, how))
            if isinstance(answer, Exception):
                raise answer
            return answer

        fake = SimpleNamespace(load_dataset=load_dataset, disable_progress_bars=lambda: None)
        monkeypatch.setitem(sys.modules, "datasets", fake)
        return asked

    return install


@pytest.mark.parametrize("task", hub.FORMS)
def test_a_task_from_the_hub(task, hub_with):
    splits = {"train": Split(columns_of(task, 8)), "validation": Split(columns_of(task, 6, lambda i: int(i > 1)))}
    asked = hub_with({**splits, "test": Split(columns_of(task, 4, lambda i: -1))})
    loaded = tasks.load(settings_for(task, "--limit", "5"))
    assert asked == [(("nyu-mll/glue", task), {})]
    assert (len(loaded.train), len(loaded.dev), loaded.classes) == (5, 6, 2)
    assert loaded.dev[3] == (tuple(f"{column} 3" for column in hub.FORMS[task].columns), 1)
    assert "nyu-mll/glue" in loaded.source


# The paper's code: RTE accuracy .53, CoLA Matthews correlation 0, MRPC F1 .75, QNLI accuracy .50.
@pytest.mark.parametrize(
    ("task", "metric", "cutoff"),
    [("rte", "accuracy", 0.53), ("cola", "MCC", 0), ("mrpc", "F1", 0.75), ("qnli", "accuracy", 0.5)],
)
def test_metrics_and_cut_offs(task, metric, cutoff, hub_with):
    data = Split(columns_of(task, 8))
    hub_with({"train": data, "validation": data})
    loaded = tasks.load(settings_for(task))
    assert (loaded.metric, loaded.cutoff) == (metric, cutoff)
    settings = settings_for(task)
    assert (settings.lr, settings.epochs, settings.batch_size, settings.max_length) == (2e-5, 3, 16, 128)
    assert loaded.score([label for _, label in loaded.dev]) == 1


def test_metrics_by_hand():
    labels, guesses = [1, 1, 1, 0, 0, 0, 0, 1], [1, 1, 0, 0, 0, 1, 0, 1]  # tp 3, fp 1, fn 1, tn 3
    assert metrics.accuracy(labels, guesses) == 0.75
    assert metrics.f1(labels, guesses) == pytest.approx(0.75)
    assert metrics.matthews(labels, guesses) == pytest.approx((9 - 1) / 16)
    assert metrics.matthews(labels, [1] * 8) == 0
    assert metrics.f1(labels, [0] * 8) == 0
    assert metrics.f1([1, 1, 0], [1, 1, 1]) == pytest.approx(0.8)  # the commonest label: above MRPC's cut-off


def test_metrics_are_scikit_learns():
    sklearn = pytest.importorskip("sklearn.metrics")
    labels, guesses = [1, 0, 1, 1, 0, 1, 0, 0, 1], [1, 1, 0, 1, 0, 1, 0, 1, 1]
    assert metrics.f1(labels, guesses) == pytest.approx(sklearn.f1_score(labels, guesses))
    assert metrics.matthews(labels, guesses) == pytest.approx(sklearn.matthews_corrcoef(labels, guesses))


def test_a_cut_off_below_the_commonest_label_is_pointed_out():
    assert "column 'one answer'" in report._lenient({"majority": 0.81, "cutoff": 0.75})
    assert report._lenient({"majority": 0.5, "cutoff": 0.53}) == ""


def test_no_datasets_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        Problem, match=r'--task rte needs the datasets package.*pip install "cwclip_kernels\[stability\]"'
    ):
        tasks.load(settings_for("rte"))


def test_a_hub_that_is_not_reachable(hub_with):
    hub_with(ConnectionError("Couldn't reach 'nyu-mll/glue' on the Hub (OfflineModeIsEnabled)\nmore\nof it"))
    with pytest.raises(
        Problem, match=r"--task mrpc: no data from the hub.*Couldn't reach.*--data takes a folder"
    ) as told:
        tasks.load(settings_for("mrpc"))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        ({"train": Split(columns_of("rte", 4))}, "no 'validation' split"),
        ({"train": Split(label=[0]), "validation": Split(label=[0])}, "no column 'sentence1', 'sentence2'"),
        ({"train": Split(columns_of("rte", 4, lambda i: -1))}, r"to be 0 and 1, not \[-1\]"),
        ({"train": Split(columns_of("rte", 0))}, "to be 0 and 1"),
    ],
)
def test_data_of_another_form(splits, expected, hub_with):
    hub_with(splits)
    with pytest.raises(Problem, match=expected):
        tasks.load(settings_for("rte"))


@pytest.fixture
def real():
    return pytest.importorskip("datasets")


def rows_of(task, count):
    columns = columns_of(task, count)
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def written(folder, task):
    """train.jsonl of 6 rows, validation.jsonl of 4."""
    files = {}
    for side, count in (("train", 6), ("validation", 4)):
        path = folder / f"{side}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(task, count)))
        files[side] = str(path)
    return files


@pytest.mark.parametrize("task", hub.FORMS)
def test_a_folder_of_json_lines_with_the_real_package(task, real, tmp_path, monkeypatch):
    written(tmp_path, task)
    monkeypatch.setattr(real.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    loaded = tasks.load(settings_for(task, "--data", str(tmp_path)))
    assert (len(loaded.train), len(loaded.dev)) == (6, 4)
    assert loaded.train[5] == (tuple(f"{column} 5" for column in hub.FORMS[task].columns), 1)


def test_a_folder_that_save_to_disk_wrote(real, tmp_path):
    files = written(tmp_path, "mrpc")
    real.disable_progress_bars()
    # Not Dataset.from_dict: datasets 5.2 can't take the hash of such a one beside pyarrow 26.
    saved = real.load_dataset("json", data_files=files, cache_dir=str(tmp_path / "cache"))
    saved.save_to_disk(str(tmp_path / "saved"))
    loaded = tasks.load(settings_for("mrpc", "--data", str(tmp_path / "saved")))
    assert (len(loaded.train), len(loaded.dev)) == (6, 4)
    assert loaded.dev[1] == (("sentence1 1", "sentence2 1"), 1)


def test_a_folder_that_is_not_there_or_empty(real, tmp_path):
    with pytest.raises(Problem, match="no such folder"):
        tasks.load(settings_for("rte", "--data", str(tmp_path / "nowhere")))
    with pytest.raises(Problem, match="expected train and validation files"):
        tasks.load(settings_for("rte", "--data", str(tmp_path)))
