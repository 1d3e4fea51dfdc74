"""Two worker processes beside one, and beside none: requests, and the CPU of each side.

    scripts/bench --workers [--seconds 3] [--rounds 3]

Where servers and load share the cores, requests a second say what is left for the servers. So
the CPU that a request costs is what counts, of the servers (with the supervisor) and of the load:
more of it would be the price of several processes. How much of it the busiest worker had says how
evenly the kernel dealt.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from driver import HERE
from driver import _built as built

ROOT = HERE.parent

FORMS: Mapping[str, list[str]] = {
    "no workers": [],
    "1 worker": ["--workers", "1"],
    "2 workers": ["--workers", "2"],
    "2 workers, --reuse-port": ["--workers", "2", "--reuse-port"],
}

LOADS: Mapping[str, dict[str, Any]] = {
    "echo, 100 connections": {"kind": "echo", "conns": 100, "active": 100},
    "short connections, 50 at a time": {"kind": "connect", "conns": 50},
}


@dataclass(frozen=True, kw_only=True)
class Round:
    """What one round gave."""

    rate: float
    """Requests a second."""
    server_us: float
    """CPU of all the server's processes, microseconds a request."""
    load_us: float
    """CPU of the load, microseconds a request."""
    server_cores: float
    """Cores that the servers kept busy."""
    busiest: float
    """The busiest worker's part of the workers' CPU."""


def cpu_seconds(pid: int) -> float:
    """CPU that a process has used, all its threads."""
    # clock_getcpuclockid(3) of its number, which Python does not have.
    return time.clock_gettime(~pid << 3 | 2)


@contextmanager
def served(options: list[str]) -> Iterator[tuple[int, list[int]]]:
    """An echo server: its port, and its processes, the supervisor first."""
    command = [sys.executable, "-m", "trioreactor", "serve", "trioreactor.classic:echo"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [*command, *options, "--bind", "127.0.0.1:0", "--log-level", "warning"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"127\.0\.0\.1:(\d+)", process.stdout.readline())
            assert found
            task = Path(f"/proc/{process.pid}/task")
            children = [
                int(child)
                for thread in task.iterdir()
                for child in (thread / "children").read_text().split()
            ]
            yield int(found[1]), [process.pid, *children]
        finally:
            process.terminate()


def measure(load: list[str], port: int, pids: list[int], seconds: float) -> Round:
    """One round."""
    before = [cpu_seconds(pid) for pid in pids]
    begun = time.monotonic()
    done = subprocess.run(
        [*load, f"port={port}", f"pid={pids[-1]}", f"seconds={seconds}", "warmup=0.2"],
        capture_output=True,
        text=True,
        check=True,
    )
    took = time.monotonic() - begun
    used = [cpu_seconds(pid) - cpu for pid, cpu in zip(pids, before, strict=True)]
    found = json.loads(done.stdout)
    rate = found["count"] / found["seconds"]
    # The window is a part of the whole, in which the servers work as ever.
    cores = sum(used) / took
    workers = used[1:] or used
    return Round(
        rate=rate,
        server_us=cores / rate * 1e6,
        load_us=found["load_cpu"] / found["count"] * 1e6,
        server_cores=cores,
        busiest=max(workers) / sum(workers),
    )


def main() -> None:
    """Print a table for each load."""
    parser = argparse.ArgumentParser(description="Two worker processes beside one.")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median is given")
    arguments = parser.parse_args()
    try:
        load = [built("load")]
    except RuntimeError as error:
        print(f"{error}: the load is made by Python, which is too slow for two workers")
        load = [sys.executable, str(HERE / "load.py")]
    print(f"{len(os.sched_getaffinity(0))} cores, which servers and load share")
    for title, options in LOADS.items():
        print(f"\n{title}\n")
        print(
            "| server | requests/s | server CPU, us each | load CPU, us each | server cores |"
            " busiest worker |"
        )
        print("|---|---|---|---|---|---|")
        kind = options["kind"]
        rest = [f"{name}={value}" for name, value in options.items() if name != "kind"]
        for name, form in FORMS.items():
            with served(form) as (port, pids):
                rounds = [
                    measure([*load, kind, *rest], port, pids, arguments.seconds)
                    for _ in range(arguments.rounds)
                ]

            def median(field: str, rounds: list[Round] = rounds) -> float:
                return statistics.median(getattr(each, field) for each in rounds)

            print(
                f"| {name} | {median('rate'):.0f} | {median('server_us'):.1f} | "
                f"{median('load_us'):.1f} | {median('server_cores'):.2f} | "
                f"{median('busiest') * 100:.0f} % |",
                flush=True,
            )


if __name__ == "__main__":
    main()
