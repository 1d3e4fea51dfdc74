"""LoopTurns: when each turn of trio's loop begins and ends, for another thread to read."""

from __future__ import annotations

import time
from queue import SimpleQueue

import trio

# A turn's beginning and its length, if it has ended and was long; or None after the time at which
# the reader is to look. None alone is the end.
TurnEvent = tuple[float, float | None] | None


class LoopTurns(trio.abc.Instrument):
    """A turn is all that runs between two looks at the kernel: every task that is ready, once.

    The hooks are called for every turn, so they do as little as can be: no lock, and nothing that
    wakes a thread unless it asked for that by `parked`. Times are real ones, of
    `time.perf_counter`.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        """How long is long, seconds."""
        # The turn in which this is made has been running for a moment.
        self.began = time.perf_counter()
        """When the turn began, which also tells it from every other."""
        self.asleep = False
        """Whether it has ended, and the next one has not begun."""
        self.parked = False
        """Whether the reader sleeps until the next turn begins, and wants an event then."""
        self.events: SimpleQueue[TurnEvent] = SimpleQueue()
        """Turns that were long, when they have ended; and those that the reader waited for."""
        self.longest = 0.0
        """The longest turn, seconds, whatever the reason was."""
        self.holds = 0
        """How many were long."""

    def wake(self) -> None:
        """Have the reader look now."""
        self.events.put((time.perf_counter(), None))

    def after_io_wait(self, timeout: float) -> None:  # noqa: ARG002 trio's signature
        """Note that a turn begins."""
        self.began = time.perf_counter()
        self.asleep = False
        if self.parked:
            self.parked = False
            self.events.put((self.began, None))

    def before_io_wait(self, timeout: float) -> None:  # noqa: ARG002 trio's signature
        """Note that the turn has ended."""
        self.asleep = True
        length = time.perf_counter() - self.began
        if length > self.longest:
            self.longest = length
        if length >= self.threshold:
            self.holds += 1
            self.events.put((self.began, length))
