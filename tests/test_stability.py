"""The paper's experiment: its parts, and whole on a model of a few thousand weights."""

import errno
import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

for needed in ("numpy", "rich", "matplotlib", "tokenizers", "transformers"):
    pytest.importorskip(needed)

import tokenizers  # noqa: E402
import transformers  # noqa: E402

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
try:
    import docstrings
    import finetune_stability
    from stability import calibrate, figures, findings, models, names, optimizer, options, statistics, tasks
    from stability.arms import Arm, clip_of, parse, threshold
    from stability.problem import Problem
    from stability.runs import Store, write_whole
    from stability.schedule import missing
    from stability.train import MOST_STEPS, Trainer, rate, schedule
finally:
    sys.path.remove(str(EXAMPLES))

CPU = torch.device("cpu")
DRAWN = {name: getattr(figures, name) for name in ("scores", "norms", "clip_rate")}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """For so small a model a second one only waits, which takes a CPU as well."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def items():
    return names.collect()


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory, items):
    """A folder with an untrained BERT of two layers and a tokenizer of the data's commonest words."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    words = Counter(
        word for item in items for word in f"{item.name} {item.summary}".lower().split() if word.isalpha()
    )
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(word for word, _ in words.most_common(300))]
    tokenizer = tokenizers.BertWordPieceTokenizer({word: i for i, word in enumerate(vocabulary)})
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, unk_token="[UNK]", pad_token="[PAD]", model_max_length=32
    ).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.2,  # or losses would be the logarithm of 2, whatever is done
    )
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def settings_for(model, *more):
    given = ["--model", str(model), "--limit", "64", "--epochs", "1", "--evaluations", "2", *more]
    return options.settle(options.parser("").parse_args(given))


@pytest.fixture(scope="module")
def trainer(tiny_model):
    settings = settings_for(tiny_model, "--lr", "0.01")[0]
    return Trainer(settings, tasks.load(settings), CPU)


# ------------------------------------------------------------------------------------------------------------
# Data and scores
# ------------------------------------------------------------------------------------------------------------


def test_names_are_the_same_every_time_and_as_many_as_the_issue_says(items):
    assert names.collect() == items
    train, dev = names.build(items)
    assert names.build(items) == (train, dev)
    assert (len(train), len(dev)) == (480, 256)
    assert Counter(label for _, label in dev).most_common(1)[0][1] / 256 == pytest.approx(0.551, abs=5e-4)


def test_names_share_nothing_between_the_sides_and_wrong_pairs_are_of_one_module(items):
    train, dev = names.build(items)
    for part in (0, 1):
        assert not {texts[part] for texts, _ in train} & {texts[part] for texts, _ in dev}
    by_name = {item.name: item for item in items}
    by_summary = {item.summary: item for item in items}
    for (name, summary), belongs in train + dev:
        assert (by_name[name] is by_summary[summary]) == bool(belongs)
        assert by_name[name].module == by_summary[summary].module


def test_names_says_so_when_the_library_has_too_few(tmp_path):
    (tmp_path / "poplib.py").write_text(
        'class POP3:\n    def uidl(self):\n        """Return message digest list. And more."""\n'
        '    def _own(self):\n        """Not for others to see."""\n    def f(self):\n        """Short."""\n'
    )
    [item] = names.collect(tmp_path)
    assert (item.module, item.name, item.summary) == ("poplib", "POP3 uidl", "Return message digest list.")
    with pytest.raises(Problem, match="names that will do"):
        names.build([item])


