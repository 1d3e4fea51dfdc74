"""WriteHalf: a connection's way out. Every byte that is sent goes through here."""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import TYPE_CHECKING

import trio

from trioreactor.errors import SendBufferFull
from trioreactor.half_owner import GONE
from trioreactor.send_buffer import Crossing, SendBuffer, bytes_view, kept
from trioreactor.sockets import broken
from trioreactor.stall_watch import StallWatch

if TYPE_CHECKING:
    from trioreactor.channel import Channel
    from trioreactor.ending import Ending
    from trioreactor.half_owner import HalfOwner
    from trioreactor.options import Watermarks
    from trioreactor.sockets import ConnectedSocket

# Gather writes in one go before others have their turn: at most a megabyte, with the buffer's own
# bound on each.
_WRITES_PER_TURN = 4


class WriteHalf:
    """Writes at once when nothing is queued; what the kernel does not take is queued.

    The queue is flushed on the next writable edge, so no task is needed. While corked (a dispatch
    callback runs), sends are gathered and leave together in `uncork`.

    Tasks that wait here share one lot. Every change wakes all of them and each looks for itself,
    so none can take another's place and closing reaches everybody.
    """

    __slots__ = (
        "_accepting",
        "_closing",
        "_ending",
        "_eof_wanted",
        "_failed",
        "_lot",
        "_owner",
        "_sending",
        "_sock",
        "_stall_watch",
        "buffer",
        "bytes_sent",
        "channel",
        "corked",
        "eof_sent",
        "held",
        "notify_complete",
        "open",
        "pauses",
        "resumes",
    )

    channel: Channel

    def __init__(
        self,
        owner: HalfOwner,
        ending: Ending,
        sock: ConnectedSocket,
        watermarks: Watermarks,
        write_stall: float | None,
    ) -> None:
        # Replaced by `GONE` at the close.
        self._owner: HalfOwner = owner
        self._ending = ending
        self._sock = sock
        self.buffer = SendBuffer(watermarks)
        self.bytes_sent = 0
        # Crossings, counted so that anybody can see that they come in pairs.
        self.pauses = 0
        self.resumes = 0
        # False once `end` or `fail` was called: nothing new may be sent.
        self.open = True
        # `open`, and no send_all is streaming slices that another send would tear apart.
        self._accepting = True
        self._failed = False
        # `aclose` has begun: whoever waits for room hears of it at once.
        self._closing = False
        self.eof_sent = False
        self._eof_wanted = False
        # Somebody wants `on_write_complete`.
        self.notify_complete = False
        # Gather what is sent, until `uncork`.
        self.corked = False
        # What was gathered, while it is a single piece: most callbacks send one, and a queue for
        # one costs as much as all the rest of a send.
        self.held: bytes | memoryview | None = None
        # A task is inside send_all, wait_send_all_might_not_block or send_eof.
        self._sending = False
        # Made by the first who waits.
        self._lot: trio.lowlevel.ParkingLot | None = None
        self._stall_watch = (
            None if write_stall is None else StallWatch(write_stall, owner.on_write_stalled)
        )

    @property
    def queued(self) -> int:
        """Bytes that the kernel has not taken yet."""
        return self.buffer.size + (0 if self.held is None else len(self.held))

    # -- sending

    @trio.lowlevel.enable_ki_protection
    def send(self, data: bytes | bytearray | memoryview) -> bool:
        """Take all of *data*, now and in order. True unless congested afterwards."""
        if not self._accepting:
            raise self._refusal()
        if type(data) is not bytes:
            data = bytes_view(data)
        n = len(data)
        buffer = self.buffer
        if not n:
            return not buffer.congested
        if self.corked:
            if not buffer.size and self.held is None and n <= buffer.high:
                self.held = kept(data)
                return True
            self._queue_held()
            if buffer.size + n <= buffer.high and buffer.has_room(n):
                buffer.append(kept(data))
                return not buffer.congested
            # Gathering more would cross a mark that writing may yet avoid.
            if buffer.size:
                self.flush()
                if not self.open:
                    raise self._refusal()
        if not buffer.size:
            try:
                sent = self._sock.send(data)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self._owner.on_send_failed(error)
                raise broken(error) from error
            self.bytes_sent += sent
            if sent == n:
                if self.notify_complete:
                    self._owner.on_write_complete()
                return True
            self._enqueue(memoryview(data)[sent:])
            self._wait_for_room()
        else:
            self._enqueue(data)
        return not buffer.congested

    def _enqueue(self, data: bytes | memoryview) -> None:
        buffer = self.buffer
        if not buffer.has_room(len(data)):
            error = SendBufferFull(
                f"{len(data)} bytes more than the {buffer.size} that wait for the peer would pass "
                f"the limit of {buffer.limit}: when send() answers False, wait with "
                "wait_send_all_might_not_block()"
            )
            self._owner.on_send_buffer_full()
            raise error
        if buffer.append(kept(data)) is Crossing.HIGH:
            self.pauses += 1
            self._owner.on_high_water_mark()

    def uncork(self) -> None:
        """Write what was gathered while `corked`. Never raises."""
        self.corked = False
        held = self.held
        if held is not None:
            self.held = None
            # The owner has heard of it, and the callback that sent is over.
            with suppress(trio.BrokenResourceError):
                self.send(held)
        elif self.buffer.size:
            self.flush()

    def _queue_held(self) -> None:
        if self.held is not None:
            # It is no more than the high mark and nothing else is queued: no crossing.
            self.buffer.append(self.held)
            self.held = None

    @trio.lowlevel.enable_ki_protection
    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Queue all of *data*, then wait while congested: see `TcpConnection.send_all`."""
        self._begin()
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            n = len(data) if type(data) is bytes else memoryview(data).nbytes
            if not self.buffer.can_ever_hold(n):
                await self._send_slices(data)
                return
            while self.open and not self.buffer.has_room(n):
                await self._park()
            if self.send(data):
                await trio.lowlevel.cancel_shielded_checkpoint()
            else:
                await self._wait_not_congested()
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
        self._accepting = False
        try:
            while start < len(view):
                piece = view[start : start + size]
                while self.open and not self.buffer.has_room(len(piece)):
                    await self._park()
                if not self.open:
                    raise self._refusal()
                self._enqueue(piece)
                start += len(piece)
                self.flush()
                await self._wait_not_congested()
                await trio.lowlevel.checkpoint()
        except BaseException:
            if 0 < start < len(view):
                self._owner.on_send_torn()
            raise
        finally:
            self._accepting = self.open

    @trio.lowlevel.enable_ki_protection
    async def wait_send_all_might_not_block(self) -> None:
        """Wait until not congested: see `TcpConnection.wait_send_all_might_not_block`."""
        self._begin()
        try:
            if self.buffer.congested:
                await self._wait_not_congested()
            else:
                await trio.lowlevel.checkpoint()
        finally:
            self._sending = False

    async def wait_drained(self) -> None:
        """Wait until nothing is queued. Any number of tasks may."""
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

    def _refusal(self) -> Exception:
        if self.open:
            return trio.BusyResourceError(
                "another task is streaming data larger than the send buffer's limit"
            )
        return self._ending.error()

    async def _wait_not_congested(self) -> None:  # noqa: ASYNC910 callers have checkpoints
        while self.buffer.congested and not self._closing:
            await self._park()
        if self._failed or self._closing:
            raise self._ending.error()

    async def _park(self) -> None:
        if self._lot is None:
            self._lot = trio.lowlevel.ParkingLot()
        await self._lot.park()

    def wake(self) -> None:
        """Wake every waiter, to look again."""
        if self._lot:
            self.channel.poller.woke = True
            self._lot.unpark_all()

    # -- flushing

    def on_writable(self) -> None:
        """The kernel takes data again."""
        if self.buffer.size:
            self.flush()

    def flush(self) -> None:
        """Write what is queued, until the kernel takes no more or it is others' turn."""
        buffer = self.buffer
        for _ in range(_WRITES_PER_TURN):
            chunks = buffer.gather()
            try:
                if len(chunks) == 1:
                    offered = len(chunks[0])
                    sent = self._sock.send(chunks[0])
                else:
                    offered = sum(map(len, chunks))
                    sent = self._sock.sendmsg(chunks)
            except BlockingIOError:
                self._wait_for_room()
                return
            except OSError as error:
                self._owner.on_send_failed(error)
                return
            self.bytes_sent += sent
            if self._stall_watch is not None:
                self._stall_watch.progress()
            if buffer.consume(sent) is Crossing.LOW:
                self.resumes += 1
                self._owner.on_low_water_mark()
            if self._lot:
                self.wake()
            if not buffer.size:
                self._emptied()
                return
            if sent < offered:
                # A short write means that the kernel is full, so an edge will come.
                self._wait_for_room()
                return
        self.channel.poller.call_soon(self.on_writable)

    def _emptied(self) -> None:
        if self._stall_watch is not None:
            self._stall_watch.stop()
        if self._eof_wanted:
            self._send_eof()
        if self.notify_complete:
            self._owner.on_write_complete()

    def _wait_for_room(self) -> None:
        """The kernel takes no more for now."""
        self.channel.want_write()
        if self._stall_watch is not None:
            self._stall_watch.start(self.channel.poller)

    # -- the end

    def end(self) -> None:
        """Send EOF after everything that is queued. No more sends. Idempotent."""
        if self.open:
            self._stop_accepting()
            self._eof_wanted = True
            if not self.buffer.size:
                self._send_eof()

    def end_now(self) -> None:
        """Send EOF at once, unless that was done: nothing is queued and the close lingers."""
        if not self.eof_sent and not self._failed:
            self._send_eof()

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
            while self._eof_wanted and not self._closing:
                await self._park()
            if not self.eof_sent:
                raise self._ending.error()
            await trio.lowlevel.cancel_shielded_checkpoint()
        finally:
            self._sending = False

    def _send_eof(self) -> None:
        self._eof_wanted = False
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            self._owner.on_send_failed(error)
            return
        self.eof_sent = True
        self._owner.on_eof_sent()

    def _stop_accepting(self) -> None:
        if self.open:
            self._queue_held()
            self.open = self._accepting = False
            self._owner.start_ending()

    def start_closing(self) -> None:
        """`aclose` has begun: no more sends, and waiters hear of it. What is queued still goes."""
        self._stop_accepting()
        self._closing = True
        self.wake()

    def fail(self) -> None:
        """Nothing can be sent any more: drop what is queued and wake everybody. Idempotent."""
        self.open = self._accepting = False
        self._failed = True
        self._eof_wanted = False
        self.corked = False
        self.held = None
        self.buffer.clear()
        if self._stall_watch is not None:
            self._stall_watch.stop()
        self.wake()

    def close(self) -> None:
        """The connection is closed: `fail`, and let the owner go."""
        self.fail()
        self._owner = GONE
        self._stall_watch = None
