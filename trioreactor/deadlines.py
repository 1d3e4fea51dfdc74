"""Deadlines: what a connection's peer must do in time, or lose it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from trioreactor.state import CloseReason
from trioreactor.timing_wheel import tick_of, was_away

if TYPE_CHECKING:
    from trioreactor.options import Timeouts
    from trioreactor.poller import Poller
    from trioreactor.read_half import ReadHalf
    from trioreactor.timing_wheel import Entry
    from trioreactor.write_half import WriteHalf


class Deadlines:
    """Watches one connection for idleness, for its first byte, and for the end of a message.

    Nothing happens when data moves but that the halves note the time. A deadline that comes too
    early is set anew, to what is left. Nobody loses a connection for input that has come and is
    not read because the loop was away (a stopped process, a machine that slept) or, of a message,
    because its user does not read.
    """

    __slots__ = (
        "_begun",
        "_entries",
        "_expire",
        "_frame_begun",
        "_paused_at",
        "_poller",
        "_read",
        "_set_at",
        "_write",
        "timeouts",
    )

    def __init__(
        self,
        read: ReadHalf,
        write: WriteHalf,
        poller: Poller,
        timeouts: Timeouts,
        expire: Callable[[CloseReason], None],
        *,
        left_over: int,
    ) -> None:
        self._read = read
        self._write = write
        self._poller = poller
        # Told the reason when one passes.
        self._expire = expire
        self.timeouts = timeouts
        now = trio.current_time()
        # From here on the halves note the time.
        self._begun = now
        # When the deadlines were set: what is due before then does not come late.
        self._set_at = now
        read.moved = now if read.moved is None else read.moved
        write.moved = now if write.moved is None else write.moved
        # When the message that is incomplete now was begun; None between two.
        self._frame_begun: float | None = now if left_over else None
        # While its user does not read, a message's time stands still.
        self._paused_at: float | None = None if read.reading else now
        self._entries: dict[str, Entry] = {}
        self._set_all()

    def change(self, timeouts: Timeouts) -> None:
        """Others hold from now on. What has run of them already counts."""
        self.stop()
        self.timeouts = timeouts
        self._set_at = trio.current_time()
        self._set_all()

    def stop(self) -> None:
        """Watch no more. Idempotent."""
        for entry in self._entries.values():
            entry.cancel()
        self._entries.clear()

    def decoded(self, messages: int, left_over: int) -> None:
        """What was read has been decoded, to so many messages; so many bytes are left over."""
        if not left_over:
            self._frame_begun = None
        elif messages or self._frame_begun is None:
            self._frame_begun = trio.current_time()
            self._set_frame()

    def paused(self) -> None:
        """Its user reads no more: what is expected of the peer is so later. Idempotent."""
        if self._paused_at is None:
            self._paused_at = trio.current_time()

    def resumed(self) -> None:
        """Its user reads again. Idempotent."""
        if self._paused_at is not None:
            if self._frame_begun is not None:
                self._frame_begun += trio.current_time() - max(self._paused_at, self._frame_begun)
            self._paused_at = None
            self._set_frame()

    def _set_all(self) -> None:
        # One that has passed comes soon, and not now: a new deadline must not close in here.
        self._set_idle()
        if self._read.bytes_received == 0:
            self._set("first_byte", self._begun, self.timeouts.first_byte, self._check_first_byte)
        self._set_frame()

    def _set(
        self, name: str, since: float, seconds: float | None, check: Callable[[], None]
    ) -> None:
        if seconds is not None:
            wheel = self._poller.wheel
            self._entries[name] = wheel.add(since + seconds, tick_of(seconds), check)

    def _set_idle(self) -> None:
        self._set("idle", self._moved(), self.timeouts.idle, self._check_idle)

    def _set_frame(self) -> None:
        # One that is set is left to come, and looks then: messages are begun often.
        if self._frame_begun is not None and "frame" not in self._entries:
            self._set("frame", self._frame_begun, self.timeouts.frame, self._check_frame)

    def _moved(self) -> float:
        assert self._read.moved is not None
        assert self._write.moved is not None
        return max(self._read.moved, self._write.moved)

    def _check_idle(self) -> None:
        idle = self.timeouts.idle
        assert idle is not None
        due, now = self._moved() + idle, trio.current_time()
        if now < due:
            self._set_idle()
        elif was_away(now - max(due, self._set_at), idle) and self._read.has_unread():
            # It moved, and we were not there.
            self._read.moved = now
            self._set_idle()
        else:
            self._expire(CloseReason.IDLE_TIMEOUT)

    def _check_first_byte(self) -> None:
        del self._entries["first_byte"]
        if self._read.bytes_received == 0 and not self._read.has_unread():
            self._expire(CloseReason.FIRST_BYTE_TIMEOUT)

    def _check_frame(self, seen: int | None = None) -> None:
        # *seen*: the bytes received by the first look, at the second.
        del self._entries["frame"]
        frame, now = self.timeouts.frame, trio.current_time()
        assert frame is not None
        if self._frame_begun is None:
            return
        if self._paused_at is not None:
            # Set anew when it goes on.
            return
        due = self._frame_begun + frame
        late = now - max(due, self._set_at)
        if now < due:
            self._set_frame()
        elif not self._read.has_more():
            self._expire(CloseReason.FRAME_TIMEOUT)
        elif was_away(late, frame, 2 if seen is None else 3) or (
            seen == self._read.bytes_received and not self._read.busy
        ):
            # The rest may be there.
            self._frame_begun = now
            self._set_frame()
        elif seen is not None or self._read.busy:
            self._expire(CloseReason.FRAME_TIMEOUT)
        else:
            # Whoever reads may just have been woken, and will then have read by the second look.
            # What they read is not the end of a drip.
            read = self._read.bytes_received
            self._entries["frame"] = self._poller.wheel.add(
                now, tick_of(frame), lambda: self._check_frame(read)
            )