def test_tasks_carry_their_rule_and_a_hash(tiny_model, items, monkeypatch):
    monkeypatch.setattr(names, "collect", lambda: items)
    examples = docstrings.collect()
    monkeypatch.setattr(docstrings, "collect", lambda: examples)
    for name, classes in (("names", 2), ("docstrings", 9)):
        task = tasks.load(settings_for(tiny_model, "--task", name)[0])
        assert (len(task.train), task.classes, task.metric) == (64, classes, "accuracy")
        assert task.cutoff >= task.majority
        assert f"{sys.version_info.major}.{sys.version_info.minor}" in task.source
        longer = tasks.load(settings_for(tiny_model, "--task", name, "--limit", "65")[0])
        assert task.fingerprint != longer.fingerprint
    assert tasks.load(settings_for(tiny_model)[0]).cutoff == pytest.approx(141 / 256)


# ------------------------------------------------------------------------------------------------------------
# Optimizer, schedule
# ------------------------------------------------------------------------------------------------------------


def test_with_bias_correction_it_is_torchs_adamw():
    ours, theirs = (torch.nn.Linear(5, 3).double() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    own = optimizer.AdamW(ours.parameters(), 0.01, weight_decay=0.1, bias_correction=True)
    other = torch.optim.AdamW(theirs.parameters(), 0.01, weight_decay=0.1)
    for _ in range(5):
        for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.grad = torch.randn_like(mine)
            its.grad = mine.grad.clone()
        own.step()
        other.step()
    for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-12)


def test_without_it_the_first_step_is_sqrt_10_times_as_long():
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    parameter.grad = torch.full_like(parameter, 7.0)
    optimizer.AdamW([parameter], 0.01, eps=0.0).step()
    assert parameter.item() == pytest.approx(-0.01 * math.sqrt(10))


def test_biases_and_layernorm_are_not_decayed(tiny_model):
    model = models.load(str(tiny_model), 2, seed=0)
    decayed, others = optimizer.groups(model, 0.01)
    kinds = {id(p): name for name, p in model.named_parameters()}
    assert len(decayed["params"]) + len(others["params"]) == len(kinds)
    assert not any("bias" in kinds[id(p)] or "LayerNorm" in kinds[id(p)] for p in decayed["params"])
    assert all("bias" in kinds[id(p)] or "LayerNorm" in kinds[id(p)] for p in others["params"])
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.01, 0.0)


