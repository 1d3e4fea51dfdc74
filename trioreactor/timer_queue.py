"""TimerQueue: what is due when. It has no clock of its own: the caller says what time it is."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count

# Fewer dead entries than this are not worth a sweep.
_SWEEP_AT = 64


class Timer:
    """One thing to do at one time. `cancel` is idempotent and drops the function at once."""

    __slots__ = ("deadline", "fn")

    def __init__(self, deadline: float, fn: Callable[[], object]) -> None:
        self.deadline = deadline
        self.fn: Callable[[], object] | None = fn

    def run(self) -> None:
        """Do it, unless it was done or cancelled."""
        if self.fn is not None:
            fn, self.fn = self.fn, None
            fn()

    def cancel(self) -> None:
        """Make it do nothing. What the function refers to is let go."""
        self.fn = None


class TimerQueue:
    """A heap of timers.

    A cancelled timer stays in the heap, empty, until it surfaces or a sweep removes it: a sweep
    comes when the heap has doubled since the last one, so cancelling costs O(1) amortised and
    the cancelled ones never outnumber the live ones by more than that.
    """

    __slots__ = ("_heap", "_serial", "_sweep_at")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Timer]] = []
        self._serial = count()
        self._sweep_at = _SWEEP_AT

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, deadline: float, fn: Callable[[], object]) -> Timer:
        """Have *fn* returned by `pop_due` once *deadline* has come."""
        timer = Timer(deadline, fn)
        if len(self._heap) >= self._sweep_at:
            self._heap = [entry for entry in self._heap if entry[2].fn is not None]
            heapq.heapify(self._heap)
            self._sweep_at = max(_SWEEP_AT, 2 * len(self._heap))
        heapq.heappush(self._heap, (deadline, next(self._serial), timer))
        return timer

    def next_deadline(self) -> float | None:
        """The earliest live deadline, or None."""
        heap = self._heap
        while heap and heap[0][2].fn is None:
            heapq.heappop(heap)
        return heap[0][0] if heap else None

    def pop_due(self, now: float) -> list[Callable[[], object]]:
        """Remove what is due at *now*; call what this returns, in order, to run it.

        One that is cancelled by another before its turn does nothing.
        """
        due: list[Callable[[], object]] = []
        heap = self._heap
        while heap and heap[0][0] <= now:
            timer = heapq.heappop(heap)[2]
            if timer.fn is not None:
                due.append(timer.run)
        return due
