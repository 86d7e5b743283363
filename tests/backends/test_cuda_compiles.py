"""What nvcc made of the CUDA kernels in the built extension: registers, loads in flight, fences. No GPU needed."""

import re
import shutil
import subprocess

import pytest

import sass
from cuda_on_host import ROOT
from cwclip_kernels.backends import native

TARGETS = (80, 90, 100)  # what wheels are built for
THREADS, BLOCKS = 288, 3  # of a block; blocks that shall fit on a processor (csrc/cuda/kernels.cuh)
REGISTERS = 65536 // (THREADS * BLOCKS) // 8 * 8
SUM_LOADS, SCALE_LOADS, DTYPES = 8, 4, 4  # csrc/cuda/elements.cuh
STEP_THREADS, STEP_BLOCKS, STEP_BLOCKS_WITH_GAPS = 256, 3, 2  # csrc/cuda/adamw.cuh
SUM, SCALE, BOTH = range(3)  # the modes of clip_kernel
TWO = 1  # the order of the norm that nearly everybody uses

FIRST_READ, LAST_READ, LAST_WRITE = r"LDG\.(?!E\.EF)\S*\.128", r"LDG\.E\.EF\S*\.128", r"STG\.E\.EF\.128"


@pytest.fixture(scope="module")
def kernels():
    assert native.unavailable() is None
    if not hasattr(native._C, "cuda_clip"):
        pytest.skip("built without CUDA kernels")
    if sass.cuobjdump() is None:
        pytest.skip("no cuobjdump: it comes with Triton")
    found = sass.kernels_in(ROOT / "cwclip_kernels" / native._C.__file__.rpartition("/")[2])
    if {kernel.target for kernel in found} != set(TARGETS):
        pytest.skip("built for other GPUs")
    return found


def clip_kernels(kernels):
    """With mode, order, and whether it serves gradients with gaps."""
    for kernel in kernels:
        if match := re.search(r"clip_kernel.*ModeE(\d).*OrderE(\d)ELi\d+ELb(\d)E", kernel.name):
            yield kernel, int(match[1]), int(match[2]), match[3] == "1"


def test_every_kernel_is_there(kernels):
    # That measure: three orders of the norm, for many gradients and for gaps, and order 2 for few. That measure and
    # scale at once: three orders for many, and order 2 for few. That scale: for few, many, gaps. The list. That step:
    # likewise three, and what comes before.
    assert len(kernels) == len(TARGETS) * (3 * 2 + 1 + 3 + 1 + 3 + 1 + 3 + 1)


def test_nothing_on_the_stack_and_registers_as_budgeted(kernels):
    for kernel in kernels:
        assert kernel.stack == 0, kernel.name
        assert kernel.registers <= registers_of(kernel), f"{kernel.name} for sm_{kernel.target}: {kernel.registers}"


def registers_of(kernel):
    """As many as a thread may have, for as many blocks on a processor as are meant to be there."""
    if "step_kernel" not in kernel.name:
        return REGISTERS
    blocks = STEP_BLOCKS_WITH_GAPS if "Lb1E" in kernel.name or kernel.target >= 100 else STEP_BLOCKS
    return 65536 // (STEP_THREADS * blocks) // 8 * 8


def test_eight_loads_of_sixteen_bytes_in_flight(kernels):
    """Of every dtype, by all workers and by a warp of them; single ones are those read again in float64."""
    for kernel, mode, order, _ in clip_kernels(kernels):
        if mode == SCALE:
            continue
        groups = kernel.loads_in_flight(FIRST_READ)
        assert sum(groups) >= 2 * DTYPES * SUM_LOADS, kernel.name
        if kernel.target < 100:
            assert set(groups) <= {1, SUM_LOADS}, kernel.name
            assert groups.count(SUM_LOADS) == 2 * DTYPES, kernel.name
        elif order == TWO:  # all but float16, of which six and more are in flight
            assert groups.count(SUM_LOADS) >= 2 * (DTYPES - 1), kernel.name


def test_scaling_reads_and_writes_sixteen_bytes_at_a_time(kernels):
    for kernel, mode, _, _ in clip_kernels(kernels):
        # By all workers what was just measured or is on the list, by a warp what is small.
        ways = {SUM: 2, SCALE: 2, BOTH: 3}[mode]
        assert kernel.loads_in_flight(LAST_READ) == [SCALE_LOADS] * (ways * DTYPES), kernel.name
        assert kernel.count(LAST_WRITE) == ways * DTYPES * SCALE_LOADS, kernel.name


