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
from works import METRICS, MORE_IS_BETTER, OURS, Work

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
    path = Path("/proc/cpuinfo")
    cpuinfo = path.read_text() if path.exists() else ""
    model = re.search(r"^model name\s*:\s*(.*\S)", cpuinfo, re.MULTILINE)
    return {
        "cpu": model[1] if model else platform.processor(),
        "cores": os.cpu_count(),
        "system": system(),
        "virtual": "hypervisor" in cpuinfo if cpuinfo else None,
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
    ratios = [f"{ours.split()[-1]} /" for ours in found["ratios"]]
    columns += ratios
    yield ""
    yield found["title"]
    if not servers:
        yield "(nothing was measured)"
        return
    widths = [max(12, len(column) + 2) for column in columns]
    yield f"{'server':24}{_cells(columns, widths)}"
    for name, server in servers.items():
        cells = [f"{server[metric]:,.{0 if metric == 'memory' else 2}f}"]
        if timed:
            cells += [f"{server[key]:,.0f}" for key in ("rate", "p50", "p99")]
        for own in found["ratios"].values():
            cells.append(f"{own[name]:.2f}" if name in own else "")
        busy = server.get("load_share", 0) > BUSY and metric == "cpu_us"
        yield f"{name:24}{_cells(cells, widths)}{'  (load at its limit)' if busy else ''}"
    if ratios:
        more = "more" if metric in MORE_IS_BETTER else "less"
        yield f"({', '.join(ratios)}: ours divided by this row; {more} is better)"
    elif metric in MORE_IS_BETTER:
        yield "(more is better)"


def _cells(cells: Iterable[str], widths: Iterable[int]) -> str:
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def where(machine: Mapping[str, Any]) -> str:
    """What this was measured on, in one line."""
    return (
        f"{machine['cpu']}{', virtual' if machine['virtual'] else ''}, {machine['cores']} cores; "
        f"{machine['system']}; Python {machine['python']}"
    )


def head(results: Mapping[str, Any]) -> Iterable[str]:
    """What was measured, where and how."""
    yield where(results["machine"])
    yield ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    yield f"medians of {results['rounds']} interleaved rounds of {results['seconds']:g} s"
    yield from results["notes"]
