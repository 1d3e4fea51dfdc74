"""Measures trioreactor beside its peers: every work with every server, in one run.

Every server runs in a process of its own on one core, the load on another. The rounds are
interleaved, so that a disturbance of the machine meets all, and medians are compared. What is
compared is mostly the server's CPU time for each request, user and system, of a server that is
saturated; one that is loaded in part costs more for each request, so a load that is too slow (that
in Python, where there is no C compiler) tells of no goal. README.md beside this file says more.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn

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


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: pass 1 or more")
    return number


def _duration(text: str) -> float:
    number = float(text)
    if not (number > 0 and math.isfinite(number)):
        raise argparse.ArgumentTypeError(f"{text}: pass more than 0 seconds")
    return number


def run_works(
    driver: Driver, works: Sequence[Work], servers: Sequence[Server], rounds: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """All rounds of a group of works, by name."""
    found = {work.name: {server.name: list[Round]() for server in servers} for work in works}
    # What the memory of earlier connections left would make room for the next ones.
    fresh = works[0].load["kind"] == "hold"
    for _ in range(rounds if fresh else 1):
        with ExitStack() as stack:
            running = driver.start(servers, works[0], stack)
            for _ in range(1 if fresh else rounds):
                for server in running:
                    for work in works:
                        try:
                            own = driver.measure(server, work, seconds=seconds, warmup=seconds / 4)
                        except (RuntimeError, OSError) as error:
                            words = server.last_words()
                            said = f"; it said: {words}" if words else ""
                            text = f"{work.name}: a round is missing: {error}{said}"
                            print(text, file=sys.stderr)
                        else:
                            found[work.name][server.name].append(own)
            for server in running:
                if words := server.last_words():
                    print(f"{works[0].name}: {server.name} said: {words}", file=sys.stderr)
    return {
        work.name: report.summary(work, found[work.name], title=driver.title(work))
        for work in works
    }


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
    parser.add_argument("--seconds", type=_duration, help="a round of one server")
    parser.add_argument("--rounds", type=_count, help="of each server (default: 11, quick: 5)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write everything found, after every work"
    )
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw it: .svg or .png")
    parser.add_argument("--list", action="store_true", help="list works and servers")
    return parser


def _write(results: Mapping[str, Any], path: Path) -> None:
    """Whole or not at all: who is ended meanwhile keeps what was written before."""
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(results, indent=1) + "\n")
    beside.replace(path)


def _ended(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)


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
    # As by Ctrl-C: what is half done is cleared away.
    signal.signal(signal.SIGTERM, _ended)
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
    driver = Driver(server_core=server_core, load_core=load_core)
    if too_many := [work.name for work in works if not driver.can(work)]:
        driver.notes.append(
            f"left out, for a process may have only {driver.descriptors} descriptors "
            f"(ulimit -n): {', '.join(too_many)}"
        )
    works = [work for work in works if driver.can(work)]
    results["notes"] = driver.notes
    slow = {work.name for work in works if driver.load_is_slow(work)}
    results["loads"] = {w.name: "load.py" if w.name in slow else "load.c" for w in works}
    if options.json:
        try:
            _write(results, options.json)
        except OSError as error:
            parser.error(f"--json: {error}")
    print("\n".join(report.head(results)), flush=True)
    for group in _groups(works):
        for name, found in run_works(driver, group, servers, rounds, seconds).items():
            results["works"][name] = found
            print("\n".join(report.table(found)), flush=True)
        if options.json:
            _write(results, options.json)
    judged = {name: found for name, found in results["works"].items() if name not in slow}
    if not judged:
        print("\nno goal is judged, for the load was too slow")
    else:
        results["goals"] = goals.judged(judged)
        results["goals_not_judged"] = goals.not_judged(judged)
        print("\n".join(goals.lines(results["goals"], results["goals_not_judged"])))
    print(f"\n{time.monotonic() - begun:.0f} s")
    if options.json:
        _write(results, options.json)
    if options.chart:
        chart.draw(results, options.chart)
    return 0


if __name__ == "__main__":
    sys.exit(main())
