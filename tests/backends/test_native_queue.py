"""The CPU's queues by themselves, without torch: random work by several threads, under sanitizers."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from compiled import CXX, link, objects_of
from helpers import DEVICE
from seed import LONGER, SEED

ROOT = Path(__file__).parents[2]
SOURCES = [*(ROOT / "csrc/cpu" / name for name in ("queue.cpp", "step_queue.cpp")), *ROOT.glob("csrc/cpu/simd/*.cpp")]
needs_compiler = pytest.mark.skipif(shutil.which(CXX) is None, reason="no C++ compiler")


# Races; then memory errors and undefined behaviour; then what users run, as fast as it goes.
@pytest.fixture(scope="module", params=["-O1 -fsanitize=thread", "-O1 -fsanitize=address,undefined", "-O3"])
def run(request, tmp_path_factory):
    """Runs a program, of queues and kernels that are compiled once for both."""
    flags = [*request.param.split(), "-pthread"]
    compiled = [*["-std=c++17", "-g1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"], *flags]
    folder = tmp_path_factory.mktemp("queues")
    queues = objects_of(SOURCES, compiled, folder)

    def run(program, rounds):
        own = objects_of([ROOT / f"tests/_support/native/{program}.cpp"], compiled, folder)
        link([*own, *queues], flags, folder / program)
        rounds = int(rounds * LONGER)
        done = subprocess.run([folder / program, str(SEED), str(rounds)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout == f"{rounds} cases\n"

    return run


@needs_compiler
def test_random_work_by_several_threads(run, request):
    run("queue_stress", 150 if "-O3" in request.node.name else 40)


@needs_compiler
def test_random_steps_by_several_threads(run):
    run("step_stress", 15)


@pytest.mark.skipif(DEVICE != "cpu", reason="about CPU kernels")
def test_every_instruction_set_gives_the_same_bits():
    """What the suite shows of the widest set that this machine has, it shows of the others."""
    done = subprocess.run([sys.executable, "-c", DIGEST, str(SEED)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    digests = done.stdout.splitlines()
    assert len(digests) == 3
    assert len(set(digests)) == 1, digests


# The set is chosen at the first call, which is one of a process forked when all is imported.
DIGEST = """
import hashlib, math, os, sys, torch
from cwclip_kernels import ComponentClipper
from cwclip_kernels.optim import ComponentClipAdamW
for isa in ("baseline", "avx2", None):  # None: the widest
    if not os.fork():
        if isa:
            os.environ["CWCLIP_CPU_ISA"] = isa
        break
    if os.wait()[1]:
        sys.exit(f"{isa}: ended with an error")
else:
    sys.exit()
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
