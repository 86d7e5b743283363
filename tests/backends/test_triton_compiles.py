"""The Triton kernels compiled for real targets, without running, in a process of their own:

python tests/backends/test_triton_compiles.py cuda:90
"""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from cwclip_kernels.backends import triton as backend
from cwclip_kernels.backends import triton_step, triton_tables

# Hopper and CDNA 3 get all kernels; their neighbours, Ampere, Blackwell, CDNA 2 and Intel's Ponte Vecchio, those of
# clipping.
TARGETS = ("cuda:90", "hip:gfx942", "cuda:80", "cuda:100", "hip:gfx90a", "xpu:pvc")
FULL = TARGETS[:2]
COMPILED = (torch.float32, torch.bfloat16)
# Registers a thread, so that a multiprocessor takes three blocks of 256, or one of AMD's SIMDs four waves.
REGISTERS = {"cuda": 80, "hip": 128}
# Bytes that a multiprocessor of Hopper should have in flight: its 132nd part of 3.4 TB/s, for a latency of 700 ns, is
# 18 KB, and less than half of a block's time goes into its loads.
IN_FLIGHT = 48 << 10
STREAMING = ("power_sums_kernel", "sum_or_clip_kernel", "scale_kernel")
# Gradients, parameters and states of an optimizer's step, and how many tensors it reads and writes 16 bytes at a
# time: those of the widest type, since a thread has the same elements of all.
STEPPED = {
    triton_step.Kind(torch.float32, torch.float32, torch.float32, False): (4, 3),
    triton_step.Kind(torch.bfloat16, torch.bfloat16, torch.bfloat16, False): (4, 3),
    triton_step.Kind(torch.bfloat16, torch.bfloat16, torch.float32, False): (2, 2),
    triton_step.Kind(torch.float32, torch.bfloat16, torch.float32, True): (4, 3),
}


