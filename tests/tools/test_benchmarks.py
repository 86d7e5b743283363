"""The benchmarks measure what they say: right shapes, equal results from every way, a script that runs."""

from __future__ import annotations

import io
import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

rich_console = pytest.importorskip("rich.console")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))  # they are scripts beside one another, not a package

import compare  # noqa: E402
from _lib import runs  # noqa: E402
from _lib.gradients import CASES, Gradients, clipped_share, clips  # noqa: E402
from _lib.launches import Activity, SetActivity  # noqa: E402
from _lib.measure import LEAST_ROUNDS, Ceilings, Timing, Variant, clock_for, interleave  # noqa: E402
from _lib.providers import TORCH, Provider, explain, ours, set_environment  # noqa: E402
from _lib.report import CaseResult, print_activity, print_case, rows_and_floor  # noqa: E402
from _lib.shapes import SETS, ShapeSet  # noqa: E402

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Published totals: num_parameters() of the Hugging Face checkpoints, the 2-label head added by hand where
# the set has one (2 x width weights, 2 biases). LoRA: 16 x 4 + 16 x 8 projections, two factors of 8 x 1024.
PUBLISHED = {
    "bert-base": (199 + 2, 109_482_240 + 2 * 768 + 2),
    "bert-large": (391 + 2, 335_141_888 + 2 * 1024 + 2),
    "roberta-large": (391 - 2, 355_359_744 - (1024 * 1024 + 1024)),  # roberta-large, less its pooler
    "gpt2": (148, 124_439_808),
    "vit-b16": (200, 86_567_656),
    "t5-base": (257, 222_903_552),
    "minilm-l6": (103 + 2, 22_713_216 + 2 * 384 + 2),
    "llama3-8b": (291, 8_030_261_248),
    "lora-384": ((16 * 4 + 16 * 8) * 2, (16 * 4 + 16 * 8) * 2 * 8 * 1024),
    "tiny-20000": (20_000, 20_000 * 64),
    "views-2000": (2000, sum(1 + 1009 * i % 4099 for i in range(2000))),
    "huge": (1, 2_147_487_747),
}
# As the design publishes them, and the targets and predictions for GPUs rest on them.
MEGABYTES = {
    ("bert-base", "float32"): 437.9,
    ("bert-large", "float32"): 1340.6,
    ("roberta-large", "float32"): 1417.2,
    ("roberta-large", "bfloat16"): 708.6,
    ("minilm-l6", "float32"): 90.9,
    ("llama3-8b", "bfloat16"): 16060.5,
    ("lora-384", "float32"): 12.6,
}

# One of each kind of shape there is: matrix, vector, scalar, four dimensions; sizes around vector widths.
SMALL = ShapeSet(
    "small",
    "for tests",
    (
        ("embeddings.weight", (101, 16)),
        ("layer.0.weight", (33, 17)),
        ("layer.0.bias", (33,)),
        ("scale", ()),
        ("convolution.weight", (4, 3, 2, 2)),
        ("head.bias", (1,)),
    ),
)


@pytest.mark.parametrize("name", SETS)
def test_shape_set_has_the_published_size(name: str) -> None:
    shape_set = SETS[name]
    assert (len(shape_set.shapes), shape_set.elements) == PUBLISHED[name]
    assert len({parameter for parameter, _ in shape_set.shapes}) == len(shape_set.shapes)


@pytest.mark.parametrize(("name", "dtype"), MEGABYTES)
def test_shape_set_has_the_published_bytes(name: str, dtype: str) -> None:
    assert SETS[name].nbytes(getattr(torch, dtype)) / 1e6 == pytest.approx(MEGABYTES[name, dtype], abs=0.05)


