"""Drives one server with one work's load, once, and says what that gave."""

from __future__ import annotations

import csv
import io
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server_process import ServerProcess, started
from works import Server, Work

HERE = Path(__file__).parent

# A load that is this busy may be what is measured, instead of the server.
BUSY = 0.95


@dataclass(frozen=True, kw_only=True)
class Round:
    """What one round of one server gave. What a work does not measure is None."""

    cpu_us: float | None = None
    """Server CPU (user and system), microseconds a request."""
    rate: float | None = None
    """Requests a second."""
    p50: float | None = None
    """Microseconds from request to answer, as p99."""
    p99: float | None = None
    mb_per_s: float | None = None
    memory: float | None = None
    """Memory, bytes a connection."""
    load_share: float | None = None
    """The part of its core that the load used."""


class Driver:
    """Builds what is written in C, starts servers and measures them."""

    def __init__(self, build: Path, *, server_core: int | None, load_core: int | None) -> None:
        self._server_core = server_core
        self._load_core = load_core
        # Inherited by servers and load: one descriptor for each connection, and a few more.
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        self.most_connections = most - 64
        load = _built("load", build)
        self._load = [str(load)] if load else [sys.executable, str(HERE / "load.py")]
        self._floor = _built("floor", build)
        self.redis_benchmark = shutil.which("redis-benchmark")
        self.notes: list[str] = []
        if load is None:
            self.notes.append(
                "no C compiler: the load is made by Python, and may be the bottleneck"
            )
        if self._floor is None:
            self.notes.append("no C compiler: no floor")
        if self.redis_benchmark is None:
            self.notes.append("no redis-benchmark: lines are pipelined by the suite's own load")
        if server_core is None:
            self.notes.append("one core only: servers and load share it")

    def start(self, servers: Sequence[Server], work: Work) -> list[ServerProcess]:
        """Those of *servers* that start, ready for *work*."""
        return started([self._start(server, work) for server in servers if self._can(server)])

    def _can(self, server: Server) -> bool:
        return server.program != "floor" or self._floor is not None

    def _start(self, server: Server, work: Work) -> ServerProcess:
        program = (
            [str(self._floor)]
            if server.program == "floor"
            else [sys.executable, str(HERE / "peers" / f"{server.program}.py")]
        )
        command = [*program, server.mode, work.serve]
        return ServerProcess(server.name, command, self._server_core)

    def measure(self, server: ServerProcess, work: Work, *, seconds: float, warmup: float) -> Round:
        """One round."""
        kind = work.load["kind"]
        if kind == "hold":
            return self._memory(server, work)
        if kind == "redis" and self.redis_benchmark is not None:
            return self._redis(server, work, seconds=seconds)
        load = dict(work.load)
        if kind == "redis":
            load |= {"kind": "echo", "framing": "line", "size": 6}
        found = self._run_load(server, load, seconds=seconds, warmup=warmup)
        share = found["load_cpu"] / found["seconds"]
        rate = found["count"] / found["seconds"]
        if work.metric == "mb_per_s":
            return Round(mb_per_s=rate / 1e6, load_share=share)
        return Round(
            cpu_us=found["server_cpu"] / found["count"] * 1e6,
            rate=rate,
            p50=found["p50"],
            p99=found["p99"],
            load_share=share,
        )

    def _command(self, server: ServerProcess, load: dict[str, Any], **more: object) -> list[str]:
        load = load | {"port": server.port, "pid": server.process.pid} | more
        kind = load.pop("kind")
        return [*self._load, kind, *(f"{name}={value}" for name, value in load.items())]

    def _run_load(self, server: ServerProcess, load: dict[str, Any], **more: object) -> Any:
        command = self._command(server, load, **more)
        return json.loads(self._output(command, server))

    def _output(self, command: Sequence[str], server: ServerProcess) -> str:
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=self._on_load_core,
        )
        if result.returncode:
            raise RuntimeError(f"{server.name}: {result.stderr.strip()}")
        return result.stdout

    @property
    def _on_load_core(self) -> Callable[[], None] | None:
        core = self._load_core
        return None if core is None else lambda: os.sched_setaffinity(0, {core})

    def _redis(self, server: ServerProcess, work: Work, *, seconds: float) -> Round:
        """As many requests as take about *seconds*, found by a run before."""
        # Its first run warms the server up, too.
        rate = self._redis_run(server, work, 20_000)[0]
        requests = max(20_000, int(rate * seconds))
        cpu, own = server.cpu_seconds(), _children_cpu()
        rate, p50, p99 = self._redis_run(server, work, requests)
        cpu, own = server.cpu_seconds() - cpu, _children_cpu() - own
        return Round(
            cpu_us=cpu / requests * 1e6,
            rate=rate,
            p50=p50,
            p99=p99,
            load_share=own / (requests / rate),
        )

    def _redis_run(
        self, server: ServerProcess, work: Work, requests: int
    ) -> tuple[float, float, float]:
        """Requests a second, and the two percentiles in microseconds."""
        assert self.redis_benchmark is not None
        command = [self.redis_benchmark, "-h", "127.0.0.1", "-p", str(server.port)]
        command += ["-c", str(work.load["conns"]), "-P", str(work.load["pipeline"])]
        command += ["-t", "ping_inline", "-n", str(requests), "--csv"]
        out = self._output(command, server)
        # What it says before its table (that there is no CONFIG) is no part of it.
        table = out[out.index('"test"') :]
        (row,) = csv.DictReader(io.StringIO(table))
        milliseconds = [float(row[f"{p}_latency_ms"]) for p in ("p50", "p99")]
        return float(row["rps"]), milliseconds[0] * 1000, milliseconds[1] * 1000

    def _memory(self, server: ServerProcess, work: Work) -> Round:
        conns = min(int(work.load["conns"]), self.most_connections)
        # What the first connections bring about (code, pools) is not theirs.
        self._run_load(server, {"kind": "echo", "conns": 50}, seconds=0.1, warmup=0)
        before = server.resident_memory()
        load = dict(work.load) | {"conns": conns}
        with subprocess.Popen(
            self._command(server, load),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=self._on_load_core,
        ) as holder:
            assert holder.stdout is not None
            if holder.stdout.readline() != "ready\n":
                raise RuntimeError(f"{server.name}: does not hold {conns} connections")
            return Round(memory=(server.resident_memory() - before) / conns)


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _built(name: str, build: Path) -> Path | None:
    """The C program *name*, or None if it cannot be built here."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    program = build / name
    command = [compiler, "-O2", "-o", str(program), str(HERE / f"{name}.c")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        print(f"{name}.c: {result.stderr.strip()}", file=sys.stderr)
        return None
    return program
