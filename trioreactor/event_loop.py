"""EventLoop: muduo's name for a trio run, seen from other threads and from callbacks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVarTuple

import trio

logger = logging.getLogger("trioreactor.event_loop")

Args = TypeVarTuple("Args")


class EventLoop:
    """A handle on one trio run. `EventLoop.current()` in that run gives it."""

    def __init__(self) -> None:
        self._token = trio.lowlevel.current_trio_token()

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
        self._token.run_sync_soon(_contained, fn, *args)


_current: trio.lowlevel.RunVar[EventLoop | None] = trio.lowlevel.RunVar(
    "trioreactor.event_loop", None
)


def _contained(fn: Callable[[*Args], object], *args: *Args) -> None:
    try:
        fn(*args)
    except Exception:
        logger.exception("%r, called in the loop, raised", fn)