def test_readme_lists_the_sets_as_they_are() -> None:
    text = (BENCHMARKS / "README.md").read_text()
    rows = re.findall(r"^\| ([\w-]+) \| ([\d,]+) \| ([\d,]+) \| ([\d.]+) \|", text, re.M)
    listed = {name: (int(tensors.replace(",", "")), int(total.replace(",", ""))) for name, tensors, total, _ in rows}
    assert listed == {name: (len(s.shapes), s.elements) for name, s in SETS.items()}
    for name, _, _, megabytes in rows:
        assert SETS[name].nbytes() / 1e6 == pytest.approx(float(megabytes), rel=0.01)


# All that is compared on GPUs, and what a CPU takes by itself. Where there is no GPU, Triton's interpreter runs its
# kernels, and conftest.py has those of the "backend" called cuda run on the CPU.
SPECS = ("best", "cuda:form1:blocks2", "cuda:form2:blocks2", "triton", "foreach")
WAYS = [("torch", p) for p in TORCH if p.componentwise]
WAYS += [(spec.partition(":")[0], p) for spec in SPECS for p in ours(spec)]


# bfloat16: torch rounds norm, coefficient and product to bfloat16, 2^-8 each; we round the product only.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3 * 2**-8)])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("misaligned", [False, True], ids=["aligned", "misaligned"])
@pytest.mark.parametrize(("backend", "way"), WAYS, ids=[way.key for _, way in WAYS])
def test_every_way_gives_the_same_gradients(
    backend: str, way: Provider, misaligned: bool, case: str, dtype: torch.dtype, tolerance: float
) -> None:
    gradients = Gradients(replace(SMALL, misaligned=misaligned), dtype, DEVICE)
    before = [g.double() for g in gradients.current]
    try:
        explain(gradients.named, "best" if backend == "torch" else backend)
    except (RuntimeError, ValueError) as refusal:
        pytest.skip(str(refusal))
    one = runs.variant(way, gradients, case)
    one.before(0)
    one.call()
    set_environment({})
    for old, new, clipped, norm in zip(
        before, gradients.current, clips(case, len(before)), gradients.norms, strict=True
    ):
        cap = {"none": math.inf, "half": 0.5 * norm, "all": 0.5 * min(gradients.norms)}[case]
        expected = old * (cap / (norm + 1e-6)) if clipped else old
        torch.testing.assert_close(new.double(), expected, rtol=tolerance, atol=0.0)


def test_global_way_leaves_alone_under_none_and_clips_the_total_under_all() -> None:
    way = next(p for p in TORCH if not p.componentwise)
    gradients = Gradients(SMALL, torch.float32, CPU)
    before = [g.clone() for g in gradients.current]
    way.prepare(gradients.named, gradients.cap("none"))()
    assert all(map(torch.equal, gradients.current, before))
    way.prepare(gradients.named, gradients.cap("all"))()
    total = torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients.current]))
    assert float(total) == pytest.approx(gradients.cap("all"), rel=1e-5)


def test_gradients_rotate_restore_and_repeat() -> None:
    gradients = Gradients(SMALL, torch.float32, CPU, rotate=2, seed=7)
    first = gradients.current
    pristine = [g.clone() for g in first]
    torch._foreach_mul_(first, 0.5)
    gradients.use(1)
    assert all(p.grad is g for (_, p), g in zip(gradients.named, gradients.current, strict=True))
    assert all(map(torch.equal, gradients.current, pristine))
    gradients.use(2)
    assert gradients.current is first
    gradients.restore()
    assert all(map(torch.equal, first, pristine))
    assert all(map(torch.equal, Gradients(SMALL, torch.float32, CPU, seed=7).current, pristine))
    assert not torch.equal(Gradients(SMALL, torch.float32, CPU, seed=8).current[0], pristine[0])
    assert 0.0 == clipped_share(SMALL, "none") < clipped_share(SMALL, "half") < clipped_share(SMALL, "all") == 1


def test_gradients_without_a_copy_refuse_to_be_restored() -> None:
    with pytest.raises(ValueError, match="restorable=False"):
        Gradients(SMALL, torch.float32, CPU, restorable=False).restore()


