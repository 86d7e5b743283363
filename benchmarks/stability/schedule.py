"""Makes the runs that are missing, several at once."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import tasks
from .arms import Arm
from .problem import Problem
from .runs import Run, Store
from .settings import Settings
from .train import Trainer, schedule

Job = tuple[Arm, int]
POLL = 0.5  # seconds between looks at how far the runs are


@dataclass(frozen=True)
class Workers:
    """How runs are shared out.

    Attributes:
        processes: how many runs at once.
        threads: CPU threads of each.
        devices: one for each process.
    """

    processes: int
    threads: int
    devices: tuple[torch.device, ...]


def missing(store: Store, arms: list[Arm], seeds: list[int]) -> list[Job]:
    """Runs that aren't finished, seed by seed: an experiment that is cut short has as many seeds of every arm."""
    return [(arm, seed) for seed in seeds for arm in arms if store.get(arm, seed) is None]


def run_all(
    jobs: list[Job],
    store: Store,
    settings: Settings,
    task: tasks.Task,
    workers: Workers,
    console: Console,
    title: str,
) -> None:
    """Makes these runs and keeps each in the store as it ends.

    Raises:
        Problem: a run couldn't be made or kept. Runs that were under way are finished first, the others not begun.
    """
    if not jobs:
        return
    steps = schedule(settings, len(task.train))[0]
    with _bar(console) as bar:
        shown = bar.add_task(title, total=steps * len(jobs), runs=f"0/{len(jobs)} runs")
        for done, run in enumerate(_results(jobs, store, settings, task, workers, bar, shown), start=1):
            bar.update(shown, runs=f"{done}/{len(jobs)} runs")
            outcome = "failed" if run["failed"] else ""
            console.print(f"{run['arm']:<18} seed {run['seed']:<5} {run['score']:.3f} {outcome}", markup=False)


def _results(
    jobs: list[Job],
    store: Store,
    settings: Settings,
    task: tasks.Task,
    workers: Workers,
    bar: Progress,
    shown: TaskID,
) -> Iterator[Run]:
    count = min(workers.processes, len(jobs))
    if count == 1:
        torch.set_num_threads(workers.threads)
        trainer = Trainer(settings, task, workers.devices[0])
        for arm, seed in jobs:
            run = trainer.run(arm, seed, lambda: bar.advance(shown))
            store.put(arm, run)
            yield run
        return

    context = multiprocessing.get_context("spawn")  # a fork of a process with CUDA or threads would hang
    steps = context.Value("q", 0)
    devices = context.SimpleQueue()
    for device in workers.devices[:count]:
        devices.put(str(device))
    pool = ProcessPoolExecutor(count, context, _start, (settings, store, workers.threads, devices, steps))
    try:
        pending: set[Future[Run]] = {pool.submit(_make, arm, seed) for arm, seed in jobs}
        while pending:
            finished, pending = wait(pending, POLL, return_when="FIRST_COMPLETED")
            bar.update(shown, completed=steps.value)
            for future in finished:
                yield future.result()
        pool.shutdown()
    except KeyboardInterrupt:
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    except BrokenProcessPool:
        raise Problem(
            "a process ended without a word, perhaps for want of memory; finished runs are kept. Give the same "
            "command again, with fewer --processes if need be"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)  # waits for those that are under way: their runs are kept


# ------------------------------------------------------------------------------------------------------------
# In the other processes
# ------------------------------------------------------------------------------------------------------------

_worker: dict[str, Any] = {}


def _start(settings: Settings, store: Store, threads: int, devices: Any, steps: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends this process
    torch.set_num_threads(threads)
    _worker.update(settings=settings, store=store, device=torch.device(devices.get()), steps=steps, trainer=None)


def _make(arm: Arm, seed: int) -> Run:
    # Not in _start, where an error would only break the pool.
    if _worker["trainer"] is None:
        settings = _worker["settings"]
        _worker["trainer"] = Trainer(settings, tasks.load(settings), _worker["device"])

    def tell() -> None:
        with _worker["steps"].get_lock():
            _worker["steps"].value += 1

    run: Run = _worker["trainer"].run(arm, seed, tell)
    _worker["store"].put(arm, run)
    return run


def _bar(console: Console) -> Progress:
    """A bar with the time left. Where the output is no terminal, rich prints it once, at the end."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[runs]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        expand=True,
        speed_estimate_period=600,
    )
