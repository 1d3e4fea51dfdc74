"""Measures trioreactor beside its peers: every work with every server, in one run.

Every server runs in a process of its own on one core, the load on another. The rounds are
interleaved, so that a disturbance of the machine meets all, and medians are compared. What is
compared is mostly the server's CPU time for each request, user and system: it does not depend on
how fast the load is. README.md beside this file says more.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import chart
import goals
import report
from driver import Driver, Round
from server_process import two_cores
from works import SERVERS, WORKS, Server, Work


def _chosen(
    patterns: Sequence[str] | None, names: Sequence[str], parser: argparse.ArgumentParser
) -> set[str]:
    chosen: set[str] = set()
    for pattern in patterns or ["*"]:
        found = fnmatch.filter(names, pattern)
        if not found:
            parser.error(f"{pattern!r} is none of: {', '.join(names)}")
        chosen.update(found)
    return chosen


def run_works(
    driver: Driver, works: Sequence[Work], servers: Sequence[Server], rounds: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """All rounds of a group of works, by name."""
    found = {work.name: {server.name: list[Round]() for server in servers} for work in works}
    # What the memory of earlier connections left would make room for the next ones.
    fresh = works[0].load["kind"] == "hold"
    for _ in range(rounds if fresh else 1):
        running = driver.start(servers, works[0])
        try:
            for _ in range(1 if fresh else rounds):
                for server in running:
                    for work in works:
                        try:
                            own = driver.measure(server, work, seconds=seconds, warmup=seconds / 4)
                        except RuntimeError as error:
                            print(f"{work.name}: a round is missing: {error}", file=sys.stderr)
                        else:
                            found[work.name][server.name].append(own)
        finally:
            for server in running:
                server.stop()
    return {work.name: report.summary(work, found[work.name]) for work in works}


def _groups(works: Sequence[Work]) -> Iterable[list[Work]]:
    """Those of one group together, the others alone."""
    for _, group in groupby(works, key=lambda work: work.group or work.name):
        yield list(group)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer servers and works, shorter rounds: 3 minutes"
    )
    parser.add_argument("--work", action="append", metavar="PATTERN", help="may be repeated")
    parser.add_argument("--server", action="append", metavar="PATTERN", help="may be repeated")
    parser.add_argument("--seconds", type=float, help="a round of one server")
    parser.add_argument("--rounds", type=int, help="of each server (default: 11, quick: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything found")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw it: .svg or .png")
    parser.add_argument("--list", action="store_true", help="list works and servers")
    return parser


def main() -> int:
    """Run what was asked for and print the tables."""
    parser = _parser()
    options = parser.parse_args()
    chosen = _chosen(options.work, [work.name for work in WORKS], parser)
    works = [
        w for w in WORKS if w.name in chosen and (w.quick or options.work or not options.quick)
    ]
    chosen = _chosen(options.server, [server.name for server in SERVERS], parser)
    servers = [
        s for s in SERVERS if s.name in chosen and (s.quick or options.server or not options.quick)
    ]
    if options.list:
        for work in works:
            print(f"{work.name:14}{work.title}")
        print("\n".join(server.name for server in servers))
        return 0
    # Rather many short rounds than few long ones: a machine's moods last for seconds.
    rounds = options.rounds or (5 if options.quick else 11)
    seconds = options.seconds or (0.15 if options.quick else 0.25)
    begun = time.monotonic()
    results: dict[str, Any] = {
        "machine": report.machine(),
        "versions": report.versions(),
        "rounds": rounds,
        "seconds": seconds,
        "works": {},
    }
    server_core, load_core = two_cores()
    with tempfile.TemporaryDirectory() as build:
        driver = Driver(Path(build), server_core=server_core, load_core=load_core)
        results["notes"] = driver.notes
        print("\n".join(report.head(results)))
        for group in _groups(works):
            for name, found in run_works(driver, group, servers, rounds, seconds).items():
                results["works"][name] = found
                print("\n".join(report.table(found)), flush=True)
    results["goals"] = goals.judged(results["works"])
    print("\n".join(goals.lines(results["goals"])))
    print(f"\n{time.monotonic() - begun:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.chart:
        chart.draw(results, options.chart)
    return 0


if __name__ == "__main__":
    sys.exit(main())
