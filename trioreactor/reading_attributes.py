"""ReadingAttributes: whether a connection is read, and what is known without reading."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trioreactor.lifecycle import Lifecycle
    from trioreactor.read_half import ReadHalf


class ReadingAttributes:
    """Pausing, and the end of what comes."""

    __slots__ = ()

    _life: Lifecycle
    _read: ReadHalf

    def interrupt_receive(self) -> None:
        """Let a `receive_some` that waits give ``b""`` now, as at EOF, which `at_eof` tells from
        this: for whoever reads for others, and is to do something else. Nothing if none waits.
        """
        self._read.interrupt()

    @property
    def at_eof(self) -> bool:
        """Whether the peer's EOF has been found: nothing more will come."""
        return self._read.eof

    async def wait_eof(self) -> None:
        """Wait until the peer's EOF is next to be read, or the connection has broken or ended,
        without reading. Any number of tasks may wait, and one read. Cancelling changes nothing.

        For noticing that the peer has gone while one works for it. Unread input hides the EOF
        behind it. On the trio poller an EOF that comes while nobody reads is seen, a reset not.
        """
        await self._life.wait_eof()

    @property
    def reading(self) -> bool:
        """False between `stop_reading` and `start_reading`."""
        return self._read.reading

    def stop_reading(self) -> None:
        """Leave input in the kernel, so that the peer feels it: no callbacks, and `receive_some`
        waits. Idempotent. Until `start_reading`, `Timeouts.frame` stands still.
        """
        if self._life.watches.deadlines is not None:
            self._life.watches.deadlines.paused()
        self._read.stop_reading()

    def start_reading(self) -> None:
        """Take input again; a dispatch callback is called soon for what it had left. Idempotent."""
        if self._life.watches.deadlines is not None:
            self._life.watches.deadlines.resumed()
        self._read.start_reading()

    @property
    def delivering(self) -> bool:
        """Whether a dispatch runs and reads: whether its callback may be called."""
        return self._read.delivering

    def deliver_again(self) -> None:
        """In a dispatch callback: call it again soon for what it leaves in the buffer, though no
        more may come, after the other connections have had their turn.
        """
        self._read.deliver_again()