@pytest.mark.slow
@pytest.mark.usefixtures("needs_triton")
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_to_wide_loads_without_spills(target, tmp_path):
    kind, _ = target.split(":")
    if kind == "xpu":
        reason = "Triton on PyPI has no backend for Intel's GPUs; the one that comes with torch for XPU has"
        pytest.importorskip("triton.backends.intel", reason=reason)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    root = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    run = subprocess.run([sys.executable, __file__, target], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    reports = json.loads(run.stdout)
    assert len(reports) == 4 * len(COMPILED) + 6 + (target in FULL) * (3 + 4 * len(STEPPED))
    expected, expected_single = iter(STEPPED.values()), iter(STEPPED.values())
    for report in reports:
        assert report["spills"] <= 16, report  # bytes; some assemblers put a value or two on the stack
        if report["dims"] or kind == "xpu":
            continue
        if report["kernel"] == "adamw_kernel":
            assert (report["wide_loads"], report["wide_stores"]) == next(expected), report
            assert report["shared"] == 0, report  # bytes, through which threads would exchange elements
        if report["kernel"] == "adamw_single_kernel":
            loads, stores = next(expected_single)
            assert report["wide_loads"] >= backend.ROWS + loads, report  # for the norm, then for the step
            assert report["wide_stores"] == stores, report
        if report["kernel"] in STREAMING:
            assert report["registers"] <= REGISTERS[kind], report
            assert report["wide_loads"] >= backend.ROWS, report
            if target == "cuda:90":
                blocks = 2**16 // (backend.THREADS * -(-report["registers"] // 8) * 8)
                assert blocks * backend.THREADS * 16 * report["in_flight"] >= IN_FLIGHT, report
        if report["kernel"] in STREAMING[1:]:
            assert report["wide_stores"] >= backend.ROWS, report
            # Head and tail, of two dtypes in one launch; norm; coefficient; found_inf; partial sum.
            assert report["narrow_stores"] <= 6, report


def compile_all(target):
    """Compiles every kernel; what the assembly says about each."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as triton_compile

    kind, arch = target.split(":")
    gpu = {
        "cuda": lambda: GPUTarget("cuda", int(arch), 32),
        "hip": lambda: GPUTarget("hip", arch, 64),
        "xpu": lambda: GPUTarget("xpu", {"arch": arch}, 32),
    }[kind]()
    kernels = backend.kernels()
    tables = {"pointers": "*i64", "tiles": "*i64", "layouts": "*i64"}
    scale = {**tables, "factors": "*fp32"}
    sums = {**tables, "partials": "*fp64"}
    results = {"caps": "*fp64", "cap_stride": "i32", "norms": "*fp32", "coefs": "*fp32"}
    scaled = {**results, "inverse": "*fp64", "found_inf": "*fp32"}
    # Gradients that aren't scaled: an argument that is None is left out of the kernel.
    nothing = dict.fromkeys(("inverse", "found_inf"))
    rule = {"ORDER": 2.0, "EPS": 1e-6, "NONFINITE": "zero"}
    jobs = []
    for dtype in COMPILED:
        block = block_of(dtype)
        jobs.append((kernels.power_sums_kernel, sums, {"ORDER": 2.0, **block}))
        jobs.append((kernels.scale_kernel, scale, {"ZERO_FILL": True, **block}))
        jobs.append((kernels.sum_or_clip_kernel, {**sums, **scaled, "several": "i32"}, {**rule, **block}))
        gapped = {**rule, **block, **nothing, "DIMS": 2}
        jobs.append((kernels.sum_or_clip_kernel, {**sums, **results, "several": "i32"}, gapped))
    jobs.append((kernels.scale_kernel, scale, {"ZERO_FILL": False, **block_of(*COMPILED)}))
    jobs.append((kernels.sum_or_clip_kernel, {**sums, **scaled, "several": "i32"}, {**rule, **block_of(*COMPILED)}))
    for dtype, order in ((torch.bfloat16, math.inf), (torch.float16, 2.0), (torch.float64, 2.0)):
        jobs.append((kernels.power_sums_kernel, sums, {"ORDER": order, **block_of(dtype)}))
    measured = {"components": "*i64", "partials": "*fp64", "spans": "*i64"}
    chunked = {**rule, "CHUNK": triton_tables.CHUNK}
    jobs.append((kernels.coefficients_kernel, {**measured, **scaled, "factors": "*fp64"}, chunked))
    if target in FULL:
        jobs.append((kernels.coefficients_kernel, {**measured, **results}, {**chunked, **nothing, "factors": None}))
        merge = {"partials": "*fp64", "spans": "*i64", "sums": "*fp64"}
        jobs.append((kernels.combine_kernel, merge, {"ORDER": 2.0, "CHUNK": triton_tables.CHUNK}))
        jobs += jobs_of_a_step(kernels, {**tables, **scaled}, {**tables, **results}, {**rule, "DIMS": 0})
    options = {"num_warps": backend.THREADS // gpu.warp_size, "enable_fp_fusion": True}
    reports = []
    for kernel, arguments, constants in jobs:
        types = {name: arguments.get(name, "constexpr") for name in kernel.arg_names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(types.values()) if t[0] == "*"}
        compiled = triton_compile(ASTSource(kernel, types, constants, aligned), target=gpu, options=options)
        name, dims = kernel.__name__, constants.get("DIMS", 0)
        is_loop = name in STREAMING and not dims
        reports.append({"kernel": name, "dims": dims, **inspect(compiled, target, is_loop)})
    return reports


def block_of(*dtypes):
    """The launch configuration without the compiler's options."""
    return {k: v for k, v in backend.block(dtypes, 0).items() if k.isupper()}


def jobs_of_a_step(kernels, clip, plain, rule):
    """The kernels of an optimizer's step, with and without what may be None."""
    tables = {name: kind for name, kind in plain.items() if kind == "*i64"}
    once = {**tables, "factors": "*fp32", "states": "*i64", "count": "i32", "scalars": "*fp64"}
    step = {**once, "skip": "*fp32"}
    for dtypes in STEPPED:
        block = {**triton_step.block(dtypes), "ZERO_FILL": True}
        yield kernels.adamw_kernel, step, {**block, "DIMS": 0}
        yield kernels.adamw_kernel, {**once, "factors": "*fp64"}, {**block, "DIMS": 2, "skip": None}
        single = {**triton_step.block_of_single(dtypes), **rule}
        yield kernels.adamw_single_kernel, {**clip, **step}, single
        nothing = dict.fromkeys(("inverse", "found_inf", "skip"))
        yield kernels.adamw_single_kernel, {**plain, **once}, {**single, **nothing, "DIMS": 2}
    advance = {**step, "rule_of": "*i64", "rules": "*fp64"}
    yield kernels.advance_kernel, advance, {"TIME": backend.type_of(torch.float32), "BLOCK": triton_step._BLOCK}


def inspect(compiled, target, is_loop):
    """Counts 16-byte and other accesses of global memory, bytes of shared memory, registers, and bytes spilled."""
    kind, counts = target.split(":")[0], {"shared": compiled.metadata.shared}
    if kind == "hip":
        assembly = compiled.asm["amdgcn"]
        names = r"global_load_dwordx4", r"global_store_dwordx4", r"global_store_(?!dwordx4)"
        for name, key in (("registers", "vgpr_count"), ("spills", "private_segment_fixed_size")):
            counts[name] = int(re.search(rf"\.{key}:\s*(\d+)", assembly)[1])
    elif kind == "cuda":
        assembly = compiled.asm["ptx"]
        wide = r"\.(v4\.b32|v2\.b64)"
        names = rf"ld\.global\S*{wide}", rf"st\.global\S*{wide}", rf"st\.global(?!\S*{wide})"
        usage = dump(compiled.asm["cubin"], "--dump-resource-usage")
        counts["registers"] = int(re.search(r"REG:(\d+)", usage)[1])
        counts["spills"] = int(re.search(r"STACK:(\d+)", usage)[1])
        if is_loop and target == "cuda:90":
            counts["in_flight"] = loads_in_flight(dump(compiled.asm["cubin"], "-sass"))
    else:
        return {**counts, "spills": compiled.metadata.n_spills}
    found = (len(re.findall(name, assembly)) for name in names)
    return counts | dict(zip(("wide_loads", "wide_stores", "narrow_stores"), found, strict=True))


def dump(cubin, what):
    """What the cuobjdump that comes with Triton says (there is no driver to ask)."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, what, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def loads_in_flight(sass):
    """How many 16-byte loads of a loop are issued before the first of them is waited for, in the worst loop."""
    pattern = r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)([^;]*);"
    code = [(int(at, 16), name, rest) for at, name, rest in re.findall(pattern, sass, re.M)]
    loops = []
    for at, name, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if name == "BRA" and target and int(target[1], 16) < at:
            body = [each[1:] for each in code if int(target[1], 16) <= each[0] <= at]
            if sum(map(is_wide_load, body)) >= backend.ROWS:
                loops.append(most_pending(body))
    return min(loops)


def is_wide_load(instruction):
    return instruction[0].startswith("LDG") and instruction[0].endswith(".128")


def most_pending(code):
    """The most 16-byte loads without a use of one of them in between."""
    most, pending = 0, []
    for name, operands in code:
        registers = [int(register) for register in re.findall(r"\bR(\d+)", operands)]
        loads = is_wide_load((name, operands))
        if any(register in load for load in pending for register in registers[loads:]) or name in ("BRA", "EXIT"):
            pending = []
        if loads:
            pending.append(range(registers[0], registers[0] + 4))
            most = max(most, len(pending))
    return most


if __name__ == "__main__":
    print(json.dumps(compile_all(sys.argv[1])))
