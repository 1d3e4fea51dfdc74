"""A child process that obeys commands, and what it costs the machine.

A command is a JSON list on one line of the child's input, an answer any JSON on one line of its
output. A child ends at the end of its input, so none outlives the tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Child:
    """One running child."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.pid = process.pid

    def ask(self, *command: Any) -> Any:
        """Give a command and wait for its answer."""
        self.tell(*command)
        return self.answer()

    def tell(self, *command: Any) -> None:
        """Give a command; its answer must be fetched later."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """The next answer."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the child has ended, with status {self._process.wait()}"
        return json.loads(line)

    def rss(self) -> int:
        """Resident bytes, counted page by page: the cheaper counters are inexact by megabytes."""
        return self._kilobytes("smaps_rollup", "Rss:") * 1024

    def peak_rss(self) -> int:
        """The most resident bytes that it ever had."""
        return self._kilobytes("status", "VmHWM:") * 1024

    def _kilobytes(self, file: str, key: str) -> int:
        for line in Path(f"/proc/{self._process.pid}/{file}").read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1])
        raise AssertionError(f"the kernel says no {key} in {file}")

    def cpu(self) -> float:
        """Seconds of processor time used so far, by all threads, to the nanosecond."""
        tasks = Path(f"/proc/{self._process.pid}/task")
        nanoseconds = [int((task / "schedstat").read_text().split()[0]) for task in tasks.iterdir()]
        return sum(nanoseconds) / 1e9


@contextlib.contextmanager
def running(module: str, *arguments: str) -> Iterator[Child]:
    """Start ``python -m tests.soak.{module}``; it has ended afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-m", f"tests.soak.{module}", *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    # What else the machine does should count as little as can be. Not everybody may ask for that.
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, process.pid, -10)
    with process:
        try:
            yield Child(process)
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(timeout=30) == 0
        finally:
            process.kill()
