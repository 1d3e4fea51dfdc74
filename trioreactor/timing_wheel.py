"""TimingWheel: many deadlines that come seldom and are cancelled often.

Deadlines are put together in slots a tick apart, and only a slot has a timer. So to add and to
cancel cost O(1), and ten thousand connections whose deadlines fall into the same tick wake the
loop once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trioreactor.timer_queue import Timer

# A tick is at most this part of the time that it bounds: what a deadline may come late.
_TICK_PART = 32

# Ticks are powers of two, which floats hold exactly, so that slots of different ticks meet: from
# about what trio itself is late, to what nobody minds in a deadline of half a minute and more.
_SHORTEST_TICK = 2.0**-7
_LONGEST_TICK = 1.0

# Deadlines that are called before others in the loop have their turn. To end a connection takes
# some twenty microseconds, so a turn is of about the length that a read of 64 KiB takes.
ENTRIES_PER_TURN = 64


def tick_of(seconds: float) -> float:
    """The tick for deadlines that are *seconds* away."""
    part = min(max(seconds / _TICK_PART, _SHORTEST_TICK), _LONGEST_TICK)
    return 2.0 ** math.floor(math.log2(part))


class Entry:
    """One deadline. `cancel` is idempotent, and drops the function at once."""

    __slots__ = ("_fn", "_slot")

    def __init__(self, fn: Callable[[], object], slot: Slot) -> None:
        self._fn: Callable[[], object] | None = fn
        self._slot: Slot | None = slot

    def cancel(self) -> None:
        """Make it do nothing."""
        slot, self._slot, self._fn = self._slot, None, None
        if slot is not None:
            slot.remove(self)

    def run(self) -> None:
        """Do it, unless it was cancelled. It has left its slot before."""
        fn = self._fn
        self.cancel()
        if fn is not None:
            fn()


class Slot:
    """The deadlines of one moment, and its timer."""

    __slots__ = ("_wheel", "at", "entries", "timer")

    def __init__(self, wheel: TimingWheel, at: float) -> None:
        self._wheel = wheel
        self.at = at
        # In the order in which they came.
        self.entries: dict[Entry, None] = {}
        # None while its entries are called.
        self.timer: Timer | None = None

    def remove(self, entry: Entry) -> None:
        """Take an entry out; the last one takes the slot with it."""
        del self.entries[entry]
        if not self.entries:
            self._wheel.drop(self)
            if self.timer is not None:
                self.timer.cancel()


def was_away(late: float, seconds: float, ticks: int = 2) -> bool:
    """Whether a deadline of *seconds* that is looked at so *late* comes later than the wheel makes
    it: the loop was away (a stopped process, a machine that slept), and read nothing before it.
    """
    return late > ticks * tick_of(seconds)


class TimingWheel:
    """Calls functions at deadlines, late by less than a tick. It has no clock: *call_at* has."""

    __slots__ = ("_call_at", "_slots")

    def __init__(self, call_at: Callable[[float, Callable[[], object]], Timer]) -> None:
        self._call_at = call_at
        self._slots: dict[float, Slot] = {}

    def __len__(self) -> int:
        return sum(len(slot.entries) for slot in self._slots.values())

    def add(self, deadline: float, tick: float, fn: Callable[[], object]) -> Entry:
        """Call *fn* at the first multiple of *tick* that is not before *deadline*."""
        at = math.ceil(deadline / tick) * tick
        slot = self._slots.get(at)
        if slot is None:
            slot = self._slots[at] = Slot(self, at)
            self._set_timer(slot)
        entry = Entry(fn, slot)
        slot.entries[entry] = None
        return entry

    def drop(self, slot: Slot) -> None:
        """Forget a slot that is empty."""
        del self._slots[slot.at]

    def _set_timer(self, slot: Slot) -> None:
        slot.timer = self._call_at(slot.at, lambda: self._turn(slot))

    def _turn(self, slot: Slot) -> None:
        slot.timer = None
        try:
            # A copy: what one does may cancel others, or add to this moment.
            for entry in list(islice(slot.entries, ENTRIES_PER_TURN)):
                entry.run()
        finally:
            if slot.entries:
                self._set_timer(slot)
