"""What the benchmarks do on a GPU, as far as a machine without one can tell."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

pytest.importorskip("rich.console")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))  # they are scripts beside one another, not a package

import compare  # noqa: E402
import traffic  # noqa: E402
from _lib import launches, machine, runs  # noqa: E402
from _lib.gradients import Gradients  # noqa: E402
from _lib.launches import Activity  # noqa: E402
from _lib.measure import clock_for  # noqa: E402
from _lib.options import chosen_torch  # noqa: E402
from _lib.providers import TORCH, VARIABLES, Provider, ours, set_environment  # noqa: E402
from _lib.shapes import SETS, ShapeSet  # noqa: E402

CPU = torch.device("cpu")
PAIR = ShapeSet("pair", "for tests", (("a.weight", (5, 7)), ("b.weight", (11,)), ("c.weight", (3,))))
HERE = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # the package may not be installed


# ------------------------------------------------------------------------------------------------------------
# Gradients and providers
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_misaligned_views_start_at_every_place_but_those_of_16_bytes(dtype: torch.dtype) -> None:
    gradients = Gradients(SETS["views-2000"], dtype, CPU, rotate=2)
    for turn in (0, 1):
        gradients.use(turn)
        places = {g.data_ptr() % 16 for g in gradients.current}
        assert places == set(range(dtype.itemsize, 16, dtype.itemsize))
        spans = sorted((g.data_ptr(), g.data_ptr() + g.nbytes) for g in gradients.current)
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def test_current_norms_are_right_where_a_tensor_is_summed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("_lib.gradients.PIECE", 4)
    gradients = Gradients(PAIR, torch.float32, CPU)
    expected = [float(torch.linalg.vector_norm(g.double())) for g in gradients.current]
    assert gradients.norms == pytest.approx(expected, rel=1e-6)


def test_a_spec_sets_the_variables_that_the_library_reads_and_the_next_one_resets_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("_lib.providers._AS_STARTED", dict.fromkeys(VARIABLES))
    specs = "foreach:form2:blocks4", "foreach:form1", "foreach:form2:hints", "foreach:nopdl"
    variants = []
    gradients = Gradients(PAIR, torch.float32, CPU)
    for spec in specs:
        (provider,) = ours(spec, ["clipper"])
        assert (provider.key, provider.label) == (f"clipper/{spec}", f"ComponentClipper ({spec})")
        variants.append(runs.variant(provider, gradients, "all"))
    seen = []
    for one in variants:
        one.before(0)
        one.call()
        seen.append({variable: os.environ[variable] for variable in VARIABLES if variable in os.environ})
    assert seen == [
        {"CWCLIP_CUDA_FORM": "2", "CWCLIP_CUDA_BLOCKS_PER_SM": "4"},
        {"CWCLIP_CUDA_FORM": "1"},
        {"CWCLIP_CUDA_FORM": "2", "CWCLIP_CUDA_EVICT_HINTS": "1"},
        {"CWCLIP_CUDA_PDL": "0"},
    ]
    set_environment({})
    assert all(variable not in os.environ for variable in VARIABLES)
    for spec in ("cuda:form", "cuda:hints1", "cuda:pdl"):
        with pytest.raises(ValueError, match="is none of form, blocks with a number, as in form2, or hints, nopdl"):
            ours(spec)


def test_a_way_that_takes_too_long_on_a_set_can_sit_out_there() -> None:
    options = compare.parse(["--device", "cpu", "--torch", "loop,foreach", "--skip", "loop@lora-384,foreach@gpt2"])
    sets = "lora-384", "gpt2", "vit-b16"
    taking_part = {name: [p.key for p in chosen_torch(options, SETS[name])] for name in sets}
    assert taking_part == {"lora-384": ["foreach"], "gpt2": ["loop"], "vit-b16": ["loop", "foreach"]}
    for wrong in ("loop", "loop@lora", "clipper@lora-384"):
        with pytest.raises(SystemExit):
            compare.parse(["--skip", wrong])


def _options(**changed: object) -> Namespace:
    options = compare.parse(["--device", "cpu", "--rounds", "2", "--warmup", "1", "--rotate", "1"])
    return Namespace(**{**vars(options), **changed})


def test_a_way_that_fails_or_clips_wrong_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> None:
        raise RuntimeError("no such kernel\nat line 3")

    def doing(call: Callable[[], object]) -> Callable[..., Callable[[], object]]:
        return lambda named, cap: call

    ways = [Provider("idle", "does nothing", doing(lambda: None)), Provider("broken", "fails", doing(failing))]
    monkeypatch.setattr("_lib.options.TORCH", [*ways, TORCH[1]])
    skipped: list[str] = []
    options = _options(torch=("idle", "broken", "foreach"), clipped=("none", "all"))
    results = list(runs.measure_set(PAIR, torch.float32, clock_for(CPU), options, skipped))
    own = ["function/best", "clipper/best"]
    assert [[row.key for row in r.rows] for r in results] == [["idle", "foreach", *own], ["foreach", *own]]
    assert skipped[0] == "pair float32, none clipped, fails: RuntimeError: no such kernel"
    assert "all clipped, does nothing: wrong gradients in 3 of 3 tensors, first a.weight: norm" in skipped[1]


@pytest.mark.parametrize("backend", ["cuda"])  # conftest.py runs its kernels on the CPU where there is no GPU
def test_both_forms_are_measured_side_by_side(backend: str) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    specs = tuple(f"{backend}:form{form}:blocks2" for form in (1, 2))
    skipped: list[str] = []
    options = _options(device=device, backends=specs, calls=("clipper",), torch=("foreach",))
    results = list(runs.measure_set(PAIR, torch.float32, clock_for(device), options, skipped))
    if skipped:
        pytest.skip(skipped[0])
    assert [r.clipped for r in results] == ["none", "half", "all"]
    for result in results:
        assert [row.key for row in result.rows] == ["foreach", *(f"clipper/{spec}" for spec in specs)]
        assert all(len(row.samples_ms) == 2 for row in result.rows)


def test_metadata_names_the_gpu_and_what_ran_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    chip = SimpleNamespace(name="A GPU", total_memory=1, multi_processor_count=2, L2_cache_size=3, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: chip)
    monkeypatch.setenv("CWCLIP_CUDA_FORM", "2")
    found = machine.metadata(torch.device("cuda"))
    assert (found["gpu"], found["architecture"], found["CWCLIP_CUDA_FORM"]) == ("A GPU", "9.0", "2")
    assert found.keys() >= {"driver", "cuda", "nvcc", "torch", "triton", "python", "command", "date", "commit"}


# ------------------------------------------------------------------------------------------------------------
# Launches
# ------------------------------------------------------------------------------------------------------------


def _event(name: str, start: float, device: DeviceType = DeviceType.CPU) -> SimpleNamespace:
    span = SimpleNamespace(start=start, end=start + (10 if name == launches.LABEL else 1))
    return SimpleNamespace(name=name, device_type=device, time_range=span)


def test_kernels_copies_fills_and_waits_are_told_apart() -> None:
    on_gpu = ("sum_kernel", "scale_kernel", "Memcpy DtoH (Device -> Pinned)", "Memset (Device)", launches.LABEL)
    events = [_event(launches.LABEL, 100), *(_event(name, 103, DeviceType.CUDA) for name in on_gpu)]
    events += [_event("cudaLaunchKernel", 101), _event("cudaStreamSynchronize", 102)]
    events += [_event("cudaDeviceSynchronize", 99), _event("cudaDeviceSynchronize", 111)]  # the profiler's and ours
    activity = launches.count(events, torch_waits=False)
    assert activity == Activity(kernels=2, copies=1, fills=1, waits=1, torch_waits=False)
    assert str(activity) == "2 + 1 copy + 1 fill sync"
    assert str(Activity(1, 0, 0, 0, False)) == "1"


def test_the_sync_check_is_switched_off_again(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []

    def set_mode(mode: str) -> None:
        modes.append(mode)
        warnings.warn("prototype feature", UserWarning, stacklevel=2)  # as torch does

    def waiting() -> None:
        raise RuntimeError("called a synchronizing CUDA operation")

    def broken() -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    assert not launches.waits_by_torch(lambda: None)
    assert launches.waits_by_torch(waiting)
    with pytest.raises(RuntimeError, match="something else"):
        launches.waits_by_torch(broken)
    assert modes == ["error", "default"] * 3


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
def test_counting_goes_through_torchs_profiler_and_leaves_slow_calls_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "waits_by_torch", lambda call: call() is launches)  # that is, never
    options = _options(torch=("loop", "foreach"), clipped=("all",))
    (result,) = runs.measure_set(PAIR, torch.float32, clock_for(CPU), options, [])
    rows = [replace(row, host_ms=200.0 if row.key == "loop" else 0.1) for row in result.rows]
    found = runs.count_launches(PAIR, torch.float32, options, [replace(result, rows=rows)])
    assert (found.set, found.dtype, found.clipped) == ("pair", "float32", "all")
    assert list(found.by_provider) == ["foreach", "function/best", "clipper/best"]
    if not torch.cuda.is_available():
        assert set(found.by_provider.values()) == {Activity(0, 0, 0, 0, False)}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
def test_launches_of_known_calls_on_a_gpu() -> None:
    x = torch.ones(8, device="cuda")
    two = launches.activity_of(lambda: None, lambda: x.mul_(2).add_(1))
    assert (two.kernels, two.waits, two.torch_waits) == (2, 0, False)
    assert launches.activity_of(lambda: None, x.max().item).torch_waits


# ------------------------------------------------------------------------------------------------------------
# DRAM bytes
# ------------------------------------------------------------------------------------------------------------

COLUMNS = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size",'
    '"Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"'
)


def _row(identifier: int, kernel: str, metric: str, value: str, unit: str = "byte") -> str:
    cells = [identifier, 4711, "python3.12", "127.0.0.1", kernel, 1, 7, "(256, 1, 1)", "(396, 1, 1)", 0, "9.0"]
    cells += ["Command line profiler metrics", metric, unit, value]
    return ",".join(f'"{cell}"' for cell in cells)


def _sample(clips: int) -> str:
    """ncu's answer to as many clips, each of two kernels: 13 MB read, 12 MB written."""
    lines = ["==PROF== Connected to process 4711 (/usr/bin/python3.12)", COLUMNS]
    for clip in range(clips):
        names = ("spin_kernel(long)", "void cwclip::cuda::clip_kernel<(cwclip::Order)1, 464>(Call)", "scale_kernel")
        amounts = (("0", "0"), ("12,500,000", "512"), ("0.5", "12"))
        for index, (name, (read, written)) in enumerate(zip(names, amounts, strict=True)):
            identifier = 3 * clip + index
            lines.append(_row(identifier, name, traffic.READ, read, "Mbyte" if read == "0.5" else "byte"))
            lines.append(f"==PROF== something in between {identifier}")
            lines.append(_row(identifier, name, traffic.WRITE, written, "Mbyte" if written == "12" else "byte"))
    return "\n".join([*lines, "==PROF== Disconnected"]) + "\n"


