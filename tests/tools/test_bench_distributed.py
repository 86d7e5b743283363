"""The benchmark of several ranks: it runs, and what it counts is what the library promises. No time is looked at."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("rich")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import distributed_clip  # noqa: E402
from _lib.shapes import narrow_llama3_8b, narrow_qwen3_30b_a3b  # noqa: E402
from ranks import on_ranks  # noqa: E402

CLIPPER = distributed_clip.CLIPPER


def total(way, what):
    return sum(way[what].values())


def test_prints_and_writes_what_it_counted(tmp_path, capsys):
    file = tmp_path / "found.json"
    distributed_clip.main(["--ranks", "2", "--rounds", "1", "--layers", "1", "--by", "64", "--json", str(file)])
    written = json.loads(file.read_text())
    assert written["metadata"]["ranks"] == 2
    cases = written["cases"]
    assert list(cases) == ["llama, fsdp", "llama, fsdp x tp", "llama, fsdp x tp, flattened", "moe, fsdp and ep"]
    for case in cases.values():
        for key, way in case["ways"].items():
            if way["refused"]:
                assert key == "one global clip_grad_norm_"
                assert "must have the same mesh" in way["refused"]
                continue
            assert all(len(way[times]) == 1 for times in ("cpu_ms", "wall_ms", "slowest_ms"))
            assert set(way["collectives"]) == set(way["nbytes"])
        # One all-reduce of float64 for each set of mesh dimensions that gradients are cut over.
        for key in (CLIPPER, "fused_component_clip_(...)"):
            assert case["ways"][key]["collectives"] == {"allreduce_": 1}

    # 9 parameters of the layer and 3 others; over 1 x 2 ranks the 3 norms are whole on both.
    llama = cases["llama, fsdp"]
    assert llama["components"] == {"parameter": 12}
    assert total(llama["ways"][CLIPPER], "nbytes") == 8 * 12
    assert total(llama["ways"]["loop of clip_grad_norm_"], "collectives") == 12
    assert total(llama["ways"]["loop of clip_grad_norm_"], "nbytes") == 4 * 12
    assert total(llama["ways"]["one global clip_grad_norm_"], "collectives") == 1
    both = cases["llama, fsdp x tp"]["ways"]
    assert total(both[CLIPPER], "nbytes") == 8 * (12 - 3)
    assert total(both["loop of clip_grad_norm_"], "collectives") == 12 - 3

    moe = cases["moe, fsdp and ep"]
    assert moe["components"] == {"parameter": 11 + 3, "expert": 9 + 3 + 2 * 128}
    assert total(moe["ways"][CLIPPER], "nbytes") == 8 * 14
    assert total(moe["ways"]["clip_(), every expert by itself"], "nbytes") == 8 * 268
    assert total(moe["ways"]["one global norm, mesh by mesh"], "collectives") == 2

    printed = capsys.readouterr().out
    for text in (
        "FSDP2 over 2 ranks",
        "K = 14 by parameter, K = 268 by",
        "one global clip_grad_norm_: All operands",
        "slowest rank",
    ):
        assert text in printed


@on_ranks(4)
def test_ways_of_a_case_do_what_the_others_do():
    """All that clip by parameter leave the same; the global ones find the norm that ours adds up to."""
    from _lib.sharded_models import ShardedGradients, cases
    from cwclip_kernels import ComponentClipper

    for case in cases(dist.get_world_size(), layers=1, by=64):
        gradients = ShardedGradients(case)
        clipper = ComponentClipper(gradients.named, float("inf"))
        expected = clipper.total_norm(clipper.norms())  # before anything is clipped
        calls, same = distributed_clip.ways(case, gradients)
        buckets = 2 if "tp" in case.key else 1  # norms are cut over dp alone; experts over all ranks, as the others
        key = "one global norm, mesh by mesh" if case.has_experts else "one global clip_grad_norm_"
        found = calls[key]()
        whole = found.full_tensor() if hasattr(found, "full_tensor") else found
        torch.testing.assert_close(whole, expected, rtol=1e-5, atol=0.0, msg=lambda m, c=case: f"{c.key}: {m}")
        with distributed_clip.Traffic() as traffic:
            calls[CLIPPER]()
        assert traffic.calls == {"allreduce_": buckets}
        left = {}
        for way in list(calls)[:same]:
            gradients.reseed()
            calls[way]()
            left[way] = torch.cat([g.flatten() for g in gradients.local])
        for way, own in left.items():
            torch.testing.assert_close(own, left[CLIPPER], rtol=1e-4, atol=1e-9, msg=lambda m, w=way: f"{w}: {m}")
        if case.has_experts:
            pair = []
            for way in ("clip_(), every expert by itself", "loop, and experts by hand"):
                gradients.reseed()
                calls[way]()
                pair.append(torch.cat([g.flatten() for g in gradients.local]))
            torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-9)


def test_narrow_models_have_the_parameters_of_the_wide_ones():
    assert narrow_llama3_8b(32, 1).elements == 8_030_261_248
    # Qwen/Qwen3-30B-A3B as transformers builds it.
    assert narrow_qwen3_30b_a3b(48, 1).elements == 30_532_122_624
    assert len(narrow_qwen3_30b_a3b(48, 32).shapes) == 48 * 11 + 3
    assert [n for n, _ in narrow_llama3_8b(32, 32).shapes] == [n for n, _ in narrow_llama3_8b(32, 1).shapes]
