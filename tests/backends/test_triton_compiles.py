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

# Hopper, Ampere and CDNA 3, the kinds of GPU that training runs on.
TARGETS = ("cuda:90", "cuda:80", "hip:gfx942")
COMPILED = (torch.float32, torch.bfloat16)
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
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    root = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    run = subprocess.run([sys.executable, __file__, target], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    reports = json.loads(run.stdout)
    assert len(reports) == 7 * len(COMPILED) + 2 + 4 * len(STEPPED) + 3
    expected, expected_single = iter(STEPPED.values()), iter(STEPPED.values())
    for report in reports:
        if report["kernel"] == "adamw_kernel" and not report["dims"]:
            assert (report["wide_loads"], report["wide_stores"]) == next(expected), report
            assert report["shared"] == 0, report  # bytes, through which threads would exchange elements
        if report["kernel"] == "adamw_single_kernel" and not report["dims"]:
            loads, stores = next(expected_single)
            assert report["wide_loads"] >= backend._ROWS + loads, report  # for the norm, then for the step
            assert report["wide_stores"] == stores, report
        if report["kernel"] in ("power_sums_kernel", "scale_kernel", "clip_kernel") and not report["dims"]:
            assert report["wide_loads"] >= backend._ROWS, report
        if report["kernel"] in ("scale_kernel", "clip_kernel") and not report["dims"]:
            assert report["wide_stores"] >= backend._ROWS, report
            assert report["narrow_stores"] <= 4, report  # head and tail; norm; coefficient; found_inf
        assert report["spills"] <= 16, report  # bytes; some assemblers put a value or two on the stack


def compile_all(target):
    """Compiles every kernel; what the assembly says about each."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as triton_compile

    kind, arch = target.split(":")
    gpu = GPUTarget("cuda", int(arch), 32) if kind == "cuda" else GPUTarget("hip", arch, 64)
    kernels = backend.kernels()
    tables = {"pointers": "*i64", "tiles": "*i64", "layouts": "*i64"}
    sums = {**tables, "partials": "*fp64"}
    scale = {**tables, "coefs": "*fp32"}
    clip = {
        **sums,
        "spans": "*i64",
        "caps": "*fp64",
        "cap_stride": "i32",
        "inverse": "*fp64",
        "found_inf": "*fp32",
        "norms": "*fp32",
        "coefs": "*fp32",
    }
    plain = {name: kind for name, kind in clip.items() if name not in ("inverse", "found_inf")}
    merge = {"partials": "*fp64", "spans": "*i64", "sums": "*fp64"}
    jobs = []
    for dtype in COMPILED:
        block = backend.block(dtype, 0)
        block = {k: block[k] for k in ("DTYPE", "DIMS", "ROWS", "COLUMNS")}
        fused = {"ORDER": 2.0, "EPS": 1e-6, "NONFINITE": "zero", "CHUNK": triton_tables.CHUNK}
        jobs.append((kernels.power_sums_kernel, sums, {"ORDER": 2.0, **block}))
        jobs.append((kernels.scale_kernel, scale, {"ZERO_FILL": True, **block}))
        jobs.append((kernels.clip_kernel, clip, {**fused, **block}))
        # Gradients that aren't scaled: an argument that is None is left out of the kernel.
        jobs.append((kernels.clip_kernel, plain, {**fused, **block, "inverse": None, "found_inf": None}))
        gapped = {**block, "DIMS": 2}
        jobs.append((kernels.power_sums_kernel, sums, {"ORDER": 2.0, **gapped}))
        jobs.append((kernels.scale_kernel, scale, {"ZERO_FILL": True, **gapped}))
        jobs.append((kernels.clip_kernel, clip, {**fused, **gapped}))
    jobs.append((kernels.power_sums_kernel, sums, {"ORDER": math.inf, **block}))
    jobs.append((kernels.combine_kernel, merge, {"ORDER": 2.0, "CHUNK": triton_tables.CHUNK}))
    jobs += jobs_of_a_step(kernels, tables, clip, plain)
    options = {"num_warps": backend.THREADS // gpu.warp_size, "enable_fp_fusion": True}
    reports = []
    for kernel, arguments, constants in jobs:
        types = {name: arguments.get(name, "constexpr") for name in kernel.arg_names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(types.values()) if t[0] == "*"}
        compiled = triton_compile(ASTSource(kernel, types, constants, aligned), target=gpu, options=options)
        reports.append({"kernel": kernel.__name__, "dims": constants.get("DIMS", 0), **inspect(compiled, kind)})
    return reports


def jobs_of_a_step(kernels, tables, clip, plain):
    """The kernels of an optimizer's step, with and without what may be None."""
    once = {**tables, "factors": "*fp32", "states": "*i64", "count": "i32", "scalars": "*fp64"}
    step = {**once, "skip": "*fp32"}
    for dtypes in STEPPED:
        block = {**triton_step.block(dtypes), "ZERO_FILL": True}
        yield kernels.adamw_kernel, step, {**block, "DIMS": 0}
        yield kernels.adamw_kernel, {**once, "factors": "*fp64"}, {**block, "DIMS": 2, "skip": None}
        single = {**triton_step.block_of_single(dtypes), "ORDER": 2.0, "EPS": 1e-6, "NONFINITE": "zero"}
        yield kernels.adamw_single_kernel, {**clip, **step}, {**single, "DIMS": 0}
        nothing = dict.fromkeys(("inverse", "found_inf", "skip"))
        yield kernels.adamw_single_kernel, {**plain, **once}, {**single, **nothing, "DIMS": 2}
    advance = {**step, "rule_of": "*i64", "rules": "*fp64"}
    yield kernels.advance_kernel, advance, {"TIME": backend.type_of(torch.float32), "BLOCK": triton_step._BLOCK}
    rule = {"ORDER": 2.0, "EPS": 1e-6, "NONFINITE": "zero", "CHUNK": triton_tables.CHUNK}
    clip, plain = ({**each, "components": "*i64"} for each in (clip, plain))
    yield kernels.coefficients_kernel, {**clip, "factors": "*fp64"}, rule
    yield kernels.coefficients_kernel, plain, {**rule, **dict.fromkeys(("inverse", "factors", "found_inf"))}


def inspect(compiled, kind):
    """Counts 16-byte and other accesses of global memory, bytes of shared memory, and bytes spilled per thread."""
    if kind == "hip":
        assembly = compiled.asm["amdgcn"]
        names = r"global_load_dwordx4", r"global_store_dwordx4", r"global_store_(?!dwordx4)"
        spills = int(re.search(r"\.private_segment_fixed_size:\s*(\d+)", assembly)[1])
    else:
        assembly = compiled.asm["ptx"]
        wide = r"\.(v4\.b32|v2\.b64)"
        names = rf"ld\.global\S*{wide}", rf"st\.global\S*{wide}", rf"st\.global(?!\S*{wide})"
        spills = spilled(compiled.asm["cubin"])
    loads, stores, others = (len(re.findall(name, assembly)) for name in names)
    counts = {"wide_loads": loads, "wide_stores": stores, "narrow_stores": others}
    return {**counts, "shared": compiled.metadata.shared, "spills": spills}


def spilled(cubin):
    """Bytes of stack a thread uses, by the cuobjdump that comes with Triton (there is no driver to ask)."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


if __name__ == "__main__":
    print(json.dumps(compile_all(sys.argv[1])))
