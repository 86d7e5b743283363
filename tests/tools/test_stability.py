"""The paper's experiment as a whole, on a model of a few thousand weights: files, going on, errors, processes."""

import errno
import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from experiment_setup import BENCHMARKS, items, made, on_one_thread, tiny_model
from finetune_stability import main
from stability import figures, names, options
from stability.arms import parse
from stability.problem import Problem
from stability.runs import Store, write_whole
from stability.schedule import missing
from stability.train import Trainer

DRAWN = {name: getattr(figures, name) for name in ("scores", "norms", "clip_rate")}


_on_one_thread = pytest.fixture(scope="module", autouse=True)(on_one_thread)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    write_whole(path, "old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(Problem, match=r"run\.json: No space left"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_only_what_is_missing_or_damaged_is_run(tmp_path):
    store, arms = Store(tmp_path), [parse("none"), parse("component:0.01")]
    store.put(arms[0], made(0.6, 1, arm="none"))
    store.put(arms[1], made(0.6, 1, arm="component:0.01"))
    store.path(arms[1], 1).write_text('{"arm": "compo')
    assert [(arm.label, seed) for arm, seed in missing(store, arms, [1, 2])] == [
        ("component:0.01", 1),
        ("none", 2),
        ("component:0.01", 2),
    ]


def test_a_folder_is_for_one_experiment_and_one_program_at_a_time(tmp_path):
    store = Store(tmp_path / "made")
    with store.locked():
        store.claim({"lr": 1e-3, "data": None})
        store.claim({"lr": 1e-3, "data": None})
        with pytest.raises(Problem, match=r"another experiment \(lr 0\.001, now 0\.002\)"):
            store.claim({"lr": 2e-3, "data": None})
        with pytest.raises(Problem, match="at work there"), Store(tmp_path / "made").locked():
            pass
        (store.folder / "left.part").write_text("half")
    with store.locked():
        assert not (store.folder / "left.part").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Problem, match="--out"), Store(tmp_path / "file").locked():
        pass


@pytest.fixture
def experiment(model_folder, tmp_path, monkeypatch):
    """Runs the command here; returns the (arm, seed) that it trained."""
    trained = []
    inner = Trainer.run

    def run(self, arm, seed, *rest):
        trained.append((arm.label, seed))
        return inner(self, arm, seed, *rest)

    monkeypatch.setattr(Trainer, "run", run)
    monkeypatch.setattr(names, "collect", items)  # which takes a while
    monkeypatch.chdir(tmp_path)

    def command(*more, drawn=False):
        if not drawn:  # which takes a while, too
            for name in DRAWN:
                monkeypatch.setattr(figures, name, lambda *_: b"a picture")
        given = ["--model", model_folder, "--limit", 32, "--epochs", 1, "--device", "cpu", "--out", "out", *more]
        given += ["--threads", 1, "--evaluations", 1, "--calibration-seeds", 1]
        monkeypatch.setattr(sys, "argv", ["finetune_stability.py", *map(str, given)])
        del trained[:]
        main()
        return list(trained)

    command.trained = trained
    return command


def test_a_finished_run_is_never_run_again(experiment, tmp_path, capsys, monkeypatch):
    assert experiment("--arms", "none", "--seeds", 2) == [("none", 100), ("none", 101)]
    made_first = (tmp_path / "out/runs/none-seed100.json").read_bytes()
    arms = ("--arms", "none", "component:0.01", "matched:0.01", "EMA(warmup_steps=1)", "stable")
    second = experiment(*arms, "--seeds", 2)
    judged = [run for run in second if run[1] < 1000]
    assert Counter(label for label, _ in judged) == dict.fromkeys([*arms[2:]], 2)
    assert {seed for _, seed in second} == {100, 101, 1000}
    for name, draw in DRAWN.items():
        monkeypatch.setattr(figures, name, draw)
    assert experiment(*arms, "--seeds", 2, drawn=True) == []
    assert (tmp_path / "out/runs/none-seed100.json").read_bytes() == made_first

    report = (tmp_path / "out/report.md").read_text()
    for expected in (
        "Judged seeds: 100 to 101",
        "on seeds 1000, which judge nothing",
        "hash of the data",
        "## Calibration",
    ):
        assert expected in report
    document = json.loads((tmp_path / "out/report.json").read_text())
    assert document["against_control"]["component:0.01"]["control"] == "matched:0.01"
    assert set(document["arms"]) == set(arms[1:])
    assert len(document["runs"]) == 10
    tightness = document["calibration"]["matched:0.01"]
    assert tightness["cap"] in [tried["cap"] for tried in tightness["tried"]]
    assert {run["cap"] for run in document["runs"] if run["arm"] == "matched:0.01"} == {tightness["cap"]}
    image = pytest.importorskip("PIL.Image")
    for name in ("scores.png", "norms.png", "clip_rate.png"):
        with image.open(tmp_path / "out" / name) as opened:
            opened.load()
            assert min(opened.size) > 300
    said = capsys.readouterr()
    assert said.err == ""
    assert "judging" in said.out


