"""optimizer_step.py runs, and the ways that it compares step alike."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import optimizer_step  # noqa: E402
from _lib.gradients import Gradients  # noqa: E402
from _lib.shapes import SETS, ShapeSet  # noqa: E402
from helpers import DEVICE  # noqa: E402

SMALL = ShapeSet("small", "small", (("a.weight", (12, 6)), ("a.bias", (12,)), ("b.weight", (24, 3))), torch.float32)


@pytest.mark.parametrize("case", optimizer_step.CASES)
def test_ways_step_alike(case):
    gradients = Gradients(SMALL, torch.float32, torch.device(DEVICE))
    cap = gradients.cap(case)
    options = argparse.Namespace(dtype="float32", state_dtype="same", backends=(None,))
    found = {}
    for key in optimizer_step.LABELS:
        torch.manual_seed(0)
        named = [(name, nn.Parameter(torch.randn_like(p.grad))) for name, p in gradients.named]
        for (_, p), grad in zip(named, gradients.current, strict=True):
            p.grad = grad
        gradients.restore()
        calls = optimizer_step.ways(named, cap, options)
        before = [p.detach().clone() for _, p in named]
        calls[key]()
        found[key] = [p.detach() - old for (_, p), old in zip(named, before, strict=True)]
    # Adam's step hardly depends on a gradient's size, so that these are compared closely.
    same = ("ours", "clip", "loop") if case == "all" else optimizer_step.LABELS
    for key in same:
        for a, b in zip(found[key], found["ours"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-9, msg=key)


def test_prints_and_writes(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(SETS, "minilm-l6", SMALL)
    file = tmp_path / "step.json"
    arguments = ["--sets", "minilm-l6", "--rounds", "2", "--dtype", "bfloat16", "--state-dtype", "float32"]
    arguments += ["--backends", "foreach,reference"]
    optimizer_step.main([*arguments, "--device", DEVICE, "--json", str(file)])
    printed = capsys.readouterr().out
    assert "ComponentClipAdamW (foreach)" in printed
    assert "ComponentClipAdamW (reference)" in printed
    assert "all clipped" in printed
    results = json.loads(file.read_text())["results"]
    assert [r["case"] for r in results] == ["none", "all"]
    assert all(len(ms) == 2 for r in results for ms in r["ms"].values())
