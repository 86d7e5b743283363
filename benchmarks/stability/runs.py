"""Finished runs on disk: one JSON file each, there whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .arms import Arm
from .problem import Problem
from .settings import LATER

Run = dict[str, Any]


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file that is there whole or, should anything fail, as it was before.

    Raises:
        Problem: it can't be written, as on a full disk.
    """
    data = content.encode() if isinstance(content, str) else content
    unfinished = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            unfinished = Path(file.name)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # or a crash might leave the new name with nothing behind it
        os.chmod(unfinished, 0o644)
        os.replace(unfinished, path)
    except OSError as error:
        raise Problem(
            f"cannot write {path}: {error.strerror or error}. Nothing that was finished is lost: put that right and "
            "give the same command again, which goes on from there"
        ) from None
    finally:
        if unfinished is not None:
            unfinished.unlink(missing_ok=True)


class Store:
    """The folder of one experiment.

    `experiment.json` says what its runs have in common. A folder with other settings is refused, so that no report
    ever mixes two experiments.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps a second program out of the folder, and cleans up what one that was killed left.

        Raises:
            Problem: another one is at work in it, or it can't be written to.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = open(self.folder / ".lock", "w")  # noqa: SIM115  # below
        except OSError as error:
            raise Problem(f"--out {self.folder}: cannot write there: {error.strerror}") from None
        with lock:
            try:
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except ImportError:  # Windows: nobody looks
                pass
            except OSError:
                raise Problem(f"--out {self.folder}: another finetune_stability.py is at work there") from None
            for left in self.folder.rglob("*.part"):
                left.unlink()
            yield

    def claim(self, identity: dict[str, Any]) -> None:
        """Makes the folder this experiment's.

        Raises:
            Problem: it is another's; says in what they differ.
        """
        path = self.folder / "experiment.json"
        found = read(path)
        if found is None:
            write_whole(path, json.dumps(identity, indent=1))
            return
        found, wanted = {**LATER, **found}, {**LATER, **json.loads(json.dumps(identity))}
        differing = [
            f"{key} {found.get(key)!r}, now {wanted.get(key)!r}"
            for key in {**found, **wanted}
            if found.get(key) != wanted.get(key)
        ]
        if differing:
            raise Problem(
                f"--out {self.folder} holds runs of another experiment ({'; '.join(differing)}): name another"
            )

    def path(self, arm: Arm, seed: int) -> Path:
        """Of a run's file."""
        return self.folder / "runs" / f"{arm.slug}-seed{seed}.json"

    def get(self, arm: Arm, seed: int) -> Run | None:
        """A finished run; None where there is none, or what is there was not made by this program or is damaged."""
        run = read(self.path(arm, seed))
        return run if run is not None and run.get("arm") == arm.label and run.get("seed") == seed else None

    def put(self, arm: Arm, run: Run) -> None:
        """Keeps a finished run."""
        write_whole(self.path(arm, run["seed"]), json.dumps(run))

    def finished(self, arms: Iterable[Arm], seeds: Iterable[int]) -> dict[str, list[Run]]:
        """Label -> its finished runs, by seed."""
        seeds = list(seeds)
        return {arm.label: [run for seed in seeds if (run := self.get(arm, seed)) is not None] for arm in arms}


def read(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file; None where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    except OSError as error:
        raise Problem(f"cannot read {path}: {error.strerror or error}") from None
    return found if isinstance(found, dict) else None
