"""A server that is measured: in a process of its own, on a core of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def two_cores() -> tuple[int | None, int | None]:
    """One core for the servers, one for the load; None for each on a machine that has only one."""
    cores = sorted(os.sched_getaffinity(0))
    return (cores[0], cores[-1]) if len(cores) > 1 else (None, None)


class ServerProcess:
    """A program that prints the port where it listens, and serves until it is ended."""

    def __init__(self, name: str, command: Sequence[str], core: int | None) -> None:
        self.name = name
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        if core is not None:
            os.sched_setaffinity(self.process.pid, {core})
        self._port: int | None = None

    @property
    def port(self) -> int:
        """Where it listens. `RuntimeError`, with its last words, if it has ended instead."""
        if self._port is None:
            assert self.process.stdout is not None
            line = self.process.stdout.readline()
            if not line:
                _, errors = self.process.communicate()
                words = errors.strip().splitlines() or ["it ended without a word"]
                raise RuntimeError(f"{self.name}: {words[-1]}")
            self._port = int(line)
        return self._port

    def cpu_seconds(self) -> float:
        """CPU that the process has used, all its threads, to the nanosecond."""
        # clock_getcpuclockid(3) of its number, which Python does not have.
        return time.clock_gettime(~self.process.pid << 3 | 2)

    def resident_memory(self) -> int:
        """Its resident memory in bytes."""
        fields = Path(f"/proc/{self.process.pid}/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")

    def stop(self) -> None:
        """End it and wait."""
        self.process.kill()
        self.process.communicate()


def python_server(program: Path, name: str, core: int | None) -> ServerProcess:
    """``python PROGRAM NAME``."""
    return ServerProcess(name, [sys.executable, str(program), name], core)


def start_servers(program: Path, names: tuple[str, ...], core: int | None) -> list[ServerProcess]:
    """Those of the servers that start; one may lack the library it is made with."""
    return started([python_server(program, name, core) for name in names])


def started(servers: Sequence[ServerProcess]) -> list[ServerProcess]:
    """Those that listen; of the others it is told why not."""
    listening: list[ServerProcess] = []
    for server in servers:
        try:
            assert server.port
        except RuntimeError as error:
            print(f"left out: {error}", file=sys.stderr)
        else:
            listening.append(server)
    return listening
