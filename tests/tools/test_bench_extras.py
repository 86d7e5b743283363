"""extras.py and memory.py run, and the methods that they compare give the same gradients."""

import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import extras  # noqa: E402
import memory  # noqa: E402
from _lib.gradients import Gradients  # noqa: E402
from _lib.shapes import SETS, ShapeSet  # noqa: E402
from helpers import DEVICE  # noqa: E402

SMALL = ShapeSet("small", "small", (("a.weight", (12, 6)), ("a.bias", (12,)), ("b.weight", (24, 3))), torch.float32)


def test_unscaling_ways_leave_the_same_gradients():
    gradients = Gradients(SMALL, torch.float32, torch.device(DEVICE))
    found = []
    for call in extras.loss_scale(gradients).values():
        gradients.restore()
        call()
        found.append([g.clone() for g in gradients.current])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-12)


def test_slices_are_what_their_names_say():
    keys = list(extras.slices(Gradients(SMALL, torch.float32, torch.device(DEVICE))))
    assert keys[0] == "whole tensors, K = 3"
    assert "every row of every matrix, K = 37" in keys
    assert "matrices in 3 slices of rows (q, k, v), K = 7" in keys


def test_extras_prints_and_writes(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(SETS, "small", SMALL)
    file = tmp_path / "extras.json"
    extras.main(["--set", "small", "--rounds", "1", "--device", DEVICE, "--json", str(file)])
    written = json.loads(file.read_text())
    assert set(written["ms"]) == {"loss scale", "slices", "thresholds", "recording"}
    assert all(times for ways in written["ms"].values() for times in ways.values())
    printed = capsys.readouterr().out
    for text in ("loss scale", "min / first row's", "EMA, after warm-up", "recorded, drained"):
        assert text in printed


@pytest.mark.slow
def test_memory_of_each_way(tmp_path, capsys, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    file = tmp_path / "memory.json"
    memory.main(["--model", "minilm", "--steps", "1", "--tokens", "4", "--device", DEVICE, "--json", str(file)])
    ways = json.loads(file.read_text())["ways"]
    assert set(ways) == set(memory.WAYS)
    assert all(way["peak_bytes"] > way["gradient_bytes"] for way in ways.values())
    assert "of the gradients" in capsys.readouterr().out
