"""Watches: everything about one connection that waits for a time to come."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Protocol

from trioreactor.deadlines import Deadlines
from trioreactor.linger import LingerWatch
from trioreactor.stall_watch import StallWatch

if TYPE_CHECKING:
    from trioreactor.options import Timeouts
    from trioreactor.poller import Poller
    from trioreactor.read_half import ReadHalf
    from trioreactor.state import CloseReason
    from trioreactor.write_half import WriteHalf


# Most connections have none of these, and are spared all else.
_WATCHED_FROM_THE_BEGINNING = attrgetter("write_stall", "idle", "first_byte", "frame")
_NONE = (None, None, None, None)


class Watch(Protocol):
    """Something that has deadlines for a connection."""

    def stop(self) -> None:
        """Drop them. Idempotent."""
        ...


class WatchOwner(Protocol):
    """The connection that is watched."""

    poller: Poller
    read: ReadHalf
    write: WriteHalf

    def on_write_stalled(self, was_away: bool) -> None:
        """The kernel has taken nothing for `Timeouts.write_stall` seconds."""
        ...

    def on_linger_expired(self, reason: CloseReason | None) -> None:
        """The peer has had `Timeouts.linger` seconds."""
        ...

    def expire(self, reason: CloseReason) -> None:
        """One of the peer's deadlines has passed."""
        ...


class Watches:
    """A connection's `Timeouts` at work, each made when it is first needed, and others' watches."""

    __slots__ = ("_linger", "_lingering", "_others", "_owner", "deadlines", "left_over", "timeouts")

    def __init__(self, owner: WatchOwner, timeouts: Timeouts, *, begin: bool) -> None:
        # None once the connection is closed.
        self._owner: WatchOwner | None = owner
        self.deadlines: Deadlines | None = None
        # Bytes of an incomplete message, as the last decoding found it.
        self.left_over = 0
        self._linger: LingerWatch | None = None
        # A close waits for the peer.
        self._lingering = False
        # Made by the first one.
        self._others: list[Watch] | None = None
        self.timeouts = timeouts
        if begin:
            self.begin()

    def begin(self) -> None:
        """Watch from now on: the connection is open."""
        if _WATCHED_FROM_THE_BEGINNING(self.timeouts) != _NONE:
            self.change(self.timeouts)

    def change(self, timeouts: Timeouts) -> None:
        """These hold from now on. What has run of others counts, as far as it is known."""
        self.timeouts = timeouts
        owner = self._owner
        if owner is None:
            return
        self._change_stall(owner, timeouts.write_stall)
        self._change_linger(timeouts.linger)
        if self.deadlines is not None:
            self.deadlines.change(timeouts)
        elif (timeouts.idle, timeouts.first_byte, timeouts.frame) != (None, None, None):
            self.deadlines = Deadlines(
                owner.read,
                owner.write,
                owner.poller,
                timeouts,
                owner.expire,
                left_over=self.left_over,
            )

    def _change_stall(self, owner: WatchOwner, patience: float | None) -> None:
        watch = owner.write.stall_watch
        if patience is None:
            if watch is not None:
                watch.stop()
                owner.write.stall_watch = None
        elif watch is not None:
            watch.change(patience, owner.poller)
        else:
            watch = owner.write.stall_watch = StallWatch(patience, owner.on_write_stalled)
            if owner.write.buffer.size:
                watch.start(owner.poller)

    def _change_linger(self, linger: float | None) -> None:
        if self._linger is not None and linger is not None:
            self._linger.change(linger)
        elif self._linger is not None:
            self._linger.stop()
            self._linger = None
        elif self._lingering:
            self.start_linger()

    def start_linger(self) -> None:
        """The connection closes, and waits for its peer from now on: at most `linger`."""
        if self._owner is None:
            return
        self._lingering = True
        linger = self.timeouts.linger
        if linger is not None:
            if self._linger is None:
                self._linger = LingerWatch(self._owner.write, linger, self._owner.on_linger_expired)
            self._linger.start()

    def on_eof_sent(self) -> None:
        """Our EOF is on its way; a linger that runs begins anew."""
        if self._linger is not None:
            self._linger.start()

    def add(self, watch: Watch) -> None:
        """Stop *watch* at the close: at once if that was."""
        if self._owner is None:
            watch.stop()
        elif self._others is None:
            self._others = [watch]
        else:
            self._others.append(watch)

    def stop(self) -> None:
        """The connection is closed: nothing waits any more. Idempotent."""
        # Each refers to the connection.
        self._owner = None
        if self._linger is not None:
            self._linger.stop()
            self._linger = None
        if self.deadlines is not None:
            self.deadlines.stop()
            self.deadlines = None
        others, self._others = self._others, None
        for watch in others or ():
            watch.stop()
