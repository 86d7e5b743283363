"""Prints what compare.py and optimizer_step.py have written as JSON, a line for each set and case.

``python benchmarks/digest.py FILE.json...``, for where only the end of a long output can be seen, or a run was ended
before it had printed everything: both write their files after every set.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from _lib.launches import Activity
from _lib.providers import TORCH

LONGEST = 160  # characters of a reason
Lines = list[Sequence[str]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the digest of each file; of a file that isn't there, that."""
    for path in map(Path, sys.argv[1:] if arguments is None else arguments):
        if not path.exists():
            print(f"{path.name}: not written")
            continue
        written = json.loads(path.read_text())
        print(f"---- {path.name}")
        print("\n".join(of_steps(written) if "machine" in written else of_clips(written)))


def of_clips(written: dict[str, Any]) -> list[str]:
    """The lines about a file of compare.py: what was left out, launches, host times; and the times, last."""
    results: list[dict[str, Any]] = written["results"]
    text = [f"skipped: {reason}"[:LONGEST] for reason in written["skipped"]]
    keys = list(dict.fromkeys(row["key"] for result in results for row in result["rows"]))
    torchs = [p.key for p in TORCH if p.key in keys]
    call = "clipper/" if any(key.startswith("clipper/") for key in keys) else "function/"
    own = [key for key in keys if key.startswith(call)]
    names = [_short(key) for key in own]

    launches: Lines = [["launches of one call", "", *names]]
    for one in written["launches"]:
        found = {key: str(Activity(**counts)) for key, counts in one["by_provider"].items()}
        launches.append([_title(one), one["clipped"], *(found.get(key, "-") for key in own)])
    hosts: Lines = [["host, ms until the call returned", "", *names]]
    times: Lines = [["fastest round, ms", "", "N MB", "floor", *torchs, *names, "floor/best of ours"]]
    for result in results:
        rows = {row["key"]: row for row in result["rows"]}
        measured = [rows[key]["min_ms"] for key in own if key in rows]
        share = f"{result['floor_ms'] / min(measured):.0%}" if measured else "-"
        head = [_title(result), result["clipped"]]
        least = [_ms(rows[key]["min_ms"]) if key in rows else "-" for key in (*torchs, *own)]
        times.append([*head, f"{result['nbytes'] / 1e6:.4g}", _ms(result["floor_ms"]), *least, share])
        hosts.append([*head, *(_ms(rows[key]["host_ms"]) if key in rows else "-" for key in own)])
    if any(row["host_ms"] is not None for result in results for row in result["rows"]):
        last = {line[0]: line for line in hosts[1:]}  # it hardly depends on the case
        text += ["", *_columns([hosts[0], *last.values()])]
    if len(launches) > 1:
        text += ["", *_columns(launches)]
    return [*text, "", *_columns(times)]


def of_steps(written: dict[str, Any]) -> list[str]:
    """The lines about a file of optimizer_step.py."""
    results: list[dict[str, Any]] = written["results"]
    keys = list(dict.fromkeys(key for result in results for key in result["ms"]))
    lines: Lines = [["fastest round, ms", "", *keys, "ceiling"]]
    for result in results:
        least = [_ms(min(result["ms"][key])) if key in result["ms"] else "-" for key in keys]
        lines.append([_title(result), result["case"], *least, _ms(result["floor_ms"])])
    return _columns(lines)


def _title(result: dict[str, Any]) -> str:
    return f"{result['set']} {result['dtype']}"


def _short(key: str) -> str:
    """Ours without the call, and without the backend where its form says enough."""
    spec = key.partition("/")[2]
    return spec.removeprefix("cuda:") if spec.startswith("cuda:") else f"our {spec}"


def _ms(ms: float | None) -> str:
    return "-" if ms is None else f"{ms:.3f}" if ms < 9.9995 else f"{ms:.4g}"


def _columns(lines: Iterable[Sequence[str]]) -> list[str]:
    """Cells below one another, the first at the left."""
    lines = list(lines)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        " ".join(
            cell.ljust(width) if i < 1 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


if __name__ == "__main__":
    main()
