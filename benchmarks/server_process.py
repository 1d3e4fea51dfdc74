"""A server that is measured: in a process of its own, on a core of its own."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

PATIENCE = 20.0
"""Seconds. A start takes one or two even on a slow machine."""

_LAST_WORDS = 4096
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def two_cores() -> tuple[int | None, int | None]:
    """One core for the servers, one for the load; None for each on a machine that has only one."""
    cores = sorted(os.sched_getaffinity(0))
    return (cores[0], cores[-1]) if len(cores) > 1 else (None, None)


def on_core(core: int | None) -> Callable[[], None]:
    """A ``preexec_fn``: the child runs on *core*, and does not outlive this process."""
    parent = os.getpid()

    def prepare() -> None:
        # By the kernel, which does so however this process ends, SIGKILL included; a server that
        # watched a pipe for that would need a thread or a descriptor more, in what is measured.
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        if core is not None:
            os.sched_setaffinity(0, {core})

    return prepare


def first_line(stream: IO[bytes], patience: float) -> str:
    """What a pipe says first; empty if it ends instead. `TimeoutError` after *patience* seconds."""
    deadline = time.monotonic() + patience
    line = b""
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([stream], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError
        data = os.read(stream.fileno(), 4096)
        if not data:
            break
        line += data
    return line.decode()


class ServerProcess:
    """A program that prints the port where it listens, and serves until it is ended."""

    def __init__(self, name: str, command: Sequence[str], core: int | None) -> None:
        self.name = name
        # A file, for a pipe that nobody reads would be full one day.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 `stop` closes it
        self._told = 0
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            preexec_fn=on_core(core),
            # Ctrl-C is for the suite, which ends it; it would have a traceback to tell.
            start_new_session=True,
        )
        self._port: int | None = None

    @property
    def port(self) -> int:
        """Where it listens. `RuntimeError`, with its last words, if it does not say so."""
        if self._port is None:
            assert self.process.stdout is not None
            try:
                line = first_line(self.process.stdout, PATIENCE)
            except TimeoutError:
                raise RuntimeError(f"{self.name}: no port within {PATIENCE:g} s") from None
            if not line:
                self.process.kill()
                self.process.wait()
                raise RuntimeError(f"{self.name}: {self.last_words() or 'it ended without a word'}")
            try:
                self._port = int(line)
            except ValueError:
                raise RuntimeError(f"{self.name}: {line.strip()!r} is no port") from None
        return self._port

    def last_words(self) -> str | None:
        """The last line that it wrote to stderr; None if nothing came since the last call."""
        descriptor = self._errors.fileno()
        size = os.fstat(descriptor).st_size
        start = max(self._told, size - _LAST_WORDS)
        # Its place in the file is the server's, too.
        lines = os.pread(descriptor, size - start, start).decode(errors="replace").split("\n")
        self._told = size
        words = [line.strip() for line in lines if line.strip()]
        return words[-1] if words else None

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
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._errors.close()


def start_servers(
    program: Path, names: Sequence[str], core: int | None, stack: ExitStack
) -> list[ServerProcess]:
    """Start ``python PROGRAM NAME`` for each name; those that listen. *stack* ends them all."""
    commands = {name: [sys.executable, str(program), name] for name in names}
    return started(commands, core, stack)


def started(
    commands: dict[str, list[str]], core: int | None, stack: ExitStack
) -> list[ServerProcess]:
    """Start the servers, all at once; those that listen. Of the others it is told why not: one may
    lack the library it is made with. *stack* ends them all.
    """
    servers: list[ServerProcess] = []
    for name, command in commands.items():
        server = ServerProcess(name, command, core)
        stack.callback(server.stop)
        servers.append(server)
    listening: list[ServerProcess] = []
    for server in servers:
        try:
            assert server.port
        except RuntimeError as error:
            print(f"left out: {error}", file=sys.stderr)
        else:
            listening.append(server)
    return listening
