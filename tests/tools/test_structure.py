"""The house rules: imports run one way, importing is cheap and needs torch alone, every example runs."""

import ast
import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import cwclip_kernels
from cwclip_kernels import telemetry

PACKAGE = Path(cwclip_kernels.__file__).parent

# The package, read from the bottom: a file may import those above it in this list, and no other.
ORDER = [
    name
    for line in """
    _C _version arguments result
    core/modes core/formula
    components/naming components/grouping components/patterns components/membership components/parameters
    components/spec
    thresholds/base thresholds/constant thresholds/schedule thresholds/adaptive thresholds/__init__
    distributed/shards components/resolve
    kernels/tile kernels/combine kernels/power_sums kernels/scale
    backends/served core/checks core/loss_scale backends/memory backends/native core/bucket
    reference backends/foreach backends/programs backends/cpu backends/cuda
    backends/triton_tables backends/triton backends/registry
    core/options core/plan core/run
    distributed/groups distributed/reduction distributed/local distributed/reduction_plan
    distributed/set_up distributed/run
    core/caps core/session core/cache core/traced core/parameter_clipper core/optimizers
    handle attachment clipper
    in_backward/checks in_backward/passes in_backward/hooks in_backward/steps in_backward/clipping
    in_backward/__init__
    functional grad_scaler
    telemetry/writers telemetry/recorder telemetry/runs telemetry/plots telemetry/status telemetry/__init__
    integrations/_common integrations/_patch integrations/accelerate integrations/timm integrations/torchtitan
    integrations/transformers/clipping integrations/transformers/callback integrations/transformers/mixin
    integrations/transformers/__init__
    integrations/lightning/clipping integrations/lightning/callback
    integrations/lightning/__init__
    __init__ __main__
""".splitlines()
    for name in line.split()
]
RANK = {name: rank for rank, name in enumerate(ORDER)}


def imports_of(path: Path) -> set[str]:
    """The package's own files that a file imports, for types alone or not."""
    package = path.relative_to(PACKAGE).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = PACKAGE.joinpath(*package[: len(package) - node.level + 1], *(node.module or "").split("."))
            for name in [alias.name for alias in node.names]:
                module = next(
                    p
                    for p in (
                        base / f"{name}.py",
                        base / f"{name}.pyi",
                        base / name / "__init__.py",
                        base.with_suffix(".py"),
                        base / "__init__.py",
                    )
                    if p.is_file()
                )
                found.add(name_of(module))
    return found


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE).with_suffix(""))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    if path.name == "__init__.py" and name_of(path) not in RANK:
        assert not imports_of(path)
        return
    for other in imports_of(path):
        assert RANK[other] < RANK[name_of(path)], f"{name_of(path)} may not import {other}"


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_loads_neither_triton_nor_the_extension_nor_anything_optional():
    heavy = ("triton", "cwclip_kernels._C", "transformers", "lightning", "matplotlib", "rich", "pytest")
    # What torch itself imports is not ours to answer for.
    code = f"""
import sys, torch
before = set(sys.modules)
import cwclip_kernels
print([m for m in {heavy} if m in set(sys.modules) - before])
"""
    assert run(code).strip() == "[]"


def test_works_without_triton_and_without_the_extension():
    code = """
import sys
sys.modules["triton"] = None
sys.modules["cwclip_kernels._C"] = None
import torch, cwclip_kernels
p = torch.nn.Parameter(torch.zeros(2)); p.grad = torch.tensor([3.0, 4.0])
assert cwclip_kernels.fused_component_clip_([p], 1.0).item() == 5.0
print(cwclip_kernels.ComponentClipper([p], 1.0).explain())
for name in ("cpu", "triton"):
    try:
        cwclip_kernels.fused_component_clip_([p], 1.0, backend=name)
    except RuntimeError as error:
        print(error)
    else:
        raise SystemExit(f"{name} was replaced silently")
"""
    text = run(code)
    assert "'foreach' (cpu the compiled extension is missing" in text
    assert "backend='cpu' the compiled extension is missing" in text
    assert "backend='triton'" in text


def test_report_of_the_machine():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "cwclip_kernels"], capture_output=True, text=True, check=True
    )
    assert f"cwclip_kernels {cwclip_kernels.__version__}" in done.stdout
    for name in ("cpu", "triton", "foreach", "reference"):
        assert any(line.split()[:1] == [name] for line in done.stdout.splitlines())
    assert "yes, the default here" in done.stdout


EXAMPLES = [
    "cwclip_kernels",
    *(f"cwclip_kernels.{name}" for name in ("functional", "clipper", "grad_scaler", "result")),
    *(
        f"cwclip_kernels.{name}"
        for name in ("components.spec", "in_backward.hooks", "in_backward.clipping", "thresholds")
    ),
    *(f"cwclip_kernels.integrations.{name}" for name in ("accelerate", "timm", "torchtitan")),
    *(f"cwclip_kernels.integrations.lightning.{name}" for name in ("callback",)),
    *(f"cwclip_kernels.integrations.transformers.{name}" for name in ("callback", "mixin")),
    *(f"cwclip_kernels.thresholds.{name}" for name in ("adaptive", "constant")),
    *(f"cwclip_kernels.telemetry.{name}" for name in ("recorder", "status")),
]


@pytest.mark.filterwarnings(r"ignore:.*isinstance\(treespec, LeafSpec\)")  # of Lightning
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_in_docstrings(name):
    import torch

    if ".transformers." in name:
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0


def test_every_public_thing_has_an_example_or_fields():
    for package in (cwclip_kernels, cwclip_kernels.thresholds, telemetry):
        for name in set(package.__all__) - {"__version__", "Threshold", "plot_run", "read_run"}:
            doc = getattr(package, name).__doc__
            assert ">>>" in doc or "Attributes:" in doc, name


def test_files_stay_readable():
    root = PACKAGE.parent
    for pattern in ("cwclip_kernels/**/*.py", "csrc/**/*", "tests/**/*.py", "benchmarks/**/*.py", "examples/**/*.py"):
        for path in root.glob(pattern):
            if path.is_file():
                assert len(path.read_text().splitlines()) <= 400, path
