"""The model of L2 against cases that can be worked out by hand."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("rich.console")
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from l2_model import TILE_BYTES, traffic


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("form", [1, 2])
def test_bounds(form, late):
    sizes = [40 * TILE_BYTES, 100, 3 * TILE_BYTES + 5, 700 * TILE_BYTES]
    total = sum(sizes)
    assert traffic(sizes, form, 2 * total, late=late, blocks=7) == 2.0  # everything stays in the cache
    assert traffic(sizes, form, 0, late=late, blocks=7) == 3.0  # nothing does
    assert 2.0 < traffic(sizes, form, 100 * TILE_BYTES, late=late, blocks=7) < 3.0


def test_form_1_saves_what_fits_the_cache_at_the_end():
    sizes = [10 * TILE_BYTES] * 30
    assert traffic(sizes, 1, 100 * TILE_BYTES, blocks=1) == pytest.approx(3.0 - 100 / 300, abs=0.02)


def test_form_2_scales_small_components_from_the_cache_and_the_sooner_the_better():
    sizes = [10 * TILE_BYTES] * 300
    assert traffic(sizes, 2, 100 * TILE_BYTES, blocks=4) == 2.0
    late, early = (traffic(sizes, 2, 100 * TILE_BYTES, late=late, blocks=40) for late in (True, False))
    assert late < early
