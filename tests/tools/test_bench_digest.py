"""digest.py says in a few lines what compare.py and optimizer_step.py have measured."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich.console")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))  # they are scripts beside one another, not a package
import digest  # noqa: E402


def row(key, min_ms, host_ms=None):
    return {"key": key, "min_ms": min_ms, "host_ms": host_ms}


def case(name, clipped, rows):
    numbers = {"nbytes": 437_935_112, "floor_ms": 0.15}
    return {"set": name, "dtype": "float32", "clipped": clipped, **numbers, "rows": rows}


def test_clips(tmp_path, capsys):
    own = [row("function/cuda:form1", 0.2, 0.07), row("clipper/cuda:form1", 0.25, 0.05)]
    own.append(row("clipper/triton", 0.3, 0.1))
    activity = {"kernels": 2, "copies": 0, "fills": 0, "waits": 0, "torch_waits": False}
    written = {
        "results": [
            case("bert-base", "none", [row("loop", 12.3456, 12.0), row("foreach", 1.5, 1.0), *own]),
            case("bert-base", "all", [row("foreach", 1.6, 1.0), own[1]]),
        ],
        "launches": [
            {
                "set": "bert-base",
                "dtype": "float32",
                "clipped": "all",
                "by_provider": {
                    "loop": activity,
                    "clipper/cuda:form1": activity,
                    "clipper/triton": {**activity, "waits": 1},
                },
            }
        ],
        "skipped": ["bert-base float32, backend cuda:form2: " + 200 * "x"],
    }
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(written))
    digest.main([str(path), str(tmp_path / "other.json")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "---- bench.json"
    assert lines[1].startswith("skipped: bert-base float32, backend cuda:form2: xxx")
    assert len(lines[1]) == digest.LONGEST
    heading = "fastest round, ms N MB floor loop foreach form1 our triton floor/best of ours"
    assert [line.split() for line in lines[2:]] == [
        [],
        ["host,", "ms", "until", "the", "call", "returned", "form1", "our", "triton"],
        ["bert-base", "float32", "all", "0.050", "-"],
        [],
        ["launches", "of", "one", "call", "form1", "our", "triton"],
        ["bert-base", "float32", "all", "2", "2", "sync"],
        [],
        heading.split(),
        ["bert-base", "float32", "none", "437.9", "0.150", "12.35", "1.500", "0.250", "0.300", "60%"],
        ["bert-base", "float32", "all", "437.9", "0.150", "-", "1.600", "0.250", "-", "60%"],
        ["other.json:", "not", "written"],
    ]
    assert lines[-3].index("60%") == lines[-2].index("60%")


def test_steps(tmp_path, capsys):
    one = {"set": "lora-384", "dtype": "float32", "floor_ms": 0.031}
    ms = {"step": [2.0, 1.5], "ours/cuda": [0.25, 0.5], "clip": [3.0]}
    path = tmp_path / "step.json"
    path.write_text(json.dumps({"machine": {}, "results": [{**one, "case": c, "ms": ms} for c in ("none", "all")]}))
    digest.main([str(path)])
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["----", "step.json"],
        ["fastest", "round,", "ms", "step", "ours/cuda", "clip", "ceiling"],
        *(["lora-384", "float32", c, "1.500", "0.250", "3.000", "0.031"] for c in ("none", "all")),
    ]
