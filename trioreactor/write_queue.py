"""WriteQueue: what is sent on a connection, in order. Nothing here waits."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import trio

from trioreactor.errors import SendBufferFull
from trioreactor.half_owner import GONE
from trioreactor.send_buffer import (
    Crossing,
    Droppable,
    SendBuffer,
    bytes_view,
    kept,
)
from trioreactor.sockets import broken

if TYPE_CHECKING:
    from trioreactor.channel import Channel
    from trioreactor.ending import Ending
    from trioreactor.half_owner import HalfOwner
    from trioreactor.options import Watermarks
    from trioreactor.sockets import DataSocket
    from trioreactor.stall_watch import StallWatch
    from trioreactor.tls_socket import TlsSocket

# Gather writes in one go before others have their turn: at most a megabyte, with the buffer's own
# bound on each.
_WRITES_PER_TURN = 4


class WriteQueue:
    """Writes at once when nothing is queued; what the kernel does not take is queued.

    The queue is flushed on the next writable edge, so no task is needed. While corked (a dispatch
    callback runs, or messages that came together are answered), sends are gathered and leave
    together in `uncork`.
    """

    __slots__ = (
        "_accepting",
        "_closing",
        "_ending",
        "_failed",
        "_lot",
        "_owner",
        "_sock",
        "_tls",
        "_turn",
        "buffer",
        "bytes_sent",
        "channel",
        "corked",
        "eof_sent",
        "eof_wanted",
        "held",
        "moved",
        "notify_complete",
        "open",
        "stall_watch",
    )

    channel: Channel

    def __init__(
        self,
        owner: HalfOwner,
        ending: Ending,
        sock: DataSocket,
        watermarks: Watermarks,
    ) -> None:
        self._owner: HalfOwner = owner  # replaced by `GONE` at the close
        self._ending = ending
        self._sock = sock
        self._tls: TlsSocket | None = None  # the same, once it is one
        self.buffer = SendBuffer(watermarks)
        self.bytes_sent = 0
        # False once `end` or `fail` was called: nothing new may be sent.
        self.open = True
        # `open`, and nothing is under way that another send would tear apart: see `hold`.
        self._accepting = True
        self._failed = False
        # `aclose` has begun: whoever waits for room hears of it at once.
        self._closing = False
        self.eof_sent = False
        self.eof_wanted = False  # once all that is queued has gone
        # Somebody wants `on_write_complete`.
        self.notify_complete = False
        # Gather what is sent, until `uncork`.
        self.corked = False
        # The loop's turn in which `gather` was last asked.
        self._turn = -1
        # What was gathered, while it is one piece: for most callbacks send one, and a queue for it
        # costs as much as all the rest of a send.
        self.held: bytes | memoryview | None = None
        # Made by the first who waits.
        self._lot: trio.lowlevel.ParkingLot | None = None
        self.stall_watch: StallWatch | None = None  # told when something waits, and moves
        self.moved: float | None = None  # when the kernel last took something, if it matters

    @property
    def queued(self) -> int:
        """Bytes that the kernel has not taken yet."""
        return self.buffer.size + len(self.held or b"")  # looked at once: threads ask, too

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
            if self._append_gathered(data if type(data) is bytes else kept(data), n):
                return not buffer.congested
            # Gathering more would cross a mark that writing may yet avoid.
            if buffer.size:
                self.flush()
                if not self.open:
                    raise self._refusal()
        if buffer.size:
            self.enqueue(data)
        elif self._write(data, n):
            return True
        return not buffer.congested

    def _write(self, data: bytes | memoryview, n: int) -> bool:
        """Give the kernel *n* bytes, with nothing queued. False: it left some; they are queued."""
        try:
            sent = self._sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._owner.on_send_failed(error)
            raise broken(error) from error
        self.bytes_sent += sent
        if self.moved is not None and sent:
            self.moved = trio.current_time()
        if sent == n:
            if self.notify_complete:
                self._owner.on_write_complete()
            return True
        # What may be dropped may be so until some of it is written.
        self.enqueue(memoryview(data)[sent:] if sent else data)
        self._wait_for_room()
        return False

    def enqueue(self, data: bytes | memoryview) -> None:
        """Queue *data*, for which what may be dropped makes room. `SendBufferFull`, and the end of
        the connection, if there is none.
        """
        buffer = self.buffer
        n = len(data)
        if not buffer.has_room(n):
            if buffer.droppable and buffer.drop_oldest(n) is Crossing.LOW:
                self.sank()
            if not buffer.has_room(n):
                error = self._full(n)
                self._owner.on_send_buffer_full()
                raise error
        if buffer.append(kept(data)) is Crossing.HIGH:
            self._owner.on_high_water_mark()

    def _full(self, n: int) -> SendBufferFull:
        buffer = self.buffer
        if not buffer.can_ever_hold(n):
            return SendBufferFull(
                f"{n} bytes are more than the limit of {buffer.limit} can ever hold: use "
                "send_all(), or raise Watermarks.limit"
            )
        return SendBufferFull(
            f"{n} bytes more than the {buffer.size} that wait for the peer would pass the limit of "
            f"{buffer.limit}: when send() answers False, wait with wait_send_all_might_not_block()"
        )

    @trio.lowlevel.enable_ki_protection
    def send_if_idle(self, data: bytes) -> bool | None:
        """`send`, if nothing is queued and it may: whether it did, and None if something is queued
        or may have to be dropped.

        For broadcasts, to whom this is what most connections need. `trio.BrokenResourceError` as
        from `send`.
        """
        if self.buffer.size or self.held is not None:
            return None
        if type(data) is Droppable and not self.buffer.can_ever_hold(len(data)):
            return None
        if not self._accepting:
            return False
        if self.corked:
            self.send(data)
        else:
            self._write(data, len(data))
        return True

    def gather(self) -> None:
        """`cork`, unless this is the first since the loop's last turn: of those who send one after
        another only the first is not to wait for the others.
        """
        turn = self.channel.poller.turn
        if self._turn == turn:
            self.cork()
        self._turn = turn

    @trio.lowlevel.enable_ki_protection
    def gathered(self, data: bytes) -> bool:
        """`cork`, and send *data* if it can be gathered with what is so already, and crosses no
        mark. Whether it was sent.
        """
        # Others than bytes may be changed before they are written.
        if not self._accepting or type(data) is not bytes:
            return False
        if not self.corked:
            self.cork()
        return bool(data) and self._append_gathered(data, len(data))

    def _append_gathered(self, data: bytes | memoryview, n: int) -> bool:
        """Put *data* with what is gathered already. False: that would cross a mark."""
        buffer = self.buffer
        if not buffer.size:
            if self.held is None and n <= buffer.high:
                self.held = data
                return True
            self._queue_held()
        return buffer.append_below(data)

    def cork(self) -> None:
        """Gather what is sent, until `uncork` or the poller's next turn."""
        if not self.corked:
            self.corked = True
            self.channel.poller.call_soon(self.uncork)

    @trio.lowlevel.enable_ki_protection
    def uncork(self) -> None:
        """Write what was gathered while `corked`. Never raises. Idempotent."""
        if not self.corked:
            return
        self.corked = False
        held = self.held
        if held is not None:
            self.held = None
            try:  # noqa: SIM105 suppress costs as much as all the rest of this
                self._write(held, len(held))
            except trio.BrokenResourceError:
                # The owner has heard of it, and the callback that sent is over.
                pass
            if self._lot:
                self.wake()
        elif self.buffer.size:
            self.flush()

    def _queue_held(self) -> None:
        if self.held is not None:
            # It is no more than the high mark and nothing else is queued: no crossing.
            self.buffer.append(self.held)
            self.held = None

    def _refusal(self) -> Exception:
        if self.open:
            return trio.BusyResourceError(
                "nothing can be sent now: a handshake runs, or another task streams data larger "
                "than the send buffer's limit"
            )
        return self._ending.error()

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
        elif self._tls is not None:
            self._flush_tls(self._tls)

    def _flush_tls(self, tls: TlsSocket) -> None:
        """With nothing queued, what TLS itself has to send."""
        if self.eof_wanted and tls.ready:
            self._send_eof()
        else:
            tls.flush_by_the_way()
        self.wake()

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
            if self.moved is not None:
                self.moved = trio.current_time()
            if self.stall_watch is not None:
                self.stall_watch.progress()
            if buffer.consume(sent) is Crossing.LOW:
                self.sank()
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

    def sank(self) -> None:
        """The buffer has sunk to the low mark."""
        self._owner.on_low_water_mark()
        self.wake()

    def _emptied(self) -> None:
        if self.stall_watch is not None:
            self.stall_watch.stop()
        if self.eof_wanted:
            self._send_eof()
        if self.notify_complete:
            self._owner.on_write_complete()

    def _wait_for_room(self) -> None:
        """The kernel takes no more for now."""
        if self._tls is not None:
            self.buffer.pin(self._tls.ahead)
        self.channel.want_write()
        if self.stall_watch is not None:
            self.stall_watch.start(self.channel.poller)

    # -- the end

    def end(self) -> None:
        """Send EOF after everything that is queued. No more sends. Idempotent."""
        if self.open:
            self._stop_accepting()
            self.eof_wanted = True
            if not self.buffer.size:
                self._send_eof()

    def end_now(self) -> None:
        """Send EOF at once, unless that was done: nothing is queued and the close lingers."""
        if not self.eof_sent and not self._failed:
            self._send_eof()

    def _send_eof(self) -> None:
        self.eof_wanted = False
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            # TLS has something to say first.
            self.eof_wanted = True
            self._wait_for_room()
            return
        except OSError as error:
            self._owner.on_send_failed(error)
            return
        if self.stall_watch is not None:
            self.stall_watch.stop()
        self.eof_sent = True
        self._owner.on_eof_sent()

    def _stop_accepting(self) -> None:
        if self.open:
            self._owner.start_ending()
            self._queue_held()
            self.open = self._accepting = False

    def start_closing(self) -> None:
        """`aclose` has begun: no more sends, and waiters hear of it. What is queued still goes."""
        self._stop_accepting()
        self._closing = True
        self.wake()

    def fail(self) -> None:
        """Nothing can be sent any more: drop what is queued and wake everybody. Idempotent."""
        self.open = self._accepting = False
        self._failed = True
        self.eof_wanted = False
        self.corked = False
        self.held = None
        self.buffer.clear()
        if self.stall_watch is not None:
            self.stall_watch.stop()
        self.wake()

    def close(self) -> None:
        """The connection is closed: `fail`, and let the owner go."""
        self.fail()
        self._owner = GONE
        self.stall_watch = None
