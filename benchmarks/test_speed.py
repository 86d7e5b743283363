"""Speed beside torch, as a pytest-benchmark suite: ``pytest benchmarks --benchmark-only``.

Small sets only, so that it takes about a minute; compare.py has large sets, interleaved rounds and ratios. Each group
of the table is one set and case: torch's methods, ours, and reading or rescaling as many flat bytes, the minimum.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from _lib.gradients import Gradients
from _lib.measure import Ceilings, Clock, clock_for
from _lib.providers import TORCH, Provider, ours
from _lib.shapes import SETS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROTATE = 4
ROUNDS, WARMUP = 15, 2

# From launch overhead alone (20,000 tensors of 64 elements) over a few kilobytes each to a small real model.
SMALL_SETS = ("tiny-20000", "lora-384", "minilm-l6")
PROVIDERS = (*TORCH, *ours())
# What bounds each case: reading everything, or reading and writing it.
FLOORS = {"none": Ceilings.READ, "all": Ceilings.WRITE}


@functools.lru_cache(maxsize=1)  # pytest takes one set after the other, so one in memory at a time is enough
def _gradients(set_name: str) -> Gradients:
    return Gradients(SETS[set_name], SETS[set_name].dtype, DEVICE, ROTATE)


@functools.cache
def _clock() -> Clock:
    return clock_for(DEVICE)


def _run(benchmark: BenchmarkFixture, group: str, before: Callable[[], None], call: Callable[[], object]) -> None:
    def settled() -> None:
        before()
        _clock().settle(_clock().scratch)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    def finished() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = group
    benchmark.pedantic(finished, setup=settled, rounds=ROUNDS, warmup_rounds=WARMUP)


@pytest.mark.parametrize("provider", PROVIDERS, ids=[p.key for p in PROVIDERS])
@pytest.mark.parametrize("case", ["none", "all"])
@pytest.mark.parametrize("set_name", SMALL_SETS)
def test_clip(benchmark: BenchmarkFixture, set_name: str, case: str, provider: Provider) -> None:
    gradients = _gradients(set_name)
    turns = itertools.count()

    def before() -> None:
        gradients.use(next(turns))
        gradients.restore()

    call = provider.prepare(gradients.named, gradients.cap(case))
    benchmark.extra_info["gradient_bytes"] = SETS[set_name].nbytes()
    _run(benchmark, f"{set_name}, {case} clipped", before, call)


@pytest.mark.parametrize("case", ["none", "all"])
@pytest.mark.parametrize("set_name", SMALL_SETS)
@pytest.mark.parametrize("way", [0, 1])
def test_ceiling(benchmark: BenchmarkFixture, set_name: str, case: str, way: int) -> None:
    key = FLOORS[case][way]
    variant = next(v for v in Ceilings(SETS[set_name].nbytes(), DEVICE).variants() if v.key == key)
    benchmark.name = f"test_ceiling[{set_name}-{case}-{key}]"
    _run(benchmark, f"{set_name}, {case} clipped", lambda: None, variant.call)
