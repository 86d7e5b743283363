"""benchmarks/gpu_run.sh, with stand-ins for python and for the tools that a machine with a GPU has."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich.console")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))  # they are scripts beside one another, not a package

import compare  # noqa: E402
import extras  # noqa: E402
import optimizer_step  # noqa: E402
import traffic  # noqa: E402

SCRIPT = BENCHMARKS / "gpu_run.sh"
HERE = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # the package may not be installed
CALLS = {
    "check": ("build", "tests", "sanitize"),
    "speed": ("build", "bench", "sweep", "step"),
    "detail": ("build", "extras", "ncu"),
}
STAGES = tuple(dict.fromkeys(stage for stages in CALLS.values() for stage in stages))
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")

FAKE_PYTHON = """#!/usr/bin/env bash
echo "$@" >>"$SEEN"
case "$*" in
  *get_device_capability*) echo 9.0 ;;
  *setup.py*) echo "building for $TORCH_CUDA_ARCH_LIST, $CWCLIP_BUILD" ;;
  *"import xdist"*) exit "${NO_XDIST:-0}" ;;
  "-m pytest"*) echo "REQUIRE_GPU=$CWCLIP_REQUIRE_GPU"; echo "2 failed, 40 passed in 9s"; exit "${PYTEST_EXIT:-0}" ;;
  *sweep.json*) sleep "${SWEEP_SLEEP:-0}" ;;
  *bench.json*) seq 10000; echo "the last line" ;;
esac
"""
# Runs the program, and finds nothing; racecheck finds what the test wants.
FAKE_SANITIZER = """#!/usr/bin/env bash
echo "compute-sanitizer $@" >>"$SEEN"
tool=$2
while [[ $1 != */python3 ]]; do shift; done
"$@"
status=$?
if [[ $tool == racecheck ]]; then
  echo "========= RACECHECK SUMMARY: ${HAZARDS:-0} hazards displayed (${HAZARDS:-0} errors, 0 warnings)"
  exit $((${HAZARDS:-0} ? 86 : status))
