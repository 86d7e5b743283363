"""The paper's experiment with the optimizer that clips: what it runs with, and that results don't depend on it."""

import dataclasses
import json

import pytest
import torch

from cwclip_kernels.optim import ComponentClipAdamW
from experiment_setup import CPU, items, on_one_thread, settings_for, tiny_model
from stability import models, names, report, tasks
from stability.arms import parse
from stability.optimizer import AdamW
from stability.problem import Problem
from stability.runs import Store
from stability.stepping import stepping_of
from stability.train import Trainer

_on_one_thread = pytest.fixture(scope="module", autouse=True)(on_one_thread)
LR = 0.01


@pytest.fixture(autouse=True)
def _collected_once(monkeypatch):
    monkeypatch.setattr(names, "collect", items)  # which takes a while


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def settings_of(folder, kind, *more):
    return settings_for(folder, "--lr", str(LR), "--optimizer", kind, *more)[0]


def batch_of(seed):
    numbers = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, 300, (8, 12), generator=numbers)
    return {"input_ids": tokens, "labels": torch.randint(2, (8,), generator=numbers)}


@pytest.mark.parametrize("correct", [[], ["--bias-correction"]], ids=["as BERT", "corrected"])
@pytest.mark.parametrize(
    "word", ["none", "component:0.05", "EMA(warmup_steps=2)", "FromGlobal(0.5)", "ParamRelative()"]
)
def test_both_optimizers_train_the_same(model_folder, word, correct):
    """In float64, so that nothing is left but the other order of operations."""
    made = []
    for kind in ("separate", "fused"):
        model = models.load(str(model_folder), 2, seed=0).double().eval()  # without dropout
        made.append((model, stepping_of(parse(word), model, settings_of(model_folder, kind, *correct), LR)))
    (_, one), (_, other) = made
    assert isinstance(one.optimizer, AdamW)
    assert isinstance(other.optimizer, ComponentClipAdamW)
    assert one.names == other.names
    clipped = 0
    for turn in range(6):
        found = []
        for model, stepping in made:
            for group in stepping.optimizer.param_groups:
                group["lr"] = LR / (1 + turn)
            model(**batch_of(turn)).loss.backward()
            found.append(stepping.step())
            stepping.optimizer.zero_grad()
        (norms, coefs), (their_norms, their_coefs) = found
        torch.testing.assert_close(their_norms, norms, rtol=1e-9, atol=1e-12)
        is_some = norms > 1e-12  # attention doesn't depend on the bias of keys, whose gradients are rounding errors
        assert is_some.sum() == len(norms) - 2
        torch.testing.assert_close(their_coefs[is_some], coefs[is_some], rtol=1e-9, atol=0)
        weights = [list(model.parameters()) for model, _ in made]
        torch.testing.assert_close(weights[1], weights[0], rtol=1e-9, atol=1e-9)
        clipped += int((found[0][1] != 1).sum())
    assert (clipped > 0) == (word != "none")


def test_one_global_norm_is_clipped_before_the_step(model_folder):
    model = models.load(str(model_folder), 2, seed=0)
    stepping = stepping_of(parse("global:1"), model, settings_of(model_folder, "fused"), LR)
    assert isinstance(stepping.optimizer, AdamW)
    with pytest.raises(ValueError, match="calibrated first"):
        stepping_of(parse("matched:0.5"), model, settings_of(model_folder, "fused"), LR)


def test_runs_record_the_optimizer_and_come_to_the_same(model_folder):
    runs = {}
    for kind in ("separate", "fused"):
        settings = settings_of(model_folder, kind)
        trainer = Trainer(settings, tasks.load(settings), CPU)
        for word in ("component:1e-3", "global:1"):
            runs[kind, word] = trainer.run(parse(word), 7)
    for word in ("component:1e-3", "global:1"):
        one, other = runs["separate", word], runs["fused", word]
        for key in ("components", "norm_steps", "scores"):
            assert one[key] == other[key]
        for key in ("loss", "total_norm", "kept", "clip_rate", "norms"):
            torch.testing.assert_close(torch.tensor(other[key]), torch.tensor(one[key]), rtol=0.01, atol=1e-6)
    kinds = {key: run["made_by"]["optimizer"] for key, run in runs.items()}
    assert [key for key, kind in kinds.items() if kind == "ComponentClipAdamW"] == [("fused", "component:1e-3")]
    assert set(kinds.values()) == {"AdamW", "ComponentClipAdamW"}


def test_a_folder_holds_runs_of_one_kind(model_folder, tmp_path):
    separate, fused = (settings_of(model_folder, kind).as_dict() for kind in ("separate", "fused"))
    before = {key: value for key, value in separate.items() if key != "optimizer"}  # made when there was no choice
    for name, first in (("new", separate), ("old", before)):
        store = Store(tmp_path / name)
        store.claim(first)
        store.claim(separate)
        with pytest.raises(Problem, match=r"another experiment \(optimizer 'separate', now 'fused'\)"):
            store.claim(fused)
    assert "optimizer" not in json.loads((tmp_path / "old/experiment.json").read_text())


def test_the_report_names_it(model_folder):
    settings = settings_of(model_folder, "fused")
    for one, is_named in ((settings, True), (dataclasses.replace(settings, optimizer="separate"), False)):
        about = report.facts(one, tasks.load(one), [parse("none")], [1], [1000], "cpu")
        assert about["settings"]["optimizer"] == one.optimizer
        found = {
            "arms": {},
            "sentences": [],
            "baseline": "none",
            "against_baseline": {},
            "against_control": {},
            "tests": [],
            "gradients": {"depth": [], "type": []},
        }
        text = report.markdown({**about, "date": "today"}, found, [], {}, "command")
        assert ("`ComponentClipAdamW`" in text) == is_named
