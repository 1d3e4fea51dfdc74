"""LoopLookout: the thread that looks at a loop now and then, and warns when it is held."""

from __future__ import annotations

import logging
import threading
import time
from queue import Empty

from trioreactor.loop_holder import HolderFinder, LoopHolder
from trioreactor.loop_turns import LoopTurns, TurnEvent

logger = logging.getLogger("trioreactor.watchdog")

# At most one warning in as many seconds, however often the loop is held.
LOG_INTERVAL = 1.0

# Of a turn that was not seen while it was long: the part of it that the loop must have computed, so
# that it was neither stopped nor kept from running.
_COMPUTING = 0.75

# So that rounding does not make a look come for nothing, seconds.
_SHORTEST_PAUSE = 0.001


class LoopLookout:
    """Made in the loop's thread, in a task; `run` is for a thread of its own.

    Looks are at most half a threshold apart while the loop runs, so every turn that is long is
    looked at when half of the threshold has passed, and again when all of it has: if both see the
    same step of the same task, that step holds the loop. When no turn has begun since the last
    look, there is no other until the next turn begins: an idle loop costs nothing.

    Time in which this thread could not run either, and the loop did not compute, is nobody's fault:
    the process was stopped, or the machine is too busy. It is not counted.
    """

    def __init__(self, turns: LoopTurns) -> None:
        self._turns = turns
        self._finder = HolderFinder(threading.get_ident())
        # The CPU clock of the loop's thread, where there is such a thing.
        self._clock: int | None = None
        if hasattr(time, "pthread_getcpuclockid"):
            self._clock = time.pthread_getcpuclockid(threading.get_ident())
        # The last look: when it was, and how much the loop had computed by then.
        self._seen_at = time.perf_counter()
        self._used = self._loop_cpu()
        # When this thread was to run again.
        self._due = self._seen_at
        self._begin(0.0, self._used)
        self._next_log = float("-inf")
        self._unlogged = 0

    def _begin(self, turn: float, used: float) -> None:
        """Another turn is looked at, before which the loop had computed for *used* seconds."""
        self._turn = turn
        self._used_before = used
        # What of it is nobody's fault, seconds.
        self._excused = 0.0
        # Who ran when half of the threshold had passed.
        self._first: LoopHolder | None = None
        # It is known to be long, and whether that was logged.
        self._reported = False
        self._logged = False

    def run(self) -> None:
        """Look until told to end."""
        pause: float | None = 0.0
        while True:
            try:
                event: TurnEvent = self._turns.events.get(timeout=pause)
            except Empty:
                pause = self._look()
            else:
                if event is None:
                    return
                when, length = event
                if length is None:
                    self._due = when
                else:
                    self._ended(when, length)
                pause = self._look()
            self._due = self._seen_at + (pause or 0.0)

    def _look(self) -> float | None:
        """Look once. Seconds until the next look; None if that is when a turn begins."""
        turns = self._turns
        half = turns.threshold / 2
        # In this order: should another turn begin meanwhile, it is the younger one that is seen.
        asleep, turn = turns.asleep, turns.began
        before = self._used
        late = self._note_look()
        idle = asleep and turn == self._turn
        if turn != self._turn:
            self._begin(turn, before)
        if idle:
            return self._park(half)
        if asleep:
            return half
        age = self._seen_at - turn
        # A little late is every thread.
        if late > half / 2:
            self._excused += max(0.0, min(late, age) - (self._used - before))
        age -= self._excused
        if age < half:
            return max(half - age, _SHORTEST_PAUSE)
        if age < turns.threshold:
            if self._first is None:
                self._first = self._finder.find()
            return max(turns.threshold - age, _SHORTEST_PAUSE)
        if not self._reported:
            self._held(age)
        return turns.threshold

    def _note_look(self) -> float:
        """Note when this look is, and what the loop has computed by now; how late it is."""
        self._seen_at, self._used = time.perf_counter(), self._loop_cpu()
        return max(0.0, self._seen_at - self._due)

    def _park(self, pause: float) -> float | None:
        turns = self._turns
        turns.parked = True
        # A turn that began just before that has told nobody.
        if turns.asleep and turns.began == self._turn:
            return None
        turns.parked = False
        return pause

    def _loop_cpu(self) -> float:
        if self._clock is None:
            return 0.0
        try:
            return time.clock_gettime(self._clock)
        except OSError:
            # The loop's thread has ended, and nobody has told this one.
            return self._used

    def _held(self, age: float) -> None:
        """The turn is long, and not over."""
        holder = self._finder.find()
        if self._turns.began != self._turn or self._turns.asleep or holder is None:
            # Now it is over; its end is on its way to us.
            return
        self._reported = True
        first = self._first
        if first is not None and first.step != holder.step:
            what = f"many steps in a row hold the loop, {age:.3f} s so far; now"
        else:
            what = f"the loop is held, {age:.3f} s so far, by"
        self._logged = self._log(f"{what} {holder}", holder.stack)

    def _ended(self, turn: float, length: float) -> None:
        """A turn that was long is over."""
        if turn != self._turn:
            self._begin(turn, self._used)
        length -= self._excused
        if self._logged:
            logger.warning("the loop was held for %.3f s in all", length)
        if self._reported or length < self._turns.threshold:
            return
        self._reported = True
        if self._first is not None:
            self._log(f"the loop was held for {length:.3f} s by {self._first}", self._first.stack)
        elif self._loop_cpu() - self._used_before >= length * _COMPUTING:
            self._log(
                f"the loop was held for {length:.3f} s by something that let no other thread run, "
                "so it could not be seen: a call into C, most likely"
            )

    def _log(self, text: str, stack: str = "") -> bool:
        """Log it, unless a line was logged just before. Whether it was."""
        now = time.perf_counter()
        if now < self._next_log:
            self._unlogged += 1
            return False
        self._next_log = now + LOG_INTERVAL
        if self._unlogged:
            text += f" (and {self._unlogged} times since the last such line)"
            self._unlogged = 0
        if stack:
            text += f"\n{stack.rstrip()}"
        logger.warning("%s", text)
        return True
