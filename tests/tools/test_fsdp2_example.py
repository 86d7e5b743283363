"""The FSDP2 example, started as its docstring says: it ends cleanly, learns, and says what it did."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINE = re.compile(r"step +(\d+)  loss (\S+)  total norm (\S+)  (\d+)% of (\d+) components clipped")


def run(processes, *options):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    # Without OMP_NUM_THREADS the launcher says that it sets it. All warnings are to be seen.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default", "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *launcher, str(ROOT / "examples/fsdp2_train.py"), *map(str, options)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


# Alone, where nothing is sharded, and as a group.
@pytest.mark.parametrize("processes", [1, 2])
def test_example_from_end_to_end(processes, tmp_path):
    folder = tmp_path / "checkpoint"
    done = run(processes, "--steps", 12, "--every", 6, "--batch-size", 4, "--checkpoint", folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = [LINE.fullmatch(line) for line in done.stdout.splitlines()]
    assert all(lines), done.stdout
    steps, losses, totals, shares, components = zip(*(map(float, line.groups()) for line in lines), strict=True)
    assert steps == (1, 6, 12)
    assert losses[2] < losses[1] < losses[0] - 0.3
    assert all(total > 0 for total in totals)
    assert shares[0] > 0
    assert set(components) == {54}  # 12 in each of 4 layers, 6 outside of them
    assert len(list(folder.glob("*.distcp"))) == processes
    assert (folder / ".metadata").is_file()
