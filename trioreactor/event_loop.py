"""EventLoop: muduo's name for a trio run, seen from other threads and from callbacks."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import TypeVarTuple

import trio

logger = logging.getLogger("trioreactor.event_loop")

Args = TypeVarTuple("Args")


class EventLoop:
    """A handle on one trio run. `EventLoop.current()` in that run gives it."""

    def __init__(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        # What is to be called next. Trio is asked once for all of it: it wakes the run by a system
        # call for each request. The lock can be taken twice, for a signal handler may queue.
        self._queue: list[Callable[[], object]] = []
        self._lock = threading.RLock()

    @classmethod
    def current(cls) -> EventLoop:
        """The trio run's loop, always the same object; `RuntimeError` outside trio."""
        loop = _current.get(None)
        if loop is None:
            loop = cls()
            _current.set(loop)
        return loop

    @property
    def in_loop(self) -> bool:
        """Whether the caller runs in this loop's thread, under trio."""
        try:
            return trio.lowlevel.current_trio_token() is self._token
        except RuntimeError:
            return False

    def run_in_loop(self, fn: Callable[[*Args], object], *args: *Args) -> None:
        """Call *fn* in the loop: at once when the caller is in it, else as `queue_in_loop`.

        What *fn* raises is logged on ``trioreactor.event_loop`` and goes no further.
        """
        if self.in_loop:
            _contained(fn, *args)
        else:
            self.queue_in_loop(fn, *args)

    def queue_in_loop(self, fn: Callable[[*Args], object], *args: *Args) -> None:
        """Call *fn* in the loop soon, in order, from whatever thread. Never at once.

        What *fn* raises is logged and goes no further. `trio.RunFinishedError` if the run is over;
        a call that was queued just before the end may never be made.
        """
        with self._lock:
            if not self._queue:
                try:
                    self._token.run_sync_soon(self._call_queued)
                except OSError:
                    # A run that crashed has closed what wakes it, and said nothing.
                    raise trio.RunFinishedError("the run has crashed") from None
            self._queue.append(partial(_contained, fn, *args))

    def _call_queued(self) -> None:
        # Those that are queued meanwhile wait for the next time.
        with self._lock:
            queue, self._queue = self._queue, []
        for call in queue:
            call()


_current: trio.lowlevel.RunVar[EventLoop | None] = trio.lowlevel.RunVar(
    "trioreactor.event_loop", None
)


def _contained(fn: Callable[[*Args], object], *args: *Args) -> None:
    try:
        fn(*args)
    except Exception:
        logger.exception("%r, called in the loop, raised", fn)