def test_rounds_interleave_in_another_order_each_and_drop_the_warm_up() -> None:
    called: list[str] = []
    variants = [Variant(key, lambda turn: None, lambda key=key: called.append(key), lambda: []) for key in "abc"]
    timings = interleave(variants, clock_for(CPU), rounds=9, warmup=1, warm=True)
    orders = ["".join(called[i : i + 3]) for i in range(0, len(called), 3)]
    assert len(orders) == 10
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len(set(orders)) > 2
    assert {key: len(t.samples) for key, t in timings.items()} == {"a": 9, "b": 9, "c": 9}


def test_a_slow_variant_has_fewer_rounds_and_costs_the_others_none() -> None:
    variants = [
        Variant("slow", lambda turn: None, lambda: time.sleep(0.03), lambda: []),
        Variant("quick", lambda turn: None, lambda: None, lambda: []),
    ]
    timings = interleave(variants, clock_for(CPU), rounds=8, warmup=1, warm=True, seconds=0.04)
    assert {key: len(t.samples) for key, t in timings.items()} == {"slow": LEAST_ROUNDS, "quick": 8}


def test_rows_have_the_arithmetic_that_the_readme_promises() -> None:
    ceilings = {"torch.dot": 2.0, "torch.sum": 1.0, "copy_": 4.0, "mul_": 3.0}
    rows, gbps, floor = rows_and_floor(
        labels={"loop": "theirs", "clipper/best": "ours"},
        timings={"loop": Timing([12.0, 10.0, 11.0]), "clipper/best": Timing([2.0, 4.0, 6.0])},
        ceilings={key: Timing([ms]) for key, ms in ceilings.items()},
        nbytes=8_000_000,
        share=0.25,
    )
    assert floor == 0.75 * 1.0 + 0.25 * 3.0
    assert gbps == {"torch.dot": 4.0, "torch.sum": 8.0, "copy_": 2.0, "mul_": pytest.approx(8 / 3)}
    mine = rows[1]
    assert (mine.min_ms, mine.median_ms, mine.gbps, mine.of_ceiling) == (2.0, 4.0, 4.0, 0.75)
    assert mine.speedup == {"loop": (5.0, 11.0 / 4.0)}


def test_table_fits_120_columns_with_the_host_time_of_a_gpu() -> None:
    # The longest backend name, and numbers as wide as they get.
    providers = [*TORCH, *ours("cuda:form1")]
    timings = {p.key: Timing([1234.5], host=[1234.5]) for p in TORCH}
    timings |= {p.key: Timing([12.345], host=[0.012345]) for p in ours("cuda:form1")}
    ceilings = {key: Timing([2.5]) for key in (*Ceilings.READ, *Ceilings.WRITE)}
    rows, gbps, floor = rows_and_floor({p.key: p.label for p in providers}, timings, ceilings, 10**10, 0.5)
    result = CaseResult(
        "roberta-large", "", "bfloat16", 20_000, 10**10, 1, "all", 0.5, gbps, floor, rows, {"cuda:form1": ""}
    )
    written = io.StringIO()
    console = rich_console.Console(file=written, width=compare.WIDTH)
    print_case(console, result)
    much = Activity(kernels=20_000, copies=20_000, fills=1, waits=1, torch_waits=True)
    activity = [SetActivity(name, "bfloat16", "all", {p.key: much for p in TORCH}) for name in SETS]
    print_activity(console, activity, {p.key: p.label for p in providers})
    assert max(map(len, written.getvalue().splitlines())) <= 120
    assert "…" not in written.getvalue()


def test_ceilings_scale_to_the_size_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("_lib.measure.CEILING_LIMIT", 4096)
    ceilings = Ceilings(4 * 4096, CPU)
    timings = {v.key: Timing([1.0]) for v in ceilings.variants()}
    assert ceilings.nbytes == 4096
    assert {key: t.min for key, t in ceilings.take(timings).items()} == dict.fromkeys(
        Ceilings.READ + Ceilings.WRITE, 4
    )
    assert timings == {}


