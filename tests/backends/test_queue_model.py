"""The CUDA kernels' queue, checked by spin over every interleaving of a few blocks: _support/native/queue.pml."""

import shutil
import subprocess
from pathlib import Path

import pytest

MODEL = Path(__file__).parents[1] / "_support/native/queue.pml"

pytestmark = pytest.mark.skipif(
    shutil.which("spin") is None or shutil.which("gcc") is None,
    reason="needs spin (apt-get install spin) and gcc",
)


def check(folder, cycles=False, **settings) -> str:
    """What the verifier prints after it has been through all states; cycles: after it has looked for endless runs."""
    definitions = [f"-D{name}={value}" for name, value in settings.items()]
    for command in (
        ["spin", *definitions, "-a", str(MODEL)],
        [
            "gcc",
            "-O0",
            "-w",
            "-DNP" if cycles else "-DSAFETY",
            "-o",
            "pan",
            "pan.c",
        ],  # -O2 takes longer than it saves
        ["./pan", "-m200000", "-w20", *(["-l"] if cycles else [])],
    ):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "max search depth too small" not in done.stdout
    return done.stdout


# One block that does everything; more blocks than run; more tiles than blocks; a last component that is smaller than
# the others; more blocks than tiles; components of one tile; components that all workers of a block add up.
@pytest.mark.parametrize(
    ("blocks", "resident", "tiles", "per_component", "many"),
    [
        (1, 1, 4, 2, 1),
        (2, 1, 4, 2, 9),
        (2, 2, 4, 2, 9),
        (3, 2, 3, 2, 9),
        (3, 2, 2, 2, 9),
        (2, 2, 3, 1, 9),
        (2, 2, 3, 2, 1),
    ],
)
@pytest.mark.parametrize("form", [1, 2])
def test_no_block_waits_forever_and_every_tile_gets_its_due(
    form, blocks, resident, tiles, per_component, many, tmp_path
):
    settings = {"BLOCKS": blocks, "RESIDENT": resident, "TILES": tiles, "PER_COMPONENT": per_component, "MANY": many}
    report = check(tmp_path, FORM=form, **settings)
    assert "errors: 0" in report, report
    assert "Search not completed" not in report


@pytest.mark.parametrize("form", [1, 2])
def test_nothing_goes_on_forever(form, tmp_path):
    report = check(tmp_path, cycles=True, FORM=form, BLOCKS=2, RESIDENT=2, TILES=3, PER_COMPONENT=2)
    assert "errors: 0" in report, report
    assert "Search not completed" not in report


# What spin says of each rule that is broken; in words of the assertion, so that it fails for the reason meant.
@pytest.mark.parametrize(
    ("form", "rule", "complaint"),
    [
        (1, 1, "done[n]==0"),
        (2, 1, "done[n]==0"),
        (2, 2, "list[n]==0"),
        (2, 3, "assertion violated ((coef["),
        (1, 4, "assertion violated partial["),
        (2, 5, "list[n]==0"),
        (2, 6, "list[n]==0"),
        (1, 7, "assertion violated (scaled[n]=="),
        (2, 7, "invalid end state"),
        (1, 8, "sum_ticket==0"),
        (2, 8, "sum_ticket==0"),
        (1, 9, "assertion violated partial["),
        (2, 10, "assertion violated"),
        (2, 11, "invalid end state"),
        (2, 13, "invalid end state"),
        (2, 14, "invalid end state"),
    ],
)
def test_the_model_can_fail(form, rule, complaint, tmp_path):
    resident = 1 if rule in (11, 13) else 2
    size = {"TILES": 6, "MANY": 1} if rule == 14 else {"TILES": 3}
    report = check(tmp_path, FORM=form, BLOCKS=2, RESIDENT=resident, PER_COMPONENT=2, BREAK=rule, **size)
    assert "errors: 1" in report, report
    assert complaint in report, report


def test_the_search_for_endless_runs_can_fail(tmp_path):
    report = check(tmp_path, cycles=True, FORM=2, BLOCKS=2, RESIDENT=2, TILES=3, PER_COMPONENT=2, BREAK=12)
    assert "non-progress cycle (at depth" in report, report
