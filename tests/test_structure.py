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

# A module may import from those of lower rank only. What isn't listed has no rank and fails the test.
RANKS = [
    {"_version", "formula", "messages", "modes", "native", "result"},
    {"naming"},
    {"components"},
    {"caps", "gradients", "kernels", "sharding", "spec"},
    {"resolve", "scaled_loss", "telemetry", "thresholds"},
    {"bucket"},
    {"reference", "backends"},
    {"dispatch"},
    {"plan"},
    {"execute"},
    {"distributed"},
    {"bound"},
    {"engine"},
    {"compiled", "backward_hooks"},
    {"attach", "backward_checks", "backward_pass"},
    {"backward_steps"},
    {"clipper"},
    {"api", "grad_scaler", "in_backward"},
    {"integrations"},
    {"__init__"},
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}


def imports_of(path: Path) -> set[str]:
    """First parts of the package's own modules that a file imports, type-checking blocks apart."""
    own = path.relative_to(PACKAGE).parts
    tree = ast.parse(path.read_text())
    skipped = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node in skipped or not node.level:
            continue
        base = own[: len(own) - node.level]
        parts = (*base, *(node.module.split(".") if node.module else ()))
        found |= (
            {parts[0]} if parts else {alias.name for alias in node.names if alias.name in RANK or alias.name == "_C"}
        )
    return found - {"_C"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for other in imports_of(path) - {own}:
        assert RANK[other] < RANK[own], f"{own} may not import {other}"


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
    *(f"cwclip_kernels.{name}" for name in ("api", "backward_hooks", "clipper", "grad_scaler", "in_backward")),
    *(f"cwclip_kernels.{name}" for name in ("spec", "thresholds")),
    *(f"cwclip_kernels.integrations.{name}" for name in ("accelerate", "lightning", "timm", "torchtitan")),
    *(
        f"cwclip_kernels.integrations.{name}"
        for name in ("_already", "_learning", "_trainer_callback", "transformers")
    ),
    *(f"cwclip_kernels.thresholds.{name}" for name in ("adaptive", "static")),
    *(f"cwclip_kernels.telemetry.{name}" for name in ("recorder", "status")),
]


@pytest.mark.filterwarnings(r"ignore:.*isinstance\(treespec, LeafSpec\)")  # of Lightning
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_in_docstrings(name):
    import torch

    if name.endswith(("._trainer_callback", ".transformers")):
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
    for pattern in ("cwclip_kernels/**/*.py", "csrc/**/*", "tests/*.py", "benchmarks/*.py", "examples/**/*.py"):
        for path in root.glob(pattern):
            if path.is_file():
                assert len(path.read_text().splitlines()) <= 400, path
