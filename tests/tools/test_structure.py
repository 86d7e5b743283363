"""The house rules: imports run one way, importing is cheap and needs torch alone, every example runs."""

import doctest
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cwclip_kernels
from package_imports import faults_of, files_of, name_of
from pages import PAGES

PACKAGE = Path(cwclip_kernels.__file__).parent
TRAINERS = ("accelerate", "deepspeed", "fabric", "lightning", "timm", "torchtitan", "transformers")

# The package, read from the bottom: a file may import those above it in this list, and no other.
ORDER = [
    name
    for line in """
    _C _version arguments result
    core/modes core/formula core/identity
    components/naming components/grouping components/patterns components/membership components/parameters
    components/gradients
    components/spec
    thresholds/base thresholds/constant thresholds/schedule thresholds/adaptive thresholds/by_pattern
    thresholds/bounded thresholds/learning thresholds/__init__
    distributed/shards components/resolve
    kernels/tile kernels/combine kernels/power_sums kernels/coefficients kernels/scale kernels/clip
    kernels/adamw kernels/adamw_single
    backends/served core/checks core/loss_scale backends/memory backends/native core/bucket core/adamw
    reference backends/foreach backends/programs backends/cpu backends/cuda_step backends/cuda
    backends/triton_tables backends/triton backends/triton_step backends/registry
    core/options core/plan core/run
    distributed/elsewhere distributed/groups distributed/units distributed/reduction distributed/local
    distributed/partitions distributed/reduction_plan distributed/set_up distributed/run
    core/caps core/session core/cache core/traced core/traced_scaling core/parameter_clipper
    core/differentiable core/partitioned_clipper core/optimizers
    handle attachment clipper
    optim/clipping optim/checkpoints optim/update optim/traced optim/adamw optim/__init__
    in_backward/checks in_backward/passes in_backward/hooks in_backward/steps in_backward/clipping
    in_backward/__init__
    functional gradients grad_scaler
    telemetry/trackers telemetry/writers telemetry/to_host telemetry/live telemetry/recorder
    telemetry/runs telemetry/plots telemetry/caps telemetry/suggestion telemetry/status telemetry/__init__
    integrations/_common integrations/_patch integrations/timm integrations/torchtitan
    integrations/deepspeed/internals/base integrations/deepspeed/internals/zero
    integrations/deepspeed/internals/whole integrations/deepspeed/internals/engine
    integrations/deepspeed/internals/checkpoints integrations/deepspeed/internals/experts
    integrations/deepspeed/internals/own_clipping integrations/deepspeed/internals/__init__
    integrations/deepspeed/clipping integrations/deepspeed/__init__ integrations/accelerate
    integrations/fabric
    integrations/transformers/step_log integrations/transformers/reporters
    integrations/transformers/engine integrations/transformers/clipping
    integrations/transformers/callback integrations/transformers/mixin integrations/transformers/log
    integrations/transformers/__init__
    integrations/lightning/clipping integrations/lightning/engine integrations/lightning/callback
    integrations/lightning/__init__
    commands/__init__ commands/bench commands/doctor
    __init__ __main__
""".splitlines()
    for name in line.split()
]


@pytest.mark.parametrize("path", files_of(PACKAGE), ids=lambda path: name_of(path, PACKAGE))
def test_imports_run_one_way(path):
    assert not faults_of(path, PACKAGE, ORDER)


def test_the_list_names_each_file_once():
    assert len(ORDER) == len(set(ORDER))
    assert set(ORDER) <= {name_of(path, PACKAGE) for path in files_of(PACKAGE)}


