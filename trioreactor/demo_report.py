"""Report: prints what the demo sees, and remembers what did not hold. And what it can measure of
this process.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TextIO

import trio

# Labels are padded to this, so that what was measured stands in one column.
_LABEL_WIDTH = 27


class Report:
    """Lines of a label and what was measured, flushed one by one."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self.failures = 0

    def text(self, text: str) -> None:
        """A line as it is."""
        print(text, file=self._out, flush=True)

    def title(self, text: str) -> None:
        """The headline of a step."""
        self.text(f"\n{text}")

    def line(self, label: str, value: str) -> None:
        """Something measured that can be whatever it is."""
        self.text(f"   {label:<{_LABEL_WIDTH}} {value}")

    def check(self, label: str, value: str, *, holds: bool) -> None:
        """Something measured that must hold."""
        if holds:
            self.line(label, value)
        else:
            self.failures += 1
            self.text(f"!! {label:<{_LABEL_WIDTH}} {value}   <-- does not hold")


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the demo."""

    title: str
    run: Callable[[Report], Awaitable[None]]


def count(number: int, what: str) -> str:
    """``1 thing``, ``2,000 things``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def open_descriptors() -> int | None:
    """How many descriptors this process has, where the system tells."""
    gc.collect()
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return None


def living_tasks() -> int:
    """How many tasks this trio run has."""
    return trio.lowlevel.current_statistics().tasks_living


def resident_memory() -> int | None:
    """The memory of this process in bytes, where the system tells."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None