def test_learning_rate_falls_in_a_line_and_the_last_look_is_at_the_end(tiny_model):
    assert [rate(step, 4, 0.0) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert [rate(step, 4, 0.5) for step in range(4)] == [0.5, 1.0, 1.0, 0.5]
    steps, looks = schedule(settings_for(tiny_model, "--epochs", "3", "--evaluations", "6")[0], 480)
    assert (steps, sorted(looks)) == (90, [15, 30, 45, 60, 75, 90])
    assert schedule(settings_for(tiny_model)[0], 1) == (1, {1})


# ------------------------------------------------------------------------------------------------------------
# Arms
# ------------------------------------------------------------------------------------------------------------


def test_arms_are_read_from_words():
    assert parse("none") == Arm("none", "none")
    assert parse("component:1e-4") == Arm("component:1e-4", "component", cap=1e-4)
    assert parse("matched:0.01@2e-5") == Arm("matched:0.01@2e-5", "matched", cap=0.01, lr=2e-5)
    assert parse("EMA(warmup_steps=20)").kind == "threshold"
    assert type(threshold("ZScore()")).__name__ == "ZScore"
    assert type(threshold("cwclip_kernels.thresholds.Fixed(0.5)")).__name__ == "Fixed"
    slugs = [parse(word).slug for word in options.FULL]
    assert len(set(slugs)) == len(slugs)


@pytest.mark.parametrize(
    "word",
    [
        "nothing",
        "component",
        "component:-1",
        "global:x",
        "component:nan",
        "none@0",
        "EMA(",
        "EMA(a=1)",
        "Schedule(len)",
    ]
    + ["no.such.module.Caps()", "math.sqrt(4)"],
)
def test_an_arm_that_there_is_not_is_named(word):
    with pytest.raises(Problem, match="--arms"):
        parse(word)


def test_the_arms_do_to_gradients_what_they_say(tiny_model):
    model = models.load(str(tiny_model), 2, seed=0)
    drawn = [torch.randn_like(p) for p in model.parameters()]
    norms = torch.stack([g.norm() for g in drawn])

    def after(arm):
        for p, g in zip(model.parameters(), drawn, strict=True):
            p.grad = g.clone()
        component_names, clip = clip_of(arm, model)
        before, coefs = clip()
        assert len(component_names) == len(before) == len(coefs)
        torch.testing.assert_close(before, norms)
        kept = torch.stack([p.grad.norm() for p in model.parameters()])
        torch.testing.assert_close(kept, norms * coefs)
        return kept

    torch.testing.assert_close(after(parse("none")), norms)
    torch.testing.assert_close(after(parse("component:0.5")), norms.clamp(max=0.5))
    torch.testing.assert_close(after(parse("global:1")), norms / norms.norm())
    assert after(parse("FromGlobal(1.0)")).norm() <= 1 + 1e-5
    with pytest.raises(ValueError, match="calibrated first"):
        clip_of(parse("matched:0.5"), model)


# ------------------------------------------------------------------------------------------------------------
# One run
# ------------------------------------------------------------------------------------------------------------


def test_head_order_and_dropout_depend_on_the_seed_alone(trainer):
    runs = {word: trainer.run(parse(word), 7) for word in ("none", "global:1e9", "component:1e9", "component:1e-3")}
    losses = {word: run["loss"] + run["total_norm"] for word, run in runs.items()}
    assert losses["none"] == losses["global:1e9"] == losses["component:1e9"]
    assert losses["component:1e-3"][0] == losses["none"][0]
    assert losses["component:1e-3"] != losses["none"]
    again, other = (trainer.run(parse("none"), seed) for seed in (7, 8))
    assert again["loss"] == runs["none"]["loss"] != other["loss"]


def test_a_run_keeps_what_the_report_needs(trainer):
    ticks = []
    run = trainer.run(parse("component:1e-3"), 1, lambda: ticks.append(1))
    assert json.loads(json.dumps(run)) == run
    assert len(ticks) == len(run["loss"]) == len(run["kept"]) == len(run["clip_rate"]) == 4
    assert [look["step"] for look in run["scores"]] == [2, 4]
    assert run["score"] == run["scores"][-1]["score"]
    assert run["failed"] == (run["score"] <= 141 / 256)
    assert len(run["norms"]) == len(run["norm_steps"]) <= MOST_STEPS
    assert len(run["norms"][0]) == len(run["components"])
    capped = torch.tensor(run["norms"]).clamp(max=1e-3).norm(dim=1) / torch.tensor(run["norms"]).norm(dim=1)
    torch.testing.assert_close(torch.tensor(run["kept"]), capped, rtol=0.01, atol=0)


def test_a_norm_that_is_not_finite_is_null_in_the_file(trainer):
    run = trainer.run(parse("none@1e30"), 1)
    assert None in run["total_norm"]
    json.dumps(run, allow_nan=False)
    assert run["failed"]


def test_the_head_is_drawn_anew_and_the_pooler_kept(tiny_model):
    one, same, other = (dict(models.load(str(tiny_model), 2, seed).named_parameters()) for seed in (1, 1, 2))
    assert torch.equal(one["classifier.weight"], same["classifier.weight"])
    assert not torch.equal(one["classifier.weight"], other["classifier.weight"])
    assert not one["classifier.bias"].any()
    assert torch.equal(one["bert.pooler.dense.weight"], other["bert.pooler.dense.weight"])
    many = models.load(str(tiny_model), 500, 1).classifier.weight
    assert many.std().item() == pytest.approx(0.02, rel=0.1)


# ------------------------------------------------------------------------------------------------------------
# Calibration, statistics, sentences
# ------------------------------------------------------------------------------------------------------------


def made(score, seed, **more):
    base = {"arm": "x", "seed": seed, "score": score, "failed": score <= 0.55, "one_answer": False, "lr": 1e-3}
    usual = {"cap": None, "seconds": 1.0, "steps_to_target": 15 if score > 0.6 else None}
    return {**base, **usual, "kept": [1.0], "clip_rate": [0.0], "total_norm": [2.0], **more}


def test_a_global_control_is_as_tight_as_its_component_cap():
    """Gradients are larger the less a run keeps, so that the first guess is off and has to be corrected."""
    asked = []

    def make(arms):
        found = {}
        for arm in arms:
            asked.append(arm.label)
            if arm.kind == "component":
                found[arm.label] = [
                    made(0.6, 0, kept=[0.1, 0.2, 0.3] if arm.cap < 1 else [1.0] * 3, total_norm=[2.0] * 3)
                ]
            else:
                norm = 4.0 - arm.cap
                found[arm.label] = [made(0.6, 0, kept=[min(1.0, arm.cap / norm)] * 3, total_norm=[norm] * 3)]
        return found

    arms = [parse(word) for word in ("none", "component:0.01", "matched:0.01", "matched:5")]
    settled, chosen = calibrate.choose(arms, 1e-3, make)
    assert [arm.label for arm in settled] == ["none", "component:0.01", "matched:0.01"]
    assert settled[2].kind == "global"
    cap = settled[2].cap
    assert cap / (4 - cap) == pytest.approx(0.2, rel=calibrate.CLOSE)
    assert chosen["matched:0.01"]["kept"] == pytest.approx(0.2, rel=calibrate.CLOSE)
    assert len(chosen["matched:0.01"]["tried"]) > 1
    assert chosen["matched:5"]["cap"] is None
    assert len(asked) == len(set(asked))


def test_the_stable_rate_is_the_one_with_fewest_failures_then_the_best_mean():
    scores = {3e-5: [0.5, 0.9], 2e-5: [0.6, 0.7], 1e-5: [0.6, 0.6]}

    def make(arms):
        return {arm.label: [made(score, i) for i, score in enumerate(scores[arm.lr])] for arm in arms}

    [arm], chosen = calibrate.choose([parse("stable")], 5e-5, make)
    assert (arm.kind, arm.lr, arm.label) == ("none", 2e-5, "stable")
    assert len(chosen["stable"]["tried"]) == 3


def test_summary_of_an_arm():
    one = statistics.summary([made(score, i) for i, score in enumerate([0.5, 0.55, 0.7, 0.75])])
    assert one["mean"] == pytest.approx(0.625)
    assert one["std"] == pytest.approx(0.1190, abs=1e-4)
    assert (one["min"], one["max"], one["failed"], one["failed_share"]) == (0.5, 0.75, 2, 0.5)
    assert (one["reached"], one["steps_to_target"]) == (2, 15)
    assert statistics.summary([made(0.5, 1)])["std"] is None


def test_wilson_intervals():
    assert statistics.wilson(0, 20) == pytest.approx([0, 0.1611], abs=1e-4)
    assert statistics.wilson(8, 20) == pytest.approx([0.2188, 0.6134], abs=1e-4)


def test_bootstrap_intervals_cover_and_are_paired():
    rng = random.Random(torch.initial_seed())
    base = [made(0.5 + 0.3 * rng.random(), i) for i in range(20)]
    shifted = [made(run["score"] + 0.1, run["seed"]) for run in base]
    found = statistics.difference(shifted, base)
    for key in ("difference", "low", "high"):  # the same for every seed: no doubt is left
        assert found["mean"][key] == pytest.approx(0.1)
        assert found["std"][key] == pytest.approx(0, abs=1e-9)
    assert statistics.difference(list(reversed(shifted))[:-4], base)["runs"] == 16
    assert statistics.difference(base[:1], base) is None
    assert statistics.difference(base, shifted) == statistics.difference(base, shifted)


def test_the_bootstrap_agrees_with_the_textbook_for_a_mean():
    torch.manual_seed(5)
    own, other = torch.randn(40).tolist(), torch.randn(40).tolist()
    pairs = [[made(score, i) for i, score in enumerate(side)] for side in (own, other)]
    found = statistics.difference(*pairs)["mean"]
    error = (torch.tensor(own) - torch.tensor(other)).std().item() / math.sqrt(40)
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * error, rel=0.06)


