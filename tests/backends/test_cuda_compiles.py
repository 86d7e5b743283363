"""What nvcc makes of the CUDA kernels, on machines that have it: no GPU needed."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "csrc/cuda/launch.cu"
TARGETS = (80, 90, 100)  # what wheels are built for
THREADS, BLOCKS = 288, 3  # of a block; blocks that shall fit on a processor (csrc/cuda/kernels.cuh)
REGISTERS = 65536 // (THREADS * BLOCKS) // 8 * 8
SUM_LOADS, SCALE_LOADS, DTYPES = 8, 4, 4  # csrc/cuda/elements.cuh


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What the assembler said about each kernel on each target, and the assembly of each target."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    folder = tmp_path_factory.mktemp("nvcc")
    command = ["nvcc", "-c", "-std=c++17", "-O3", "--expt-relaxed-constexpr", "--threads", "0", "-Xptxas", "-v"]
    command += [f"-gencode=arch=compute_{target},code=sm_{target}" for target in TARGETS]
    command += [
        "-Werror",
        "all-warnings",
        "--keep",
        "--keep-dir",
        str(folder),
        str(SOURCE),
        "-o",
        str(folder / "o.o"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reports = re.findall(
        r"Compiling entry function '(\w+)' for 'sm_(\d+)'\s.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads\s.*?Used (\d+) registers",
        done.stderr + done.stdout,
        re.DOTALL,
    )
    assembly = {target: next(folder.glob(f"*compute_{target}*.ptx")).read_text() for target in TARGETS}
    return reports, assembly


def kernels_of(assembly: str) -> dict[str, str]:
    parts = re.split(r"\.visible \.entry (\w+)", assembly)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_nothing_on_the_stack_and_registers_as_budgeted(compiled):
    reports, assembly = compiled
    assert len(reports) == sum(len(kernels_of(text)) for text in assembly.values())
    for name, target, stack, stores, loads, registers in reports:
        assert (stack, stores, loads) == ("0", "0", "0"), f"{name} for sm_{target}"
        assert int(registers) <= REGISTERS, f"{name} for sm_{target}: {registers} registers"


def test_gradients_move_sixteen_bytes_at_a_time(compiled):
    _, assembly = compiled
    for target, text in assembly.items():
        # Three orders of the norm for each of three kinds of launch that measure, two kinds that measure and scale at
        # once, three kinds that scale, and the list.
        kernels = kernels_of(text)
        assert len(kernels) == 3 * 3 + 3 * 2 + 3 + 1
        for name, body in kernels.items():
            if "list_kernel" in name:
                continue
            mode = int(re.search(r"4ModeE(\d)E", name)[1])  # sum, scale, both
            reads = len(re.findall(r"ld\.global\.cg\.v4\.u32", body))
            rereads = len(re.findall(r"ld\.global\.cs\.v4\.u32", body))
            writes = len(re.findall(r"st\.global\.cs\.v4\.u32", body))
            assert reads >= (SUM_LOADS * DTYPES if mode != 1 else 0), f"{name} for sm_{target}"
            assert rereads == writes == (SCALE_LOADS * DTYPES if mode != 0 else 0), f"{name} for sm_{target}"
