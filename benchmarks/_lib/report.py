"""Results from timings: shares of the machine's ceiling, speed-up over torch's methods, table, JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .launches import SetActivity
from .measure import Ceilings, Timing
from .providers import TORCH


@dataclass(frozen=True)
class Row:
    """One provider in one case.

    Attributes:
        key: the provider's short name.
        label: its name in the table.
        min_ms: fastest round.
        median_ms: median round.
        host_ms: CUDA only: median time until the call returned to Python.
        gbps: gradient bytes / min_ms. Not the traffic, which differs between providers.
        of_ceiling: the case's floor / min_ms, 0 to about 1.
        speedup: torch provider -> (its min / this min, its median / this median).
        samples_ms: every round.
    """

    key: str
    label: str
    min_ms: float
    median_ms: float
    host_ms: float | None
    gbps: float
    of_ceiling: float
    speedup: dict[str, tuple[float, float]]
    samples_ms: list[float]

    @property
    def is_torch(self) -> bool:
        return self.key in {p.key for p in TORCH}


@dataclass(frozen=True)
class CaseResult:
    """One shape set in one dtype with none, half or all clipped: providers measured in the same rounds.

    Attributes:
        set: name of the shape set.
        description: what it is.
        dtype: of the gradients.
        tensors: how many.
        nbytes: gradient bytes N.
        rotate: gradient sets in turn.
        clipped: "none", "half" or "all".
        clipped_share: f, share of the bytes that are rescaled.
        ceilings_gbps: N / fastest round of each ceiling, over all cases of the set.
        floor_ms: (1 - f) * fastest read + f * fastest in-place write of N bytes.
        rows: the providers.
        backends: what the package says serves each of our backends, by name.
    """

    set: str
    description: str
    dtype: str
    tensors: int
    nbytes: int
    rotate: int
    clipped: str
    clipped_share: float
    ceilings_gbps: dict[str, float]
    floor_ms: float
    rows: list[Row]
    backends: dict[str, str]


def rows_and_floor(
    labels: dict[str, str], timings: dict[str, Timing], ceilings: dict[str, Timing], nbytes: int, share: float
) -> tuple[list[Row], dict[str, float], float]:
    """The rows, the ceilings in GB/s and the floor in ms, from one case's timings.

    Args:
        labels: provider key -> name in the table, in the order of the rows.
        timings: by provider key.
        ceilings: by ceiling, scaled to ``nbytes``.
        nbytes: gradient bytes N.
        share: f, share of them that is clipped.
    """
    read = min(ceilings[key].min for key in Ceilings.READ)
    write = min(ceilings[key].min for key in Ceilings.WRITE)
    floor = (1.0 - share) * read + share * write
    references = [p.key for p in TORCH if p.key in timings]
    rows = []
    for key, label in labels.items():
        timing = timings[key]
        rows.append(
            Row(
                key=key,
                label=label,
                min_ms=timing.min,
                median_ms=timing.median,
                host_ms=timing.host_median,
                gbps=_gbps(nbytes, timing.min),
                of_ceiling=floor / timing.min,
                speedup={
                    other: (timings[other].min / timing.min, timings[other].median / timing.median)
                    for other in references
                },
                samples_ms=timing.samples,
            )
        )
    return rows, {key: _gbps(nbytes, t.min) for key, t in ceilings.items()}, floor


def as_json(
    metadata: dict[str, Any],
    results: Sequence[CaseResult],
    activity: Sequence[SetActivity],
    skipped: Sequence[str],
) -> dict[str, Any]:
    """All of it as plain dictionaries and lists."""
    return {
        "metadata": metadata,
        "results": [asdict(r) for r in results],
        "launches": [asdict(a) for a in activity],
        "skipped": list(skipped),
    }


def print_metadata(console: Console, metadata: dict[str, Any]) -> None:
    """The head of the report, one fact a line, and how to read what follows."""
    for key, value in metadata.items():
        _say(console, f"{key:<16}{value}")
    _say(
        console,
        "\nGB/s: gradient bytes N / min. ceiling: floor / min, the floor as measured in the same rounds.",
    )
    ways = ", ".join(p.key for p in TORCH)
    _say(console, f"{ways}: how many times as fast as that method of torch's, by min and by median.")


def print_backends(console: Console, result: CaseResult) -> None:
    """What serves each of our backends on this set."""
    _say(console, f"\n{result.set}: {result.description}; {result.rotate} gradient set(s) in turn")
    for name, explanation in result.backends.items():
        _say(console, f"  {name}: " + explanation.replace("\n", "\n    "))


def print_case(console: Console, result: CaseResult) -> None:
    """One table, with the ceilings it is measured against."""
    _say(
        console,
        f"\n{result.set}, {result.dtype}, {result.clipped} clipped: {result.tensors} tensors, N = "
        f"{result.nbytes / 1e6:.1f} MB, {result.clipped_share:.0%} of the bytes rescaled",
    )
    ceilings = ", ".join(f"{key} {_short(gbps)}" for key, gbps in result.ceilings_gbps.items())
    _say(console, f"floor {result.floor_ms:.4g} ms; ceilings, N over the time for N bytes: {ceilings} GB/s")
    # The host's column of a GPU fits 120 columns only where the others stand closer.
    with_host = result.rows[0].host_ms is not None
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=with_host, pad_edge=False)
    references = [p.key for p in TORCH if p.key in result.rows[0].speedup]
    table.add_column("", no_wrap=True)
    headings = ["min ms", "median", *(["host"] if with_host else []), "GB/s", "ceiling"]
    for heading in (*headings, *references):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in result.rows:
        table.add_row(
            row.label,
            f"{row.min_ms:.4g}",
            f"{row.median_ms:.4g}",
            *([_milliseconds(row.host_ms)] if with_host else []),
            _short(row.gbps),
            f"{row.of_ceiling:.0%}",
            *("/".join(map(_short, row.speedup[key])) for key in references),
            style="" if row.is_torch else "bold",
        )
    console.print(table)


def print_activity(console: Console, activity: Sequence[SetActivity], labels: dict[str, str]) -> None:
    """One table: what one call of each provider makes the GPU do, a column a set.

    Args:
        console: where to.
        activity: of each set.
        labels: provider key -> name in the table, in the order of the rows.
    """
    _say(console, "\nKernels launched by one call; sync: the host waits for the device; -: not looked at")
    # A few sets at a time: what torch does can take many characters.
    for first in range(0, len(activity), 4):
        shown = activity[first : first + 4]
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        table.add_column("", no_wrap=True)
        for one in shown:
            table.add_column(f"{one.set}\n{one.dtype}, {one.clipped}", justify="right")
        for key, label in labels.items():
            table.add_row(label, *(str(one.by_provider.get(key, "-")) for one in shown))
        console.print(table)


def _say(console: Console, text: str) -> None:
    # Neither markup nor wrapping: names hold brackets, and whoever pipes this to a file greps whole lines.
    console.print(text, markup=False, soft_wrap=True)


def _short(ratio: float) -> str:
    """Three digits, or as many as stand before the point."""
    return f"{ratio:.2f}" if ratio < 9.995 else f"{ratio:.1f}" if ratio < 99.95 else f"{ratio:.0f}"


def _milliseconds(ms: float | None) -> str:
    """Three digits, and no exponent."""
    return "-" if ms is None else f"{ms:.3g}" if ms < 999.5 else f"{ms:.0f}"


def _gbps(nbytes: int, ms: float) -> float:
    return nbytes / ms / 1e6
