"""Measures one gradient set: the methods that can serve it, rounds for each case, the results."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch

from .gradients import Gradients, clipped_share
from .launches import SetActivity, activity_of
from .machine import available_bytes
from .measure import BEYOND_CACHES, CEILING_LIMIT, Ceilings, Clock, Timing, Variant, interleave
from .options import chosen_backends, chosen_torch
from .providers import Provider, explain, ours, set_environment
from .report import CaseResult, rows_and_floor
from .shapes import ShapeSet

# Norms after a clip may be this far from what they should be: bfloat16 rounds norm, coefficient and product.
CHECK_TOLERANCE = 0.02
# A call that takes the host longer than this issues more kernels than a profiler likes to hold.
PROFILED_MS = 100.0


def measure_set(
    shape_set: ShapeSet, dtype: torch.dtype, clock: Clock, options: argparse.Namespace, skipped: list[str]
) -> Iterator[CaseResult]:
    """One result for each case; what can't be measured goes to ``skipped``, with the reason."""
    title = f"{shape_set.name} {_name(dtype)}"
    device = options.device
    nbytes = shape_set.nbytes(dtype)
    rotate = sets_in_turn(nbytes, options)
    restorable = set(options.clipped) != {"none"}
    needed = nbytes * (rotate + restorable) + 2 * min(nbytes, CEILING_LIMIT)
    available = available_bytes(device)
    if needed > 0.9 * available:  # the rest is for temporaries, torch's float32 copies of halves among them
        skipped.append(
            f"{title}: takes {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB available"
            + (" (--clipped none takes a copy less)" if restorable else "")
        )
        return
    gradients = Gradients(shape_set, dtype, device, rotate, options.seed, restorable)
    providers, served = _who_can(shape_set, gradients, options, title, skipped)
    ceilings = Ceilings(nbytes, device)
    timings: dict[str, dict[str, Timing]] = {}
    best: dict[str, Timing] = defaultdict(Timing)  # what the memory can do is the same in every case
    try:
        for case in options.clipped:
            able = _who_clips_right(providers, gradients, case, f"{title}, {case} clipped", skipped)
            variants = [variant(p, gradients, case) for p in able] + ceilings.variants()
            timings[case] = interleave(variants, clock, options.rounds, options.warmup, options.warm, options.seconds)
            for key, timing in ceilings.take(timings[case]).items():
                best[key].samples += timing.samples
    finally:
        set_environment({})
    for case in options.clipped:
        share = clipped_share(shape_set, case)
        labels = {p.key: p.label for p in providers if p.key in timings[case]}
        if not labels:
            continue
        rows, ceilings_gbps, floor_ms = rows_and_floor(labels, timings[case], best, nbytes, share)
        yield CaseResult(
            set=shape_set.name,
            description=shape_set.description,
            dtype=_name(dtype),
            tensors=len(shape_set.shapes),
            nbytes=nbytes,
            rotate=rotate,
            clipped=case,
            clipped_share=share,
            ceilings_gbps=ceilings_gbps,
            floor_ms=floor_ms,
            rows=rows,
            backends=served,
        )


def count_launches(
    shape_set: ShapeSet, dtype: torch.dtype, options: argparse.Namespace, results: Sequence[CaseResult]
) -> SetActivity:
    """What one call of each way makes the GPU do, from a run of its own: a profiler would slow down timed ones.

    Args:
        shape_set: names and shapes.
        dtype: of the gradients.
        options: of the run.
        results: of the same set and dtype; ways that took the host too long there are left out.
    """
    # Every method has the case "all"; only our launches depend on the case.
    case = "all" if "all" in options.clipped else options.clipped[-1]
    host_ms = {row.key: row.host_ms for result in results if result.clipped == case for row in result.rows}
    gradients = Gradients(shape_set, dtype, options.device, 1, options.seed, case != "none")
    found = {}
    try:
        for provider in _all_providers(shape_set, options):
            if (host_ms.get(provider.key) or PROFILED_MS) < PROFILED_MS:
                one = variant(provider, gradients, case)
                found[provider.key] = activity_of(lambda one=one: one.before(0), one.call)
    finally:
        set_environment({})
    return SetActivity(shape_set.name, _name(dtype), case, found)


def variant(provider: Provider, gradients: Gradients, case: str) -> Variant:
    """One provider ready to be called on these gradients."""

    def before(turn: int) -> None:
        set_environment(provider.environment)
        gradients.use(turn)
        if case != "none":
            gradients.restore()

    set_environment(provider.environment)
    call = provider.prepare(gradients.named, gradients.cap(case))
    return Variant(provider.key, before, call, lambda: gradients.current)


def sets_in_turn(nbytes: int, options: argparse.Namespace) -> int:
    """Gradient sets to take turns: with ``auto`` as many as exceed the caches, at most 8; one when warm."""
    if options.rotate != "auto":
        return int(options.rotate)
    return 1 if options.warm else min(8, BEYOND_CACHES // nbytes + 1)


def _all_providers(shape_set: ShapeSet, options: argparse.Namespace) -> list[Provider]:
    own = [p for spec in chosen_backends(options) for p in ours(spec, options.calls)]
    return chosen_torch(options, shape_set) + own


def _who_can(
    shape_set: ShapeSet, gradients: Gradients, options: argparse.Namespace, title: str, skipped: list[str]
) -> tuple[list[Provider], dict[str, str]]:
    """Torch's ways and those of our backends that serve here; what serves each of ours, in the package's words."""
    refused: set[str] = set()
    served: dict[str, str] = {}
    for spec in chosen_backends(options):
        try:
            served[spec] = explain(gradients.named, spec)
        except (RuntimeError, ValueError) as refusal:
            skipped.append(f"{title}, backend {spec}: {refusal}")
            refused.add(spec)
    return [p for p in _all_providers(shape_set, options) if p.key.partition("/")[2] not in refused], served


def _who_clips_right(
    providers: Sequence[Provider], gradients: Gradients, case: str, title: str, skipped: list[str]
) -> list[Provider]:
    """The providers whose clip leaves the expected norms; the others aren't timed."""
    able = []
    for provider in providers:
        if not provider.componentwise and case == "half":
            continue
        expected = gradients.expected_norms(case, provider.componentwise)
        try:
            one = variant(provider, gradients, case)
            one.before(0)
            one.call()
            found = gradients.current_norms()
        except Exception as error:  # whatever it is, the other methods are still measured
            words = str(error).strip().partition("\n")[0]
            skipped.append(f"{title}, {provider.label}: {type(error).__name__}: {words}")
            continue
        wrong = [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if not _close(a, b)]
        if wrong:
            skipped.append(
                f"{title}, {provider.label}: wrong gradients in {len(wrong)} of {len(found)} tensors, first "
                f"{gradients.named[wrong[0]][0]}: norm {found[wrong[0]]:g} instead of {expected[wrong[0]]:g}"
            )
        else:
            able.append(provider)
    return able


def _close(found: float, expected: float) -> bool:
    return abs(found - expected) <= CHECK_TOLERANCE * expected  # false for NaN


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