def test_a_full_disk_in_the_middle_loses_nothing(experiment, tmp_path, capsys, monkeypatch):
    real, writes = os.fsync, []

    def fsync(descriptor):
        writes.append(descriptor)
        if len(writes) > 3:  # the experiment's file and two runs; then the third run, and the report of two
            full_disk()
        real(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        with pytest.raises(SystemExit) as stopped:
            experiment("--arms", "none", "--seeds", 4)
    assert stopped.value.code == 2
    assert len(experiment.trained) == 3
    error = capsys.readouterr().err
    assert "none-seed102.json: No space left" in error
    assert "the same command again" in error
    assert sorted(path.name for path in (tmp_path / "out/runs").iterdir()) == [
        "none-seed100.json",
        "none-seed101.json",
    ]
    assert not list((tmp_path / "out").rglob("*.part"))
    assert experiment("--arms", "none", "--seeds", 4) == [("none", 102), ("none", 103)]


# What a user may get wrong: each is one line that names the option, before anything is run.
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--task", "sst5"], "--task 'sst5': no such task; there are names, docstrings, rte"),
        (["--model", "nobody/no-such-model"], "--model 'nobody/no-such-model'"),
        (["--model", "headless"], "no sequence-classification head for a 'vit' model"),
        (["--device", "abacus"], "--device abacus"),
        (["--arms", "componnent:1"], "--arms 'componnent:1'"),
        (["--arms", "none", "none"], "each once"),
        (["--quick", "--full"], "one of them"),
        (["--data", "."], "--data is for rte"),
        (["--first-calibration-seed", "100"], "these seeds are judged"),
    ],
)
def test_what_cannot_work_is_one_line_and_exit_code_2(options, expected, experiment, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: True)
    (tmp_path / "headless").mkdir()
    (tmp_path / "headless/config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(SystemExit) as stopped:
        experiment(*options)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("finetune_stability.py: error: ")
    assert error.count("\n") == 1
    assert expected in error
    assert experiment.trained == []


def test_presets():
    def settle(*given):
        _, arms, seeds, _ = options.settle(options.parser("").parse_args(list(given)))
        return [arm.label for arm in arms], seeds

    assert settle("--quick") == (["none", "component:0.01"], [100, 101, 102, 103])
    full, seeds = settle("--full")
    assert len(seeds) == 20
    assert {"none", "global:1", "component:0.0001", "component:5", "stable", "EMA(warmup_steps=20)"} <= set(full)
    assert {f"matched:{arm.partition(':')[2]}" for arm in full if arm.startswith("component:")} <= set(full)


def test_several_processes_make_the_same_runs(experiment, model_folder, tmp_path):
    experiment("--arms", "none", "--seeds", 2)
    given = ["--model", model_folder, "--limit", 32, "--epochs", 1, "--device", "cpu", "--arms", "none", "--seeds", 2]
    given += ["--processes", 2, "--threads", 1, "--evaluations", 1, "--out", "two", "--calibration-seeds", 1]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "finetune_stability.py"), *map(str, given)],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "80", "PYTHONWARNINGS": "default"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "2/2 runs" in done.stdout
    for seed in (100, 101):
        one, two = (json.loads((tmp_path / f"{out}/runs/none-seed{seed}.json").read_text()) for out in ("out", "two"))
        assert one["loss"] == two["loss"]
        assert one["scores"] == two["scores"]
