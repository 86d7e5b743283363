"""The CUDA kernels' queue, checked by spin over every interleaving of a few blocks: tests/native/queue.pml."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

MODEL = Path(__file__).parent / "native/queue.pml"

pytestmark = pytest.mark.skipif(
    shutil.which("spin") is None or shutil.which("gcc") is None,
    reason="needs spin (apt-get install spin) and gcc",
)


def check(folder, **settings) -> str:
    """What the verifier prints after it has been through all states."""
    definitions = [f"-D{name}={value}" for name, value in settings.items()]
    for command in (
        ["spin", *definitions, "-a", str(MODEL)],
        ["gcc", "-O2", "-w", "-DSAFETY", "-o", "pan", "pan.c"],
        ["./pan", "-m200000", "-w22"],
    ):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "max search depth too small" not in done.stdout
    return done.stdout


# One block that does everything; more blocks than run; more tiles than blocks; a last component that is smaller than
# the others; components of one tile.
@pytest.mark.parametrize(
    ("blocks", "resident", "tiles", "per_component"),
    [(1, 1, 4, 2), (2, 1, 4, 2), (2, 2, 4, 2), (3, 2, 3, 2), (3, 2, 2, 2), (2, 2, 3, 1)],
)
@pytest.mark.parametrize("form", [1, 2])
def test_no_block_waits_forever_and_every_tile_gets_its_due(form, blocks, resident, tiles, per_component, tmp_path):
    report = check(tmp_path, FORM=form, BLOCKS=blocks, RESIDENT=resident, TILES=tiles, PER_COMPONENT=per_component)
    assert "errors: 0" in report, report
    assert "unreached in proctype Block" in report  # the list of dead code is there, hence the search was complete


@pytest.mark.parametrize("rule", [*range(1, 9)])
def test_the_model_can_fail(rule, tmp_path):
    report = check(tmp_path, FORM=2, BLOCKS=2, RESIDENT=2, TILES=3, PER_COMPONENT=2, BREAK=rule)
    assert re.search("assertion violated|invalid end state", report), report
    assert "errors: 1" in report
