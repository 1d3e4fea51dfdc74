"""Drives one server with one work's load, once, and says what that gave."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redis_table import read_table
from server_process import ServerProcess, first_line, on_core, started
from works import Server, Work

HERE = Path(__file__).parent

PYTHON_LOAD = [sys.executable, str(HERE / "load.py")]

# A load that is this busy may be what is measured, instead of the server.
BUSY = 0.95

# Seconds that a load may take longer than it is told to. It gives up by itself after 20 without an
# answer, but redis-benchmark waits for ever.
PATIENCE = 45.0

# Of a process: for its connections, and for what it has open besides.
_OTHER_DESCRIPTORS = 64

# redis-benchmark's first run: it warms the server up, and tells how many requests take how long.
_FIRST_REQUESTS = 20_000


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


@dataclass(frozen=True)
class _RedisRun:
    """What one run of redis-benchmark said, and what CPU it took."""

    rate: float
    p50: float
    p99: float
    server_cpu: float
    load_cpu: float


class Driver:
    """Builds what is written in C, starts servers and measures them."""

    def __init__(self, *, server_core: int | None, load_core: int | None) -> None:
        self._server_core = server_core
        self._load_core = load_core
        # Inherited by servers and load: one descriptor for each connection, and a few more.
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        self.descriptors = sys.maxsize if most == resource.RLIM_INFINITY else most
        self.notes: list[str] = []
        self._load = self._tls_load = PYTHON_LOAD
        slow = (
            "is made by Python, which is too slow to saturate the servers; a server that waits "
            "costs more for each request, so these figures compare with no others, and no goal is "
            "judged by them"
        )
        try:
            self._load = [_built("load")]
        except RuntimeError as error:
            self.notes.append(f"{error}: the load {slow}")
        else:
            try:
                self._tls_load = [_built("load", "-DTLS", "-lssl", "-lcrypto")]
            except RuntimeError as error:
                self.notes.append(f"with OpenSSL, {error}: the load with TLS {slow}")
        self._floor: str | None = None
        try:
            self._floor = _built("floor")
        except RuntimeError as error:
            self.notes.append(f"{error}: no floor")
        self.redis_benchmark = shutil.which("redis-benchmark")
        if self.redis_benchmark is None:
            self.notes.append("no redis-benchmark: lines come from the suite's own load")
        if server_core is None:
            self.notes.append("one core only: servers and load share it")

    def can(self, work: Work) -> bool:
        """Whether the descriptors suffice for its connections, of the server and of the load."""
        return int(work.load["conns"]) + _OTHER_DESCRIPTORS <= self.descriptors

    def load_is_slow(self, work: Work) -> bool:
        """Whether Python makes its load."""
        return self._program(work.load) is PYTHON_LOAD

    def _program(self, load: Mapping[str, Any]) -> list[str]:
        return self._tls_load if "tls" in load else self._load

    def title(self, work: Work) -> str:
        """The work's title, with the load that it got if that depends on the machine."""
        if work.load["kind"] != "redis":
            return work.title
        load = "redis-benchmark" if self.redis_benchmark else "the suite's own load"
        return f"{work.title}, by {load}"

    def start(self, servers: Sequence[Server], work: Work, stack: ExitStack) -> list[ServerProcess]:
        """Those of *servers* that start, ready for *work*; *stack* ends them."""
        commands: dict[str, list[str]] = {}
        for server in servers:
            if server.program != "floor":
                program = [sys.executable, str(HERE / "peers" / f"{server.program}.py")]
            elif self._floor is not None:
                program = [self._floor]
            else:
                continue
            commands[server.name] = [*program, server.mode, work.serve]
        return started(commands, self._server_core, stack)

    def measure(self, server: ServerProcess, work: Work, *, seconds: float, warmup: float) -> Round:
        """One round. `RuntimeError` or `OSError` if it gave nothing."""
        kind = work.load["kind"]
        if kind == "hold":
            return self._memory(server, work)
        if kind == "redis" and self.redis_benchmark is not None:
            found = self._redis(server, work, seconds=seconds)
            if found is not None:
                return found
            self.redis_benchmark = None
            note = "redis-benchmark is older than 6.2: lines come from the suite's own load"
            self.notes.append(note)
            print(note)
        load = dict(work.load)
        if kind == "redis":
            load |= {"kind": "echo", "framing": "line", "size": 6}
        return self._own_load(server, work, load, seconds=seconds, warmup=warmup)

    def _own_load(
        self, server: ServerProcess, work: Work, load: dict[str, Any], **times: float
    ) -> Round:
        found = self._run_load(server, load, **times)
        if not found["count"]:
            raise RuntimeError(f"{server.name}: nothing was answered")
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
        return [*self._program(load), kind, *(f"{name}={value}" for name, value in load.items())]

    def _run_load(self, server: ServerProcess, load: dict[str, Any], **times: float) -> Any:
        command = self._command(server, load, **times)
        return json.loads(self._output(command, server, sum(times.values())))

    def _output(self, command: Sequence[str], server: ServerProcess, seconds: float) -> str:
        try:
            result = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                preexec_fn=on_core(self._load_core),
                timeout=seconds + PATIENCE,
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(
                f"{server.name}: the load was not done after {seconds + PATIENCE:g} s"
            ) from None
        if result.returncode:
            raise RuntimeError(f"{server.name}: {result.stderr.strip()}")
        return result.stdout

    def _redis(self, server: ServerProcess, work: Work, *, seconds: float) -> Round | None:
        """As many requests as take about *seconds*; None where redis-benchmark is too old."""
        first = self._redis_run(server, work, _FIRST_REQUESTS, seconds)
        if first is None:
            return None
        pipeline = int(work.load["pipeline"])
        # It also connects and asks for CONFIG, which is no part of a request: a run of one burst on
        # each connection is taken off, with its requests.
        few = int(work.load["conns"]) * pipeline
        short = self._redis_run(server, work, few, seconds)
        # Whole bursts, for it sends no others.
        requests = max(_FIRST_REQUESTS, int(first.rate * seconds)) // pipeline * pipeline
        long = self._redis_run(server, work, requests, seconds)
        assert short is not None
        assert long is not None
        counted = requests - few
        return Round(
            cpu_us=(long.server_cpu - short.server_cpu) / counted * 1e6,
            rate=long.rate,
            p50=long.p50,
            p99=long.p99,
            load_share=(long.load_cpu - short.load_cpu) / (counted / long.rate),
        )

    def _redis_run(
        self, server: ServerProcess, work: Work, requests: int, seconds: float
    ) -> _RedisRun | None:
        assert self.redis_benchmark is not None
        command = [self.redis_benchmark, "-h", "127.0.0.1", "-p", str(server.port)]
        command += ["-c", str(work.load["conns"]), "-P", str(work.load["pipeline"])]
        command += ["-t", "ping_inline", "-n", str(requests), "--csv"]
        cpu, own = server.cpu_seconds(), _children_cpu()
        table = read_table(self._output(command, server, seconds))
        if table is None:
            return None
        cpu, own = server.cpu_seconds() - cpu, _children_cpu() - own
        return _RedisRun(*table, server_cpu=cpu, load_cpu=own)

    def _memory(self, server: ServerProcess, work: Work) -> Round:
        conns = int(work.load["conns"])
        # What the first connections bring about (code, pools) is not theirs.
        self._run_load(server, {"kind": "echo", "conns": 50}, seconds=0.1, warmup=0)
        before = server.resident_memory()
        with (
            tempfile.TemporaryFile() as errors,
            subprocess.Popen(
                self._command(server, dict(work.load)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                preexec_fn=on_core(self._load_core),
            ) as holder,
        ):
            assert holder.stdout is not None
            try:
                ready = first_line(holder.stdout, PATIENCE) == "ready\n"
                memory = server.resident_memory() - before
            except TimeoutError:
                ready = False
            finally:
                holder.kill()
            if not ready:
                holder.wait()
                errors.seek(0)
                words = errors.read().decode().strip() or f"not within {PATIENCE:g} s"
                raise RuntimeError(f"{server.name}: does not hold {conns} connections: {words}")
            return Round(memory=memory / conns)


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _built(name: str, *options: str) -> str:
    """Where the C program *name* can be run, built with *options*. `RuntimeError`: why it cannot
    be built here.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError("no C compiler")
    with tempfile.TemporaryDirectory() as directory:
        built = Path(directory, name)
        command = [compiler, "-O2", "-o", str(built), str(HERE / f"{name}.c"), *options]
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, preexec_fn=on_core(None)
        )
        if result.returncode:
            lines = result.stderr.strip().splitlines() or ["without a word"]
            # What follows the first error is often brought about by it.
            told = next((line for line in lines if "error" in line), lines[-1])
            raise RuntimeError(f"{Path(compiler).name} fails on {name}.c ({told})")
        # Open, it can be run when the directory is gone: so nothing is left, however this ends.
        program = f"/proc/{os.getpid()}/fd/{os.open(built, os.O_RDONLY)}"
    try:
        # It ends at once, for it is not told what to do.
        subprocess.run([program], capture_output=True, check=False)
    except OSError as error:
        raise RuntimeError(f"{name} cannot be run ({error.strerror})") from None
    return program