def test_as_few_fences_as_the_hand_over_needs(kernels):
    """A launch's end orders all that form 1 puts on the list, and form 2 has one fence for a lane's share of it."""
    for kernel, mode, _, _ in clip_kernels(kernels):
        # When a tile is handed in, and when a block leaves; form 2's list, and when a component is finished.
        assert kernel.count(r"MEMBAR\.\S*GPU") == {SUM: 2, SCALE: 1, BOTH: 4}[mode], kernel.name
    assert all(kernel.count(r"MEMBAR\.\S*GPU") == 0 for kernel in kernels if "list_kernel" in kernel.name)


def test_entries_of_the_table_go_to_shared_memory_past_the_registers(kernels):
    assert all(kernel.count(r"LDGSTS\S*\.128") for kernel, *_ in clip_kernels(kernels))


def test_launches_overlap_where_the_device_can(kernels):
    """What comes before lets Mode::scale begin, and that waits: without it, it would read a list half written."""
    for kernel, mode, _, _ in clip_kernels(kernels):
        waits, lets = kernel.count("ACQBULK"), kernel.count("PREEXIT")
        assert (waits, lets) == ((0, 0) if kernel.target < 90 else (1, 0) if mode == SCALE else (0, 1)), kernel.name
    assert all(k.count("PREEXIT") == (k.target >= 90) for k in kernels if "list_kernel" in k.name)


def test_cache_policies_are_what_createpolicy_makes(tmp_path):
    """Kernels get them as parameters: csrc/cuda/program.h."""
    if shutil.which("nvcc") is None or sass.cuobjdump() is None:
        pytest.skip("no nvcc, or no cuobjdump")
    header = (ROOT / "csrc/cuda/program.h").read_text()
    constants = re.search(r"kEvictNormal = 0x(\w{8})0{8}, kEvictLast = 0x(\w{8})0{8};", header)
    lines = [
        f'asm("createpolicy.fractional.L2::{name}.b64 %0, 1.0;" : "=l"(to[{i}]));'
        for i, name in enumerate(("evict_normal", "evict_last"))
    ]
    source = tmp_path / "policies.cu"
    source.write_text(f"__global__ void policies(unsigned long long* to) {{ {' '.join(lines)} }}")
    # For sm_80 the assembler writes each half as one number.
    subprocess.run(["nvcc", "-c", "-arch=sm_80", source, "-o", tmp_path / "policies.o"], check=True)
    (found,) = sass.kernels_in(tmp_path / "policies.o")
    numbers = re.findall(r"0x([0-9a-f]{8})\b", " ".join(found.instructions))
    assert sorted(numbers) == sorted(constants.groups()), found.instructions


def test_steps_move_sixteen_bytes_at_a_time(kernels):
    """Eight of half-precision tensors, beside sixteen of others: as many elements of each."""
    streams = 4  # g, p, m, v; and w with amsgrad
    steps = [kernel for kernel in kernels if "step_kernel" in kernel.name]
    assert len(steps) == 3 * len(TARGETS)
    for kernel in steps:
        name = f"{kernel.name} for sm_{kernel.target}"
        reads = {width: kernel.count(rf"LDG\.E\.EF\.{8 * width}") for width in (8, 16)}
        writes = {width: kernel.count(rf"STG\.E\.EF\.{8 * width}") for width in (8, 16)}
        # Two packets of each stream in flight, or one with amsgrad, and of float64. Half-precision parameters
        # themselves are never read in sixteen bytes, other tensors beside them may be of either width. More where the
        # compiler has made two of one loop.
        whole, alike = 2 * streams + streams + 1, 2 * (streams - 1) + streams
        assert reads[16] >= whole + (streams + streams + 1) + alike, name
        assert reads[8] >= 2 * whole, name
        whole, alike = 2 * (streams - 1) + streams, 2 * (streams - 2) + streams - 1
        assert writes[16] >= whole + (streams - 1 + streams) + alike, name
        assert writes[8] >= 2 * whole - streams, name
