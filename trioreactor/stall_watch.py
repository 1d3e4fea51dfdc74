"""StallWatch: notices that queued data has stopped moving."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from trioreactor.timing_wheel import tick_of, was_away

if TYPE_CHECKING:
    from trioreactor.poller import Poller
    from trioreactor.timing_wheel import Entry


class StallWatch:
    """Calls *stalled* when nothing has moved for *patience* seconds since the watch began, with
    True if it comes late, for the loop was away (a stopped process, a machine that slept).

    One timer runs from the start to the end of a watch. Progress only stores the time; the timer,
    when it fires early, is set anew to what is left.
    """

    __slots__ = ("_due", "_moved", "_patience", "_stalled", "_timer")

    def __init__(self, patience: float, stalled: Callable[[bool], None]) -> None:
        self._patience = patience
        self._stalled = stalled
        self._moved = 0.0
        # When the timer is to look; later than it might be, where a change made it so.
        self._due = 0.0
        self._timer: Entry | None = None

    def start(self, poller: Poller) -> None:
        """Begin, unless it has begun."""
        if self._timer is None:
            self._moved = trio.current_time()
            self._set_timer(poller)

    def change(self, patience: float, poller: Poller) -> None:
        """Be as patient as this from now on. What has passed already counts."""
        self._patience = patience
        if self._timer is not None:
            self._timer.cancel()
            self._set_timer(poller)

    def progress(self) -> None:
        """Something moved."""
        self._moved = trio.current_time()

    def stop(self) -> None:
        """Nothing is queued any more. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set_timer(self, poller: Poller) -> None:
        self._due = max(self._moved + self._patience, trio.current_time())
        self._timer = poller.wheel.add(
            self._due, tick_of(self._patience), lambda: self._check(poller)
        )

    def _check(self, poller: Poller) -> None:
        self._timer = None
        now = trio.current_time()
        if now >= self._moved + self._patience:
            self._stalled(was_away(now - self._due, self._patience))
        else:
            self._set_timer(poller)
