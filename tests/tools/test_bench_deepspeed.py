"""The benchmark of DeepSpeed engines: it runs, and what it counts is what the docs promise. No time is looked at."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("deepspeed")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import deepspeed_clip


def test_prints_and_writes_what_it_counted(tmp_path, capsys):
    file = tmp_path / "found.json"
    deepspeed_clip.main(["--rounds", "1", "--stages", "2", "3", "--layers", "1", "--by", "32", "--json", str(file)])
    cases = json.loads(file.read_text())["cases"]
    assert list(cases) == [f"ZeRO {stage}, {dtype}" for stage in (2, 3) for dtype in ("float32", "bfloat16")]
    for case in cases.values():
        ways = case["ways"]
        own = ways[deepspeed_clip.OWN]
        assert ways[deepspeed_clip.NONE]["collectives"] == own["collectives"]
        for key in (deepspeed_clip.ALL, deepspeed_clip.FEW):
            # One all-reduce of a float64 for each component takes the place of that of one number.
            assert ways[key]["collectives"] == own["collectives"]
            # Beside it DeepSpeed asks in a byte whether there is an inf, in stage 2 with bfloat16.
            assert ways[key]["nbytes"].pop("allreduce_") - 8 * case["tensors"] == own["collectives"]["allreduce_"] - 1
            assert ways[key]["nbytes"] == {k: n for k, n in own["nbytes"].items() if k != "allreduce_"}
        assert all(len(way[times]) == 1 for way in ways.values() for times in ("cpu_ms", "wall_ms"))