# Each a made-up file beside "base", which imports nothing, and "user", which imports base.
@pytest.mark.parametrize(
    ("file", "source", "fault"),
    [
        ("base.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .user import B", "import user"),
        ("base.py", "def later():\n    from made_up import user", "import user"),
        ("base.py", "import made_up.user", "import user"),
        ("base.py", "from . import base", "import base"),
        ("base.py", "from .room import inside", "import room/inside"),
        ("room/inside.py", "from ..user import B", "import user"),
        ("new.py", "", "new is not in the list"),
        ("room/__init__.py", "from .inside import C", "room/__init__ is not in the list"),
        ("room/__init__.py", "", None),
        ("user.py", "from .room.inside import C\nimport torch", None),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path, file, source, fault):
    package = tmp_path / "made_up"
    (package / "room").mkdir(parents=True)
    files = {
        "base.py": "class A: ...",
        "room/inside.py": "class C: ...",
        "user.py": "from .base import A\nclass B: ...",
    }
    for name, text in {**files, file: source}.items():
        (package / name).write_text(text)
    found = faults_of(package / file, package, ["base", "room/inside", "user"])
    assert [text.rpartition("may not ")[2] for text in found] == ([] if fault is None else [fault])


def test_tests_import_nothing_from_one_another():
    """What they share lies in _support."""
    tests = PACKAGE.parent / "tests"
    for path in tests.rglob("*.py"):
        assert not re.search(r"^\s*(from|import) (test_|conftest)", path.read_text(), re.M), path


def module_of(path: Path) -> str:
    return ".".join(["cwclip_kernels", *name_of(path, PACKAGE).split("/")]).removesuffix(".__init__")


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


# Modules with an example in some docstring.
EXAMPLES = [module_of(path) for path in files_of(PACKAGE) if ">>> " in path.read_text()]
# What may not be installed, and whose examples then can't run.
OPTIONAL = ("accelerate", "deepspeed", "lightning", "matplotlib", "tensorboard", "transformers")


def imported(name):
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in OPTIONAL:
            raise
        pytest.skip(f"{name} needs {error.name}")


@pytest.mark.filterwarnings(r"ignore:.*isinstance\(treespec, LeafSpec\)")  # of Lightning
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_in_docstrings(name):
    torch.manual_seed(0)
    result = doctest.testmod(imported(name), optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0


# The modules that users import from; trainers' each by itself.
PUBLIC = [
    *("cwclip_kernels", *(f"cwclip_kernels.{name}" for name in ("in_backward", "optim", "telemetry", "thresholds"))),
    *(f"cwclip_kernels.integrations.{name}" for name in TRAINERS),
]
# Whose docstring needs neither an example nor fields.
PLAIN = {"Threshold", "plot_run", "read_run"}
# Examples use what is returned, or derived from, without naming it.
UNNAMED = {
    *("BackwardClipping", "ClipResult", "EngineClipping", "FabricClipping", "Run", "Setting", "SuggestedCap"),
    "Suggestion",
}


def public_names(module):
    """Its ``__all__``; without one, what it defines but for the check that Accelerate's and transformers' share."""
    defined = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    public = [name for name in defined if not name.startswith("_") and name != "check_gradients_are_here"]
    return getattr(module, "__all__", public)


@pytest.mark.filterwarnings(r"ignore:.*isinstance\(treespec, LeafSpec\)")
@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_thing_has_an_example_or_fields_and_is_shown(name):
    module = imported(name)
    names = set(public_names(module)) - {"__version__"}
    assert names
    examples = [line for path in files_of(PACKAGE) for line in path.read_text().splitlines() if ">>> " in line]
    shown = set(re.findall(r"\w+", "\n".join([*examples, *(page.read_text() for page in PAGES)])))
    for public in names:
        doc = inspect.getdoc(getattr(module, public)) or ""
        assert public in PLAIN or any(mark in doc for mark in (">>> ", "Example:", "Attributes:")), public
        assert public in UNNAMED or public in shown, f"{public} is neither on a page nor in an example"


def test_files_stay_readable():
    root = PACKAGE.parent
    for pattern in ("cwclip_kernels/**/*.py", "csrc/**/*", "tests/**/*.py", "benchmarks/**/*.py", "examples/**/*.py"):
        for path in root.glob(pattern):
            if path.is_file():
                assert len(path.read_text().splitlines()) <= 400, path