def test_compare_runs_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(SETS, "small", SMALL)
    written, drawn, roof = tmp_path / "out.json", tmp_path / "out.png", tmp_path / "roof.png"
    options = ["--sets", "small,small:bfloat16", "--backends", "best,reference,nonsense"]
    options += ["--rounds", "2", "--warmup", "1", "--rotate", "2", "--device", "cpu"]
    compare.main([*options, "--json", str(written), "--plot", str(drawn), "--roofline", str(roof)])

    printed = capsys.readouterr().out
    assert "ComponentClipper (best)" in printed
    assert "nonsense" in printed
    rows = [line for line in printed.splitlines() if "fused_component_clip_ (" in line]
    assert len(rows) == 2 * 3 * 2  # dtypes, cases, backends
    assert all(len(row) <= 120 and "…" not in row for row in rows)

    found = json.loads(written.read_text())
    assert found["metadata"].keys() >= {
        "date",
        "cpu",
        "threads",
        "torch",
        "python",
        "command",
        "cwclip_kernels",
    }
    assert [line for line in found["skipped"] if "nonsense" in line]
    assert [(r["dtype"], r["clipped"]) for r in found["results"]] == [
        (d, c) for d in ("float32", "bfloat16") for c in CASES
    ]
    for result in found["results"]:
        keys = [row["key"] for row in result["rows"]]
        ways = ["loop", "foreach", "tolist"] + ([] if result["clipped"] == "half" else ["global"])
        assert keys == [*ways, "function/best", "clipper/best", "function/reference", "clipper/reference"]
        assert result["ceilings_gbps"].keys() == {*Ceilings.READ, *Ceilings.WRITE}
        assert result["backends"].keys() == {"best", "reference"}
        for row in result["rows"]:
            assert len(row["samples_ms"]) == 2
            assert row["min_ms"] <= row["median_ms"]
            assert list(row["speedup"]) == ways
    assert drawn.read_bytes().startswith(b"\x89PNG")
    assert roof.read_bytes().startswith(b"\x89PNG")
    # Kernels are counted on GPUs alone: here there is nothing to say about one.
    assert found["launches"] == []
    assert "Kernels" not in printed
    assert "gpu" not in found["metadata"]


def test_compare_skips_what_memory_cannot_hold(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs, "available_bytes", lambda device: 10**9)
    compare.main(["--sets", "llama3-8b", "--device", "cpu"])
    assert "skipped: llama3-8b bfloat16: takes 34.3 GB, 1.0 GB available" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--sets", "bert"], "'bert' is none of bert-base"),
        (["--clipped", "most"], "'most' is none of none, half, all"),
        (["--sets", "bert-base:int8"], "'int8' is none of float32"),
        (["--rounds", "0"], "at least 1"),
        (["--backends", "cuda:form"], "'form' is none of form, blocks with a number"),
        (["--backends", "best,cuda:warps4"], "'warps4' is none of form, blocks with a number"),
    ],
)
def test_compare_refuses_what_it_does_not_know(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        compare.parse(arguments)
    assert complaint in capsys.readouterr().err


def test_all_means_every_set_and_the_case_of_that_name() -> None:
    assert compare.parse(["--sets", "all"]).sets == tuple(name for name in SETS if name != "huge")
    assert compare.parse(["--sets", "huge"]).sets == ("huge",)
    assert compare.parse(["--clipped", "all"]).clipped == ("all",)


def test_compare_starts_as_a_script() -> None:
    script = [sys.executable, str(BENCHMARKS / "compare.py"), "--help"]
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # the package may not be installed
    done = subprocess.run(script, capture_output=True, text=True, check=False, env=here)
    assert done.returncode == 0, done.stderr
    assert "--clipped" in done.stdout
