"""TimingAttributes: a connection's deadlines, and what it knows of when its data moved."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import trio

from trioreactor.options import check_kinds

if TYPE_CHECKING:
    from trioreactor.lifecycle import Lifecycle
    from trioreactor.options import Timeouts
    from trioreactor.read_half import ReadHalf
    from trioreactor.watches import Watch
    from trioreactor.write_half import WriteHalf


class TimingAttributes:
    """Deadlines that may change, and times for those who have their own."""

    __slots__ = ()

    _life: Lifecycle
    _read: ReadHalf
    _write: WriteHalf

    @property
    def timeouts(self) -> Timeouts:
        """The deadlines in force. May be set while it lives: they hold from then on. What has
        passed already counts, as far as it is known: the first that are set begin then.
        """
        return self._life.watches.timeouts

    @timeouts.setter
    def timeouts(self, timeouts: Timeouts) -> None:
        check_kinds("TcpConnection", timeouts=timeouts)
        self._life.watches.change(timeouts)

    def stop_at_close(self, watch: Watch) -> None:
        """Call ``watch.stop()`` when the connection is closed: at once if it is."""
        self._life.watches.add(watch)

    def note_times(self) -> None:
        """Keep `last_received` and `last_sent` from now on: that costs a look at the clock each."""
        now = trio.current_time()
        if self._read.moved is None:
            self._read.moved = now
        if self._write.moved is None:
            self._write.moved = now

    def has_unread(self) -> bool:
        """Whether there is input that nobody has read: asks the kernel."""
        return self._read.has_unread()

    @property
    def last_received(self) -> float:
        """When input was last read, or `note_times` was called, by trio's clock; else -inf."""
        return -math.inf if self._read.moved is None else self._read.moved

    @property
    def last_sent(self) -> float:
        """When the kernel last took data, or `note_times` was called; else -inf."""
        return -math.inf if self._write.moved is None else self._write.moved

    def decoded(self, messages: int, left_over: int) -> None:
        """For codecs: so many messages have come out of the input, and so many bytes are left over,
        the beginning of another. `Timeouts.frame` counts from there.
        """
        watches = self._life.watches
        watches.left_over = left_over
        if watches.deadlines is not None:
            watches.deadlines.decoded(messages, left_over)