def sentences(component, seeds=20, none=None):
    runs = {
        "none": [made(0.5 if i % 2 else 0.7, i) for i in range(seeds)] if none is None else none,
        "component:0.01": [made(component(i), i) for i in range(seeds)],
    }
    return findings.gather([parse(word) for word in runs], runs)["sentences"]


def test_what_is_said_is_what_the_intervals_say():
    helped = sentences(lambda i: 0.7)[0]
    assert "fails less often (-0.500" in helped
    assert "scatters less" in helped
    assert "scores higher" in helped
    harmed = sentences(lambda i: 0.5)[0]
    assert "fails more often (+0.500" in harmed
    assert "scores lower" in harmed
    nothing = sentences(lambda i: 0.7 if i % 2 else 0.5)[0]
    assert "no difference is shown in how often runs fail (+0.000" in nothing
    assert "less often" not in nothing


def test_few_seeds_claim_nothing():
    said = sentences(lambda i: 0.7, seeds=4)
    assert "less" not in said[0]
    assert "under 10 seeds none is taken for a difference" in said[-1]


def test_a_report_without_control_or_without_failures_says_so():
    assert any("no global control" in sentence for sentence in sentences(lambda i: 0.7))
    good = [made(0.7, i) for i in range(20)]
    assert any("nothing here for clipping to mend" in sentence for sentence in sentences(lambda i: 0.7, none=good))


