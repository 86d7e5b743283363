"""The CPU's queues by themselves, without torch: random work by several threads, under sanitizers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import DEVICE
from seed import SEED

ROOT = Path(__file__).parents[2]
SOURCES = [*(ROOT / "csrc/cpu" / name for name in ("queue.cpp", "step_queue.cpp")), *ROOT.glob("csrc/cpu/simd/*.cpp")]
CXX = os.environ.get("CXX", "g++").split()[0]


@pytest.mark.skipif(shutil.which(CXX) is None, reason="no C++ compiler")
# Races; then memory errors and undefined behaviour; then what users run, as fast as it goes.
@pytest.mark.parametrize("flags", ["-O1 -fsanitize=thread", "-O1 -fsanitize=address,undefined", "-O3"])
@pytest.mark.parametrize("queue", ["queue", "step"])
def test_random_work_by_several_threads(queue, flags, tmp_path):
    program = tmp_path / "stress"
    sanitized = "sanitize" in flags
    command = [
        CXX,
        "-std=c++17",
        "-g",
        *flags.split(),
        "-ffp-contract=off",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-psabi",
    ]
    built = subprocess.run(
        [*command, ROOT / f"tests/_support/native/{queue}_stress.cpp", *SOURCES, "-pthread", "-o", program],
        capture_output=True,
        text=True,
    )
    if built.returncode and sanitized and "cannot find" in built.stderr:
        pytest.skip("this compiler came without sanitizers")
    assert built.returncode == 0, built.stderr
    rounds = (80 if sanitized else 300) if queue == "queue" else 25
    done = subprocess.run([program, str(SEED), str(rounds)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"{rounds} cases\n"


@pytest.mark.skipif(DEVICE != "cpu", reason="about CPU kernels")
def test_every_instruction_set_gives_the_same_bits():
    """What the suite shows of the widest set that this machine has, it shows of the others."""
    digests = {}
    for isa in ("baseline", "avx2", "avx512", None):
        environment = {**os.environ, "CWCLIP_CPU_ISA": isa} if isa else os.environ
        command = [sys.executable, "-c", DIGEST, str(SEED)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        digests[isa] = done.stdout
    assert len(set(digests.values())) == 1, digests


DIGEST = """
import hashlib, math, sys, torch
from cwclip_kernels import ComponentClipper
from cwclip_kernels.optim import ComponentClipAdamW
torch.manual_seed(int(sys.argv[1]))
digest = hashlib.sha256()
every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
for p in (1.0, 2.0, math.inf):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        grads = [torch.randn(n, dtype=torch.float64).to(dtype) for n in (1, 31, 33, 511, 512, 513, 5000, 100_003)]
        grads += [torch.randn(90, 7, dtype=torch.float64).to(dtype)[:, ::2], torch.zeros(3000, dtype=dtype)]
        grads += [torch.full((3000,), 1e-25).to(dtype), torch.full((3000,), 1e25).to(dtype)]
        if dtype.itemsize == 2:
            values = every.view(dtype)
            grads += list(values[values.isfinite()].clone().split(997))
        params = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
        for param, grad in zip(params, grads):
            param.grad = grad
        result = ComponentClipper(params, 0.37, p, backend="cpu").clip_()
        params = [param for param in params if param.grad.is_contiguous() or p == 2.0]
        kept = torch.float32 if p == 1.0 else None
        optimizer = ComponentClipAdamW(params, max_norm=0.37, amsgrad=p == 2.0, state_dtype=kept)
        optimizer.step(), optimizer.step()
        states = (value for param in params for value in optimizer.state[param].values())
        for tensor in (result.norms, result.coefs, *(param.grad for param in params), *params, *states):
            digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""
