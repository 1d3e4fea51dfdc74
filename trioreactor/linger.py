"""LingerWatch: the bound on how long a closing connection may wait for its peer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from trioreactor.state import CloseReason

if TYPE_CHECKING:
    from trioreactor.timer_queue import Timer
    from trioreactor.write_half import WriteHalf


class LingerWatch:
    """Ends a connection that makes no headway while it closes.

    While data is queued, each `linger` seconds must take a quarter of the high-water mark's worth
    of it away, so the whole wait has an end however slowly the peer drips. Once our EOF is sent,
    the peer has `linger` seconds to send its own.
    """

    __slots__ = ("_begun", "_expire", "_linger", "_target", "_timer", "_write")

    def __init__(
        self, write: WriteHalf, linger: float, expire: Callable[[CloseReason | None], None]
    ) -> None:
        self._write = write
        self._linger = linger
        # Told the reason: WRITE_STALLED, or None where everything was sent.
        self._expire = expire
        # When the period that runs began, and what may still be queued at its end.
        self._begun = 0.0
        self._target = 0
        self._timer: Timer | None = None

    def start(self) -> None:
        """Begin a period, now."""
        self.stop()
        buffer = self._write.buffer
        self._target = max(0, buffer.size - max(1, buffer.high // 4))
        self._set_timer(trio.current_time())

    def _set_timer(self, begun: float) -> None:
        self._begun = begun
        self._timer = self._write.channel.poller.call_at(begun + self._linger, self._check)

    def change(self, linger: float) -> None:
        """Give it so long from now on. What has run of a period counts."""
        begun, self._linger = self._begun, linger
        if self._timer is not None:
            self._timer.cancel()
            self._set_timer(begun)

    def stop(self) -> None:
        """End the watch. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check(self) -> None:
        self._timer = None
        size = self._write.buffer.size
        if not size:
            self._expire(None)
        elif size > self._target:
            self._expire(CloseReason.WRITE_STALLED)
        else:
            self.start()