def test_each_component_cap_is_held_against_its_own_control():
    words = ["none", "component:0.01", "matched:0.01", "component:0.05", "matched:0.05"]
    runs = {word: [made(0.6 + 0.01 * n, i) for i in range(12)] for n, word in enumerate(words)}
    found = findings.gather([parse(word) for word in words], runs)
    assert {label: one["control"] for label, one in found["against_control"].items()} == {
        "component:0.01": "matched:0.01",
        "component:0.05": "matched:0.05",
    }
    assert found["baseline"] == "none"


# ------------------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------------------


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


# ------------------------------------------------------------------------------------------------------------
# Whole
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def experiment(tiny_model, items, tmp_path, monkeypatch):
    """Runs the command here; returns the (arm, seed) that it trained."""
    trained = []
    inner = Trainer.run

    def run(self, arm, seed, *rest):
        trained.append((arm.label, seed))
        return inner(self, arm, seed, *rest)

    monkeypatch.setattr(Trainer, "run", run)
    monkeypatch.setattr(names, "collect", lambda: items)  # which takes a while
    monkeypatch.chdir(tmp_path)

    def command(*more, drawn=False):
        if not drawn:  # which takes a while, too
            for name in DRAWN:
                monkeypatch.setattr(figures, name, lambda *_: b"a picture")
        given = ["--model", tiny_model, "--limit", 32, "--epochs", 1, "--device", "cpu", "--out", "out", *more]
        given += ["--threads", 1, "--evaluations", 1, "--calibration-seeds", 1]
        monkeypatch.setattr(sys, "argv", ["finetune_stability.py", *map(str, given)])
        del trained[:]
        finetune_stability.main()
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


def test_several_processes_make_the_same_runs(experiment, tiny_model, tmp_path):
    experiment("--arms", "none", "--seeds", 2)
    given = ["--model", tiny_model, "--limit", 32, "--epochs", 1, "--device", "cpu", "--arms", "none", "--seeds", 2]
    given += ["--processes", 2, "--threads", 1, "--evaluations", 1, "--out", "two", "--calibration-seeds", 1]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "finetune_stability.py"), *map(str, given)],
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
