"""The parts of the paper's experiment: data, optimizer, arms, one run on a model of a few thousand weights."""

import json
import math
import sys
from collections import Counter

import pytest
import torch

from experiment_setup import CPU, items, on_one_thread, settings_for, tiny_model
from stability import models, names, optimizer, options, tasks
from stability.arms import Arm, clip_of, parse, threshold
from stability.problem import Problem
from stability.train import MOST_STEPS, Trainer, rate, schedule

_on_one_thread = pytest.fixture(scope="module", autouse=True)(on_one_thread)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def trainer(model_folder):
    settings = settings_for(model_folder, "--lr", "0.01")[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(names, "collect", items)  # which takes a while
        return Trainer(settings, tasks.load(settings), CPU)


# ------------------------------------------------------------------------------------------------------------
# Data and scores
# ------------------------------------------------------------------------------------------------------------


def test_names_are_the_same_every_time_and_as_many_as_the_issue_says():
    assert names.collect() == items()
    train, dev = names.build(items())
    assert names.build(items()) == (train, dev)
    assert (len(train), len(dev)) == (480, 256)
    assert Counter(label for _, label in dev).most_common(1)[0][1] / 256 == pytest.approx(0.551, abs=5e-4)


def test_names_share_nothing_between_the_sides_and_wrong_pairs_are_of_one_module():
    train, dev = names.build(items())
    for part in (0, 1):
        assert not {texts[part] for texts, _ in train} & {texts[part] for texts, _ in dev}
    by_name = {item.name: item for item in items()}
    by_summary = {item.summary: item for item in items()}
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


def test_tasks_carry_their_rule_and_a_hash(model_folder, monkeypatch):
    monkeypatch.setattr(names, "collect", items)
    examples = tasks.docstrings.collect()
    monkeypatch.setattr(tasks.docstrings, "collect", lambda: examples)
    for name, classes in (("names", 2), ("docstrings", 9)):
        task = tasks.load(settings_for(model_folder, "--task", name)[0])
        assert (len(task.train), task.classes, task.metric) == (64, classes, "accuracy")
        assert task.cutoff >= task.majority
        assert f"{sys.version_info.major}.{sys.version_info.minor}" in task.source
        longer = tasks.load(settings_for(model_folder, "--task", name, "--limit", "65")[0])
        assert task.fingerprint != longer.fingerprint
    assert tasks.load(settings_for(model_folder)[0]).cutoff == pytest.approx(141 / 256)


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


def test_biases_and_layernorm_are_not_decayed(model_folder):
    model = models.load(str(model_folder), 2, seed=0)
    decayed, others = optimizer.groups(model, 0.01)
    kinds = {id(p): name for name, p in model.named_parameters()}
    assert len(decayed["params"]) + len(others["params"]) == len(kinds)
    assert not any("bias" in kinds[id(p)] or "LayerNorm" in kinds[id(p)] for p in decayed["params"])
    assert all("bias" in kinds[id(p)] or "LayerNorm" in kinds[id(p)] for p in others["params"])
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.01, 0.0)


def test_learning_rate_falls_in_a_line_and_the_last_look_is_at_the_end(model_folder):
    assert [rate(step, 4, 0.0) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert [rate(step, 4, 0.5) for step in range(4)] == [0.5, 1.0, 1.0, 0.5]
    steps, looks = schedule(settings_for(model_folder, "--epochs", "3", "--evaluations", "6")[0], 480)
    assert (steps, sorted(looks)) == (90, [15, 30, 45, 60, 75, 90])
    assert schedule(settings_for(model_folder)[0], 1) == (1, {1})


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


def test_the_arms_do_to_gradients_what_they_say(model_folder):
    model = models.load(str(model_folder), 2, seed=0)
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


def test_the_head_is_drawn_anew_and_the_pooler_kept(model_folder):
    one, same, other = (dict(models.load(str(model_folder), 2, seed).named_parameters()) for seed in (1, 1, 2))
    assert torch.equal(one["classifier.weight"], same["classifier.weight"])
    assert not torch.equal(one["classifier.weight"], other["classifier.weight"])
    assert not one["classifier.bias"].any()
    assert torch.equal(one["bert.pooler.dense.weight"], other["bert.pooler.dense.weight"])
    many = models.load(str(model_folder), 500, 1).classifier.weight
    assert many.std().item() == pytest.approx(0.02, rel=0.1)
