"""Tests that run on several ranks: processes of one gloo group, started once and given one test after another.

    @on_ranks(2, 4)
    def test_something(dtype):
        ...  # the body runs on every rank, with the same random numbers on all

A test fails if it fails on any rank, and is skipped if it skips itself on all. After a failure the ranks are ended,
since they may wait for each other, and started anew for the next test. ``CWCLIP_RANKS="8"`` runs those tests that
take several sizes on eight ranks too.

The ranks but for the last are forked from a process that has imported what takes seconds to import.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import inspect
import multiprocessing
import os
import sys
import tempfile
import traceback
import warnings
from datetime import timedelta
from multiprocessing.connection import Connection, wait

import pytest

SECONDS = 120  # what a test may take before its ranks count as stuck
# Takes seconds to import: the ranks are forked from a process that has what the tests at hand use.
LARGE = {
    "torch": ("torch", "torch.distributed.fsdp", "torch.distributed.tensor.debug", "pytest"),
    "deepspeed": ("deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.runtime.zero.stage3"),
    "transformers": ("accelerate", "transformers.trainer"),
    "lightning": ("lightning",),
}

_pools: dict[int, "Pool"] = {}


def on_ranks(*sizes: int):
    """Marks a test whose body runs on every rank of groups of these sizes, one after another."""

    if len(sizes) > 1:
        sizes = tuple(dict.fromkeys((*sizes, *map(int, os.environ.get("CWCLIP_RANKS", "").split()))))

    def decorate(test):
        @functools.wraps(test)
        def run(*, ranks, request, **arguments):
            seed = int(os.environ["CWCLIP_TEST_SEED"]) + sum(request.node.nodeid.encode())
            if ranks not in _pools:
                _pools[ranks] = Pool(ranks)
            _pools[ranks].run(test.__module__, test.__name__, arguments, seed % 2**31)

        own = list(inspect.signature(test).parameters.values())
        extra = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in ("ranks", "request")]
        run.__signature__ = inspect.Signature([*own, *extra])
        return pytest.mark.ranks(pytest.mark.parametrize("ranks", sizes)(run))

    return decorate


@contextlib.contextmanager
def told_by_launcher(**more: str):
    """On a rank: environment variables as a launcher like ``torchrun`` sets them, and more."""
    import torch.distributed as dist  # as in _serve

    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    before = dict(os.environ)
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size, **more)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class Skipped(str):
    """A rank's answer where the test skipped itself: why."""


class Pool:
    """Processes that are ranks 0 to size - 1."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.processes = []
        self.pipes: list[Connection] = []
        atexit.register(self.stop)

    def run(self, module: str, name: str, arguments: dict, seed: int) -> None:
        if not self.processes:
            self.start()
        for pipe in self.pipes:
            pipe.send((module, name, arguments, seed))
        answers: dict[int, str | None] = {}
        while len(answers) < self.size:
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in answers]
            ready = wait(waiting, timeout=5 if any(answers.values()) else SECONDS)
            if not ready:
                break
            for pipe in ready:
                try:
                    answers[self.pipes.index(pipe)] = pipe.recv()
                except EOFError:
                    answers[self.pipes.index(pipe)] = "ended without a word"
        skipped = [text for text in answers.values() if isinstance(text, Skipped)]
        failures = [
            f"--- rank {rank}: {text}"
            for rank, text in sorted(answers.items())
            if text is not None and (not isinstance(text, Skipped) or len(skipped) < self.size)
        ]
        stuck = [rank for rank in range(self.size) if rank not in answers]
        if failures or stuck:
            self.stop()
            pytest.fail("\n".join([*failures, *(f"--- rank {rank} got stuck" for rank in stuck)]), pytrace=False)
        if skipped:
            pytest.skip(skipped[0])

    def start(self) -> None:
        contexts = [multiprocessing.get_context(method) for method in ("forkserver", "spawn")]
        contexts[0].set_forkserver_preload([name for key in LARGE if key in sys.modules for name in LARGE[key]])
        store = os.path.join(tempfile.mkdtemp(), "store")
        for rank in range(self.size):
            # The last by itself, with another seed of its hashes: not all ranks have the same order of a set.
            context = contexts[rank > 0 and rank == self.size - 1]
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, self.size, store), daemon=True)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("CUDA_VISIBLE_DEVICES", "")  # gloo and CPU tensors, whatever the machine
                patch.setenv("DS_ACCELERATOR", "cpu")
                patch.setenv("TRITON_INTERPRET", "1")
                process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.processes, self.pipes = [], []


def _serve(pipe: Connection, rank: int, size: int, store: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=SECONDS // 2)
    )
    warnings.simplefilter("error")
    while True:
        try:
            module, name, arguments, seed = pipe.recv()
        except EOFError:
            return
        try:
            if module not in sys.modules:
                importlib.import_module(module)
                gc.freeze()  # gc.collect() and its like look at what tests make, not at all that was imported
            test = getattr(sys.modules[module], name).__wrapped__
            torch.manual_seed(seed)
            test(**arguments)
            pipe.send(None)
        except pytest.skip.Exception as skipped:
            pipe.send(Skipped(skipped.msg))
        except BaseException:
            pipe.send(traceback.format_exc())