def test_ncu_csv_is_read_with_its_units_and_split_at_the_markers() -> None:
    steps = traffic.by_step(traffic.kernels_in(_sample(2)))
    assert [[(k.read, k.written) for k in step] for step in steps] == [[(12.5e6, 512.0), (0.5e6, 12e6)]] * 2
    assert steps[0][0].name.startswith("void cwclip::cuda::clip_kernel<(cwclip::Order)1, 464>")
    assert traffic.kernels_in("") == []
    with pytest.raises(ValueError, match="'sector'"):
        traffic.kernels_in("\n".join([COLUMNS, _row(0, "k", traffic.READ, "1", "sector")]))


FAKE_NCU = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do
  [[ $1 == --log-file ]] && log=$2
  [[ $1 == --csv ]] || shift
  shift
done
"$@" || exit
cp {sample} "$log"
"""
TINY = ["--device", "cpu", "--sets", "lora-384", "--clipped", "all", "--backends", "foreach", "--torch", "tolist"]


def _fake_ncu(folder: Path, sample: str) -> list[str]:
    (folder / "sample").write_text(sample)
    fake = _program(folder / "ncu", FAKE_NCU.format(sample=folder / "sample"))
    return [*TINY, "--ncu", str(fake), "--csv", str(folder / "ncu.csv")]


def _program(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_traffic_runs_itself_under_ncu_and_compares_with_the_floor(tmp_path: Path) -> None:
    script = [sys.executable, str(BENCHMARKS / "traffic.py"), *_fake_ncu(tmp_path, _sample(2))]
    done = subprocess.run(script, capture_output=True, text=True, check=False, env=HERE)
    assert done.returncode == 0, done.stdout + done.stderr
    # N is 12.58 MB: 13 read, 12 written, and 2 N is the least.
    row = re.search(r"ComponentClipper \(foreach\)(.*)", done.stdout)
    assert row is not None
    assert row[1].split() == ["2", "1.03", "0.95", "1.99", "2.00", "101%"]


def test_traffic_says_what_ncu_did_not_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="no nowhere/ncu here"):
        traffic.main([*TINY, "--ncu", "nowhere/ncu"])
    monkeypatch.setattr(subprocess, "run", lambda command, check: _refused(tmp_path / "ncu.csv"))
    with pytest.raises(SystemExit, match=r"ncu \(exit 1\) saw 0 of 2 clips\n==ERROR== ERR_NVGPUCTRPERM"):
        traffic.main(_fake_ncu(tmp_path, ""))
    assert "DRAM" not in capsys.readouterr().out


def _refused(log: Path) -> SimpleNamespace:
    log.write_text("==ERROR== ERR_NVGPUCTRPERM - no permission to access performance counters\n")
    return SimpleNamespace(returncode=1)
