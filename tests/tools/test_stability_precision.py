"""Runs of the experiment in bfloat16: what is computed in it, what isn't, and that nothing mixes them up."""

import json

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from experiment_setup import CPU, on_one_thread, settings_for, tiny_model
from stability import tasks
from stability.arms import parse
from stability.problem import Problem
from stability.runs import Store
from stability.train import Trainer

one_thread = pytest.fixture(autouse=True, scope="module")(on_one_thread)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tiny_model(tmp_path_factory.mktemp("model"))
    return {kind: settings_for(folder, "--precision", kind)[0] for kind in ("float32", "bfloat16")}


def test_norms_are_close_to_those_of_float32_and_not_the_same(settings):
    runs = {kind: Trainer(one, tasks.load(one), CPU).run(parse("none"), 3) for kind, one in settings.items()}
    wide, narrow = (torch.tensor(runs[kind]["norms"]) for kind in ("float32", "bfloat16"))
    assert not torch.equal(narrow, wide)
    torch.testing.assert_close(narrow, wide, rtol=0.05, atol=1e-3)


def test_products_alone_are_in_bfloat16(settings, monkeypatch):
    seen = {}

    def look(optimizer, *_):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                seen.setdefault("weights", set()).add(parameter.dtype)
                seen.setdefault("gradients", set()).add(parameter.grad.dtype)

    forward = torch.nn.Linear.forward

    def linear(self, inputs):
        made = forward(self, inputs)
        seen.setdefault("products", set()).add(made.dtype)
        return made

    monkeypatch.setattr(torch.nn.Linear, "forward", linear)
    handle = register_optimizer_step_pre_hook(look)
    try:
        Trainer(settings["bfloat16"], tasks.load(settings["bfloat16"]), CPU).run(parse("component:1e-3"), 3)
    finally:
        handle.remove()
    assert seen == {"products": {torch.bfloat16}, "weights": {torch.float32}, "gradients": {torch.float32}}


def test_a_folder_holds_runs_of_one_precision(settings, tmp_path):
    older = {key: value for key, value in settings["float32"].as_dict().items() if key != "precision"}
    store = Store(tmp_path)
    store.claim(older)
    store.claim(settings["float32"].as_dict())
    with pytest.raises(Problem, match="precision 'float32', now 'bfloat16'"):
        store.claim(settings["bfloat16"].as_dict())
    assert "precision" not in json.loads((tmp_path / "experiment.json").read_text())
