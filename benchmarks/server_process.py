"""A server that is measured: in a process of its own, on a core of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def two_cores() -> tuple[int | None, int | None]:
    """One core for the servers, one for the load; None for each on a machine that has only one."""
    cores = sorted(os.sched_getaffinity(0))
    return (cores[0], cores[-1]) if len(cores) > 1 else (None, None)


class ServerProcess:
    """``python PROGRAM NAME``, which prints the port where it listens."""

    def __init__(self, program: Path, name: str, core: int | None) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, str(program), name], stdout=subprocess.PIPE, text=True
        )
        if core is not None:
            os.sched_setaffinity(self.process.pid, {core})
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.process.stdout.close()
            raise RuntimeError(f"{name} did not start")
        self.port = int(line)

    def cpu_seconds(self) -> float:
        """CPU that the process has used, to the nanosecond."""
        fields = Path(f"/proc/{self.process.pid}/schedstat").read_text().split()
        return int(fields[0]) / 1e9

    def stop(self) -> None:
        """End it and wait."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def start_servers(program: Path, names: tuple[str, ...], core: int | None) -> list[ServerProcess]:
    """Those of the servers that start; one may lack the library it is made with."""
    servers: list[ServerProcess] = []
    for name in names:
        try:
            servers.append(ServerProcess(program, name, core))
        except RuntimeError as error:
            print(f"left out: {error}")
    return servers