fi
echo "========= ERROR SUMMARY: 0 errors"
exit "$status"
"""
FAKE_PROGRAM = """#!/usr/bin/env bash
echo "${0##*/} $@" >>"$SEEN"
echo "of ${0##*/}"
"""


def _program(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Run:
    """A run of the script: exit status, output, status of each stage, and what was called."""

    def __init__(self, folder: Path, *arguments: str, tools: bool = True, **environment: str) -> None:
        programs, calls = folder / "bin", folder / "calls"
        _program(programs / "python3", FAKE_PYTHON)
        fakes = {"compute-sanitizer": FAKE_SANITIZER, "ncu": FAKE_PROGRAM, "nvidia-smi": FAKE_PROGRAM}
        for name, text in fakes.items():
            (programs / name).unlink(missing_ok=True)
            if tools:
                _program(programs / name, text)
        calls.unlink(missing_ok=True)
        calls.touch()
        env = {"PATH": f"{programs}:/usr/bin:/bin", "SEEN": str(calls), **environment}
        script = ["bash", str(SCRIPT), *([str(folder / "out")] if arguments else []), *arguments]
        done = subprocess.run(script, capture_output=True, text=True, check=False, env=env)
        summary = folder / "out" / "summary.txt"
        lines = summary.read_text().splitlines() if summary.exists() else []
        self.status, self.output = done.returncode, done.stdout + done.stderr
        self.stages = {line[:9].strip(): line[10:26].strip() for line in lines}
        self.calls = calls.read_text().splitlines()
        self.files = {path.name for path in (folder / "out").glob("*")}


def test_script_parses() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    assert os.access(SCRIPT, os.X_OK)


def _numbers(array: str) -> dict[str, int]:
    """A line of the script that declares an array of numbers."""
    line = re.search(rf"^declare -A {array}=\((.*)\)$", SCRIPT.read_text(), re.M)
    assert line is not None
    return {name: int(number) for name, number in re.findall(r"\[(\w+)\]=(\d+)", line[1])}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_ends_within_nine_minutes_and_its_output_can_be_seen(call: str) -> None:
    limits, shown = _numbers("LIMITS"), _numbers("SHOWN")
    assert tuple(limits) == tuple(shown) == STAGES
    assert sum(limits[stage] + 3 for stage in CALLS[call]) < 530  # with timeout's --kill-after
    # Its own lines: four that say where it ran, and three for each stage.
    assert sum(shown[stage] for stage in CALLS[call]) + 80 * (4 + 3 * len(CALLS[call])) <= 12_000


def test_the_readme_names_calls_and_stages() -> None:
    readme = (BENCHMARKS / "README.md").read_text()
    assert [name for name in re.findall(r"^\| `(\w+)` \|", readme, re.M) if name in STAGES] == list(STAGES)
    assert re.findall(r"gpu_run.sh \$OUT (\w+)", readme)[:3] == list(CALLS)


def test_files_that_the_script_names_exist() -> None:
    named = re.findall(r"(?:tests|benchmarks)/[\w/]+\.(?:py|sh)", SCRIPT.read_text())
    assert len(named) > 10
    assert [path for path in named if not (BENCHMARKS.parent / path).is_file()] == []


@pytest.mark.parametrize("call", CALLS)
def test_every_stage_of_a_call_runs(tmp_path: Path, call: str) -> None:
    run = Run(tmp_path, call)
    assert (run.status, run.stages) == (0, dict.fromkeys(CALLS[call], "passed")), run.output
    assert "building for 9.0, cuda" in run.output
    assert "of nvidia-smi" in run.output
    assert run.files == {"run.log", "summary.txt"}
    assert len(run.output) < 12_000
    assert run.output.rstrip().splitlines()[-1].split()[:2] == [CALLS[call][-1], "passed"]


def test_the_end_of_a_stages_output_is_shown_and_all_of_it_kept(tmp_path: Path) -> None:
    run = Run(tmp_path, "bench")
    assert "\nthe last line" in run.output
    assert "\n77\n" not in run.output
    assert "\n77\n" in (tmp_path / "out" / "run.log").read_text()


def test_a_stage_that_fails_stops_no_other(tmp_path: Path) -> None:
    run = Run(tmp_path, "check", PYTEST_EXIT="1")
    assert (run.status, run.stages) == (
        1,
        {"build": "passed", "tests": "failed, exit 1", "sanitize": "failed, exit 1"},
    )
    # A tool that finds nothing says so, whatever the tests did.
    for tool in TOOLS:
        line = rf"{tool}: =+ .*SUMMARY: 0 .*; tests: 2 failed, 40 passed in 9s \(exit 1\)"
        assert re.search(line, run.output), tool


def test_what_a_sanitizer_finds_is_a_failure_though_tests_pass(tmp_path: Path) -> None:
    run = Run(tmp_path, "sanitize", HAZARDS="3")
    assert (run.status, run.stages) == (1, {"sanitize": "failed, exit 1"})
    assert "racecheck: ========= RACECHECK SUMMARY: 3 hazards displayed" in run.output
    assert "memcheck: ========= ERROR SUMMARY: 0 errors; tests: 2 failed, 40 passed in 9s (exit 0)" in run.output


def test_a_missing_tool_is_no_failure(tmp_path: Path) -> None:
    run = Run(tmp_path, "sanitize", "ncu", "build", tools=False)
    assert (run.status, run.stages) == (0, {"sanitize": "not here", "ncu": "not here", "build": "passed"})


def test_tests_run_without_plugins_that_happen_to_be_there(tmp_path: Path) -> None:
    script = SCRIPT.read_text()
    assert "export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1" in script
    (with_xdist,) = (line for line in Run(tmp_path, "tests").calls if "-m pytest" in line)
    (without,) = (line for line in Run(tmp_path, "tests", NO_XDIST="1").calls if "-m pytest" in line)
    assert with_xdist == without.replace("-W default ", "-W default -p xdist.plugin -n 8 --dist worksteal ")
    (under_memcheck,) = (line for line in Run(tmp_path, "sanitize").calls if "--tool memcheck" in line)
    assert under_memcheck.endswith("-m sanitized -k not(triton)")


def test_arguments_of_the_stages_are_ones_that_the_scripts_take(tmp_path: Path) -> None:
    calls = [line.split() for line in [*Run(tmp_path, "speed").calls, *Run(tmp_path, "detail").calls]]
    given = {Path(words[-1]).name: words[1:] for words in calls if {"--json", "--csv"} & {*words}}
    assert compare.parse(given["roofline.png"]).backends is None  # all that there is on a GPU
    sweep = compare.parse(given["sweep.json"])
    assert len(set(sweep.backends)) == 8
    assert sweep.torch == ()
    for dtype in ("float32", "bfloat16"):
        step = optimizer_step.parse(given[f"step_{dtype}.json"])
        assert (step.backends, step.dtype, step.state_dtype) == (("cuda", "triton"), dtype, "float32")
    assert extras.parse(given["extras.json"]).set == "bert-base"
    profiled = traffic._parse(given["ncu.csv"])
    assert profiled.torch == ()
    assert profiled.backends == ("cuda:form1", "cuda:form2", "triton")


def test_a_stage_that_takes_too_long_is_ended_and_said_to_be(tmp_path: Path) -> None:
    run = Run(tmp_path, "sweep", "tests", LIMIT="1", SWEEP_SLEEP="30")
    assert (run.status, run.stages) == (1, {"sweep": "out of time", "tests": "passed"})
    assert Run(tmp_path, "bench", TOTAL="5").stages == {"bench": "out of time"}


@pytest.mark.parametrize("arguments", [(), ("benches",), ("check", "x")])
def test_script_explains_itself(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    run = Run(tmp_path, *arguments)
    assert (run.status, run.calls) == (2, [])
    assert "gpu_run.sh OUT check|speed|detail" in run.output
    assert f"gpu_run.sh OUT {'|'.join(STAGES)}..." in run.output


@pytest.mark.slow
def test_the_bench_stage_runs_for_real_on_a_cpu(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    tiny = "--device cpu --sets lora-384 --rounds 1 --warmup 1 --rotate 1 --clipped all --torch foreach"
    env = {**HERE, "PYTHON": sys.executable, "BENCH_ARGS": tiny + " --backends best,foreach"}
    out = tmp_path / "out"
    done = subprocess.run(["bash", SCRIPT, out, "bench"], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in out.iterdir()} == {"run.log", "summary.txt", "bench.json", "roofline.png"}
    assert re.search(r"lora-384 float32 +all +12\.58 +[\d.]+ ", done.stdout)
