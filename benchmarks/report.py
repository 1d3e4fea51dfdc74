"""What the suite found, as data and as tables."""

from __future__ import annotations

import os
import platform
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from driver import BUSY, Round
from works import METRICS, OURS, Work

# Works in which more is better.
_MORE_IS_BETTER = {"mb_per_s"}

_PACKAGES = (
    "trioreactor",
    "trio",
    "anyio",
    "uvloop",
    "twisted",
    "tornado",
    "gevent",
    "easynetwork",
)


def system() -> str:
    """The kernel's name and the first two numbers of its version; the rest is the machine's own."""
    return " ".join([platform.system(), *re.findall(r"^\d+\.\d+", platform.release())])


def machine() -> dict[str, Any]:
    """What this was measured on."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "system": system(),
        "virtual": "hypervisor" in cpuinfo.read_text() if cpuinfo.exists() else None,
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Of everything that is compared."""
    found: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def summary(work: Work, rounds: Mapping[str, Sequence[Round]], *, title: str) -> dict[str, Any]:
    """One work's medians, and our ratios to every server of which there is more than nothing."""
    servers = {name: {"rounds": len(own), **_medians(own)} for name, own in rounds.items() if own}
    return {
        "title": title,
        "metric": work.metric,
        "servers": servers,
        "ratios": {
            ours: {
                name: servers[ours][work.metric] / server[work.metric]
                for name, server in servers.items()
                if name != ours and server[work.metric] > 0
            }
            for ours in OURS
            if ours in servers
        },
        "rounds": {name: [_given(r) for r in own] for name, own in rounds.items()},
    }


def _given(found: Round) -> dict[str, float]:
    return {name: value for name, value in asdict(found).items() if value is not None}


def _medians(rounds: Sequence[Round]) -> dict[str, float]:
    medians: dict[str, float] = {}
    for field in fields(Round):
        values = [value for r in rounds if (value := getattr(r, field.name)) is not None]
        if values:
            medians[field.name] = statistics.median(values)
    return medians


def table(found: Mapping[str, Any]) -> Iterable[str]:
    """The lines of one work's table."""
    metric = found["metric"]
    servers = found["servers"]
    timed = any("p50" in server for server in servers.values())
    columns = [METRICS[metric]]
    if timed:
        columns += ["requests/s", "p50 us", "p99 us"]
    ratios = [f"{ours.split()[-1]} /" for ours in OURS if ours in servers]
    columns += ratios
    yield ""
    yield found["title"]
    if not servers:
        yield "(nothing was measured)"
        return
    yield f"{'server':24}" + "".join(f"{column:>{max(12, len(column) + 2)}}" for column in columns)
    widths = [max(12, len(column) + 2) for column in columns]
    for name, server in servers.items():
        cells = [f"{server[metric]:,.{0 if metric == 'memory' else 2}f}"]
        if timed:
            cells += [f"{server[key]:,.0f}" for key in ("rate", "p50", "p99")]
        for ours in OURS:
            if ours in servers:
                ratio = found["ratios"][ours].get(name)
                cells.append("" if ratio is None else f"{ratio:.2f}")
        row = "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        busy = server.get("load_share", 0) > BUSY and metric == "cpu_us"
        yield f"{name:24}{row}{'  (load at its limit)' if busy else ''}"
    if ratios:
        more = "more" if metric in _MORE_IS_BETTER else "less"
        yield f"({', '.join(ratios)}: ours divided by this row; {more} is better)"
    elif metric in _MORE_IS_BETTER:
        yield "(more is better)"


def head(results: Mapping[str, Any]) -> Iterable[str]:
    """What was measured, where and how."""
    where = results["machine"]
    yield (
        f"{where['cpu']}{', virtual' if where['virtual'] else ''}, {where['cores']} cores; "
        f"{where['system']}; Python {where['python']}"
    )
    yield ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    yield f"medians of {results['rounds']} interleaved rounds of {results['seconds']:g} s"
    yield from results["notes"]
