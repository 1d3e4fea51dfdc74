"""SendingAttributes: how a connection's way out is, for those who pace what they send."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trioreactor.write_half import WriteHalf


class SendingAttributes:
    """Pacing."""

    __slots__ = ()

    _write: WriteHalf

    @property
    def buffered(self) -> int:
        """Bytes queued for sending, that the kernel has not taken yet."""
        return self._write.queued

    @property
    def congested(self) -> bool:
        """Whether the send buffer rose above the high-water mark, and has not sunk since."""
        return self._write.buffer.congested

    def takes(self, size: int) -> bool:
        """Whether *size* bytes may be sent now without passing a mark that was heeded: the send
        buffer is not congested, and they stay within the hard limit (or exceed it alone).
        """
        return self._write.takes(size)

    def fits(self, size: int) -> bool:
        """Whether *size* bytes could be queued if nothing else were. What does not fit is for
        `send_all`, which streams it.
        """
        return self._write.buffer.can_ever_hold(size)

    async def wait_uncongested(self, size: int = 0) -> None:
        """`wait_send_all_might_not_block`, for any number of tasks, and until `takes` (*size*)."""
        await self._write.wait_uncongested(size)

    def gathered(self, data: bytes) -> bool:
        """`cork`, and send *data* if that passes no mark and needs no wait. Whether it was sent."""
        return self._write.gathered(data)

    def cork(self) -> None:
        """Gather what is sent from here on; it leaves together, in order, at `uncork` or in the
        loop's next turn. In a dispatch callback that is so without asking.
        """
        self._write.cork()

    def send_if_idle(self, data: bytes) -> bool | None:
        """`TcpConnection.send` if nothing is queued and the connection takes data: whether it did,
        or None if something is queued. *data* must not be empty.
        """
        return self._write.send_if_idle(data)

    def gather(self) -> None:
        """`cork`, unless this is the first call since the loop's last turn: for those who may send
        several messages one after another, before each.
        """
        self._write.gather()

    def uncork(self) -> None:
        """Hand what was gathered to the kernel now. Never raises; who sends next hears of it."""
        self._write.uncork()

    @property
    def refused(self) -> int:
        """How many offered messages were dropped at once, instead of older ones."""
        return self._write.buffer.refused
