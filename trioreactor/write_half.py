"""WriteHalf: a connection's way out. Every byte that is sent goes through here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from trioreactor.send_buffer import ENTRY_OVERHEAD, bytes_view
from trioreactor.write_queue import WriteQueue

if TYPE_CHECKING:
    from trioreactor.ending import Ending
    from trioreactor.half_owner import HalfOwner
    from trioreactor.options import Watermarks
    from trioreactor.sockets import DataSocket
    from trioreactor.tls_socket import TlsSocket


class WriteHalf(WriteQueue):
    """The queue, and those who wait for it.

    Tasks that wait here share one lot. Every change wakes all of them and each looks for itself,
    so none can take another's place and closing reaches everybody.
    """

    __slots__ = ("_sending",)

    def __init__(
        self,
        owner: HalfOwner,
        ending: Ending,
        sock: DataSocket,
        watermarks: Watermarks,
    ) -> None:
        super().__init__(owner, ending, sock, watermarks)
        # A task is inside send_all, wait_send_all_might_not_block or send_eof.
        self._sending = False

    @trio.lowlevel.enable_ki_protection
    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Queue all of *data*, then wait while congested: see `TcpConnection.send_all`."""
        self._begin()
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            if self.corked:
                self.uncork()
            n = len(data) if type(data) is bytes else memoryview(data).nbytes
            # There is room where nothing is queued and it is no more than the high mark.
            if self.buffer.size or n > self.buffer.high:
                if not self.buffer.can_ever_hold(n):
                    await self._send_slices(data)
                    return
                while self.open and not self.buffer.could_have_room(n):
                    await self._park()
            if self.send(data):
                await trio.lowlevel.cancel_shielded_checkpoint()
            else:
                await self.wait_uncongested()
        finally:
            self._sending = False

    async def _send_slices(  # noqa: ASYNC910 there is a slice, and each has a checkpoint
        self, data: bytes | bytearray | memoryview
    ) -> None:
        """Stream what can never be queued whole, in slices of what the buffer can hold."""
        view = bytes_view(data)
        # Large enough to keep the kernel busy, and a slice always finds room below the high mark.
        assert self.buffer.limit is not None
        size = max(1, self.buffer.limit // 4)
        start = 0
        self.hold()
        try:
            while start < len(view):
                piece = view[start : start + size]
                while self.open and not self.buffer.has_room(len(piece)):
                    await self._park()
                if not self.open:
                    raise self._refusal()
                self.enqueue(piece)
                start += len(piece)
                self.flush()
                await trio.lowlevel.checkpoint()
                while self.open and self.buffer.congested:
                    await self._park()
            if self._failed or self._closing:
                raise self._ending.error()
        except BaseException:
            if 0 < start < len(view):
                self._owner.on_send_torn()
            raise
        finally:
            self.release()

    @trio.lowlevel.enable_ki_protection
    async def wait_send_all_might_not_block(self) -> None:
        """Wait until not congested: see `TcpConnection.wait_send_all_might_not_block`."""
        self._begin()
        try:
            await self.wait_uncongested()
        finally:
            self._sending = False

    def takes(self, n: int) -> bool:
        """Whether *n* bytes may be sent by one who heeds the marks: not congested, and they have
        room, or never will. What may be dropped is in nobody's way.
        """
        if self.open and not self._accepting:
            return False
        buffer = self.buffer
        if buffer.congested and (not buffer.droppable or buffer.must_go > buffer.low):
            return False
        held = 0 if self.held is None else len(self.held) + ENTRY_OVERHEAD
        return buffer.could_have_room(held + n) or not buffer.can_ever_hold(n)

    async def wait_uncongested(self, n: int = 0) -> None:  # noqa: ASYNC910 it parks otherwise
        """Wait until it `takes` *n* bytes. Any number of tasks may."""
        if self.takes(n):
            await trio.lowlevel.checkpoint()
        while not (self.takes(n) or self._closing):
            await self._park()
        if self._failed or self._closing:
            raise self._ending.error()

    async def wait_drained(self) -> None:
        """Wait until nothing is queued. Any number of tasks may."""
        self.uncork()
        if not self.buffer.size:
            await trio.lowlevel.checkpoint()
        await self.wait_at_most(0)
        if self._failed:
            raise self._ending.error()

    async def wait_at_most(self, size: int) -> None:  # noqa: ASYNC910 callers have checkpoints
        """Wait until at most *size* bytes are queued, or the half has failed."""
        while self.buffer.size > size:
            await self._park()

    def _begin(self) -> None:
        if self._sending:
            raise trio.BusyResourceError("another task is already sending on this connection")
        if not self.open:
            raise self._ending.error()
        self._sending = True

    @trio.lowlevel.enable_ki_protection
    async def send_eof(self) -> None:
        """`end`, and wait until it is done: see `TcpConnection.send_eof`."""
        if self._sending:
            raise trio.BusyResourceError("another task is already sending on this connection")
        if self._failed or self._closing:
            raise self._ending.error()
        self._sending = True
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            self.end()
            while self.eof_wanted and not self._closing:
                await self._park()
            if not self.eof_sent:
                raise self._ending.error()
            await trio.lowlevel.cancel_shielded_checkpoint()
        finally:
            self._sending = False

    def use(self, tls: TlsSocket) -> None:
        """Write to *tls* from now on. Nothing is queued."""
        self._sock = self._tls = tls

    def hold(self) -> None:
        """Take nothing until `release`, while `open`: what is sent would come into the middle of
        something, a handshake or a message.
        """
        self._accepting = False

    def release(self) -> None:
        """Take what is sent again, if that was not ended meanwhile."""
        self._accepting = self.open
        self.wake()

    def claim(self) -> None:
        """Keep others from sending until `unclaim`; raises if a task sends."""
        self._begin()
        self.hold()

    def unclaim(self, *, hold: bool) -> None:
        """Others may send, unless it stays on *hold*."""
        self._sending = False
        if not hold:
            self.release()

    async def wait_flushed(self, tls: TlsSocket) -> None:  # noqa: ASYNC910 callers have checkpoints
        """Wait until the kernel has what TLS itself has to send, or the half has failed."""
        while tls.unsent and not self._failed:
            self.channel.want_write()
            await self._park()

    async def wait_eof_sent(self) -> None:  # noqa: ASYNC910 callers have checkpoints
        """Wait until an EOF that is wanted is sent, or the half has failed."""
        while self.eof_wanted:
            await self._park()

    async def _park(self) -> None:
        if self._lot is None:
            self._lot = trio.lowlevel.ParkingLot()
        await self._lot.park()
