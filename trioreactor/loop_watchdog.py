"""LoopWatchdog: says who holds the loop, while it is held."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

import trio

from trioreactor.loop_lookout import LoopLookout
from trioreactor.loop_turns import LoopTurns
from trioreactor.options import check_seconds

# asyncio's slow_callback_duration.
DEFAULT_THRESHOLD = 0.1

# Python switches threads every 5 ms (sys.getswitchinterval), so much less than this cannot be seen
# from another one.
SMALLEST_THRESHOLD = 0.01

# How long the end waits for the thread, which may be writing to a log: real seconds.
_JOIN_SECONDS = 1.0


class LoopWatchdog:
    """Warns when one turn of the trio loop takes longer than *threshold* seconds: real ones,
    whatever trio's clock is.

    ``async with LoopWatchdog():`` watches the loop while the block runs. A turn is all that runs
    between two looks at the kernel: nobody else is served meanwhile. The warning, on
    ``trioreactor.watchdog``, comes while the loop is held, with the stack of what holds it, the
    task, and the connection if there is one; a second line says how long it took in all. There is
    one such warning for a turn, and at most one a second.

    A thread does this, one for each trio run, however many watchdogs there are: then the smallest
    threshold holds. It sleeps while the loop does, keeps no process from ending, and has ended when
    the last block is left. Time in which the process was stopped does not count, nor does that in
    which the system let none of its threads run. (0.1 s: asyncio's slow_callback_duration)
    """

    def __init__(self, threshold: float = DEFAULT_THRESHOLD) -> None:
        check_threshold("LoopWatchdog", "threshold", threshold)
        self.threshold = threshold
        self._watch: _Watch | None = None
        self._running = False

    @property
    def longest(self) -> float:
        """The longest turn, seconds, whatever its reason was; 0 if there was none.

        Of all that this run's watchdogs have seen since the first of them began.
        """
        return 0.0 if self._watch is None else self._watch.turns.longest

    @property
    def holds(self) -> int:
        """How many turns took as long as the threshold, counted as `longest` is."""
        return 0 if self._watch is None else self._watch.turns.holds

    def start(self) -> None:
        """Begin to watch this trio run's loop, until `stop`. Call it from a task."""
        if self._running:
            raise RuntimeError("this watchdog watches already: make another LoopWatchdog")
        watch = _current.get()
        if watch is None:
            watch = _Watch(self.threshold)
            _current.set(watch)
        else:
            watch.add(self.threshold)
        self._watch = watch
        self._running = True

    def stop(self) -> None:
        """Stop watching; with the run's last watchdog the thread ends, too. Idempotent."""
        if self._running:
            self._running = False
            assert self._watch is not None
            if not self._watch.remove(self.threshold):
                _current.set(None)
                self._watch.end()

    async def __aenter__(self) -> Self:
        await trio.lowlevel.checkpoint()
        self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
        await trio.lowlevel.cancel_shielded_checkpoint()


def check_threshold(owner: str, name: str, value: object, *, off: bool = False) -> None:
    """Raise unless *value* is a time that can be watched for, or None where that is off."""
    check_seconds(owner, name, value, off=off)
    if isinstance(value, (int, float)) and value < SMALLEST_THRESHOLD:
        raise ValueError(
            f"{owner}({name}={value!r}): pass at least {SMALLEST_THRESHOLD} seconds, for Python "
            "does not switch threads often enough for less"
        )


class _Watch:
    """What the watchdogs of one run share."""

    def __init__(self, threshold: float) -> None:
        self._thresholds = [threshold]
        self.turns = LoopTurns(threshold)
        # A daemon, lest a run that has gone to pieces keep the process from ending.
        self._thread = threading.Thread(
            target=LoopLookout(self.turns).run, name="trioreactor.watchdog", daemon=True
        )
        # There may be no thread to be had; then nothing is left behind.
        self._thread.start()
        trio.lowlevel.add_instrument(self.turns)

    def add(self, threshold: float) -> None:
        """One more watchdog."""
        self._thresholds.append(threshold)
        self.turns.threshold = min(self._thresholds)
        # The thread may sleep for as long as the former one allows.
        self.turns.wake()

    def remove(self, threshold: float) -> bool:
        """One less. False if it was the last."""
        self._thresholds.remove(threshold)
        if self._thresholds:
            self.turns.threshold = min(self._thresholds)
        return bool(self._thresholds)

    def end(self) -> None:
        """End the thread."""
        trio.lowlevel.remove_instrument(self.turns)
        self.turns.events.put(None)
        self._thread.join(_JOIN_SECONDS)


_current: trio.lowlevel.RunVar[_Watch | None] = trio.lowlevel.RunVar("trioreactor.watchdog", None)
