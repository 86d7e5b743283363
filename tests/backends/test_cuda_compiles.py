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
STEP_THREADS, STEP_BLOCKS, STEP_BLOCKS_WITH_GAPS = 256, 3, 2  # csrc/cuda/adamw.cuh


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
        assert int(registers) <= registers_of(name, target), f"{name} for sm_{target}: {registers} registers"


def registers_of(kernel: str, target: str) -> int:
    """As many as a thread may have, for as many blocks on a processor as are meant to be there."""
    if "step_kernel" not in kernel:
        return REGISTERS
    blocks = STEP_BLOCKS_WITH_GAPS if "Lb1E" in kernel or int(target) >= 100 else STEP_BLOCKS
    return 65536 // (STEP_THREADS * blocks) // 8 * 8


def test_gradients_move_sixteen_bytes_at_a_time(compiled):
    _, assembly = compiled
    for target, text in assembly.items():
        # Three orders of the norm for each of three kinds of launch that measure, two kinds that measure and scale at
        # once, three kinds that scale, and the list; three kinds that step, and what comes before.
        kernels = kernels_of(text)
        assert len(kernels) == 3 * 3 + 3 * 2 + 3 + 1 + 3 + 1
        for name, body in kernels.items():
            if "clip_kernel" not in name:
                continue
            mode = int(re.search(r"4ModeE(\d)E", name)[1])  # sum, scale, both
            reads = len(re.findall(r"ld\.global\.cg\.v4\.u32", body))
            rereads = len(re.findall(r"ld\.global\.cs\.v4\.u32", body))
            writes = len(re.findall(r"st\.global\.cs\.v4\.u32", body))
            assert reads >= (SUM_LOADS * DTYPES if mode != 1 else 0), f"{name} for sm_{target}"
            assert rereads == writes == (SCALE_LOADS * DTYPES if mode != 0 else 0), f"{name} for sm_{target}"


def test_steps_move_sixteen_bytes_at_a_time(compiled):
    """Eight of half-precision tensors, beside sixteen of others: as many elements of each."""
    _, assembly = compiled
    streams = 4  # g, p, m, v; and w with amsgrad
    for target, text in assembly.items():
        kernels = {name: body for name, body in kernels_of(text).items() if "step_kernel" in name}
        assert len(kernels) == 3
        for name, body in kernels.items():
            reads = {width: len(re.findall(rf"ld\.global\.cs\.v{width}\.u32", body)) for width in (2, 4)}
            writes = {width: len(re.findall(rf"st\.global\.cs\.v{width}\.u32", body)) for width in (2, 4)}
            # Two packets of each stream in flight, or one with amsgrad, and of float64. Half-precision parameters
            # themselves are never read in sixteen bytes, other tensors beside them may be of either width. More where
            # the compiler has made two of one loop.
            whole, alike = 2 * streams + streams + 1, 2 * (streams - 1) + streams
            assert reads[4] >= whole + (streams + streams + 1) + 2 * alike, f"{name} for sm_{target}"
            assert reads[2] >= 2 * whole, f"{name} for sm_{target}"
            whole, alike = 2 * (streams - 1) + streams, 2 * (streams - 2) + streams - 1
            assert writes[4] >= whole + (streams - 1 + streams) + 2 * alike, f"{name} for sm_{target}"
            assert writes[2] >= 2 * whole, f"{name} for sm_{target}"
