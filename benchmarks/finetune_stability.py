"""The experiment of Yang & Ma: the stability of fine-tuning with clipping by component, globally, or not at all.

    python benchmarks/finetune_stability.py --quick --processes 2     # none and component:0.01, 4 seeds each
    python benchmarks/finetune_stability.py --full --processes 2      # all arms x 20 seeds: hours
    python benchmarks/finetune_stability.py --arms none component:0.05 matched:0.05 "EMA(warmup_steps=20)" --seeds 10
    python benchmarks/finetune_stability.py --model bert-large-uncased --task rte --seeds 30 --processes 2

Every run is saved as a file when it ends. The same command continues where it stopped, and with more arms or seeds
performs only the missing runs.
"""

from __future__ import annotations

import os
import shlex
import sys
from argparse import Namespace
from pathlib import Path

# torch's threads wait for each other by spinning; see examples/finetune_demo.py.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from rich.console import Console

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))  # the demo's data and models

from stability import calibrate, models, options, report, tasks
from stability.arms import Arm
from stability.problem import Problem
from stability.runs import Run, Store
from stability.schedule import missing, run_all


def run(args: Namespace, console: Console) -> None:
    """Settles what is to be run, calibrates, runs, reports."""
    settings, arms, seeds, calibration_seeds = options.settle(args)
    workers = options.workers(args)
    models.check(settings.model)
    with console.status("reading the data"):
        task = tasks.load(settings)
    store = Store(args.out or Path("stability_out") / settings.task)
    with store.locked():
        store.claim({**settings.as_dict(), "data_hash": task.fingerprint, "calibration_seeds": calibration_seeds})
        console.print(f"{task.about} {len(task.train)} + {len(task.dev)} examples, {task.source}", soft_wrap=True)
        console.print(
            f"failed: {task.metric} not above {task.cutoff:.3f}; runs are kept in {store.folder}", soft_wrap=True
        )

        def make(wanted: list[Arm]) -> dict[str, list[Run]]:
            own = Store(store.folder / "calibration")
            run_all(missing(own, wanted, calibration_seeds), own, settings, task, workers, console, "calibrating")
            return own.finished(wanted, calibration_seeds)

        settled, chosen = calibrate.choose(arms, settings.lr, make)
        about = report.facts(settings, task, arms, seeds, calibration_seeds, str(workers.devices[0]))
        try:
            run_all(missing(store, settled, seeds), store, settings, task, workers, console, "judging")
        finally:
            # Also of what there is when it is cut short; but then the error is what the user should see.
            finished = store.finished(settled, seeds)
            stopped = sys.exc_info()[0] is not None
            if any(finished.values()):
                try:
                    found = report.write(
                        store.folder, about, arms, finished, chosen, shlex.join(["python", *sys.argv])
                    )
                except Problem:
                    if not stopped:
                        raise
        report.show(console, found)
        console.print(f"Report: {store.folder / 'report.md'}", soft_wrap=True)


def main() -> None:
    """The command."""
    args = options.parser(__doc__.splitlines()[0]).parse_args()
    try:
        run(args, Console(highlight=False))
    except Problem as problem:
        print(f"finetune_stability.py: error: {problem}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
