"""Lifecycle: a connection's state, and the one place where its descriptor is closed."""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING

import trio

from trioreactor.buffer import Buffer
from trioreactor.channel import Channel
from trioreactor.ending import Ending
from trioreactor.errors import HandshakeFailed
from trioreactor.read_half import RECEIVE_SIZE, ReadHalf
from trioreactor.sockets import broken, handshake_failed, reset_on_close
from trioreactor.state import TRANSITIONS, CloseReason, ConnectionState, check_transition
from trioreactor.watches import Watches
from trioreactor.write_half import WriteHalf

if TYPE_CHECKING:
    from collections.abc import Callable

    from trioreactor.connection_callbacks import ConnectionCallbacks
    from trioreactor.options import Timeouts, Watermarks
    from trioreactor.poller import Poller
    from trioreactor.sockets import ConnectedSocket
    from trioreactor.tcp_connection import TcpConnection
    from trioreactor.timer_queue import Timer
    from trioreactor.tls_socket import TlsSocket

logger = logging.getLogger("trioreactor.connection")


class Lifecycle:
    """Owns the two halves, hears of what happens to them, and closes them together.

    A close goes: channel removed, trio told, descriptor closed, everyone woken, with no checkpoint
    between. A broken connection (the peer or the network did it) stays readable while the kernel
    still holds what came before the break.
    """

    __slots__ = (
        "_aclosing",
        "_closed",
        "_eof",
        "_force_timer",
        "_is_twin",
        "_sock",
        "callbacks",
        "draining",
        "draining_callbacks",
        "ending",
        "handler_scope",
        "poller",
        "read",
        "state",
        "stream",
        "tls",
        "watches",
        "write",
    )

    def __init__(
        self,
        name: str,
        sock: ConnectedSocket,
        stream: trio.SocketStream | None,
        poller: Poller,
        watermarks: Watermarks,
        timeouts: Timeouts,
        *,
        state: ConnectionState = ConnectionState.CONNECTED,
    ) -> None:
        self._sock = sock
        self.poller = poller
        self.state = state
        # The trio stream, if there is one. Either our socket object is its socket's twin, on the
        # same descriptor, or the stream was built around our own object.
        self.stream = stream
        self._is_twin = stream is not None
        # Between the halves and the socket, once it is there.
        self.tls: TlsSocket | None = None
        self.handler_scope: trio.CancelScope | None = None
        self.ending = Ending(name)
        self._aclosing = False
        # Made when they are first needed: most connections need none of them.
        self.callbacks: ConnectionCallbacks | None = None
        self._closed: trio.Event | None = None
        # For those who wait for the peer's EOF, or the end, without reading.
        self._eof: trio.Event | None = None
        self._force_timer: Timer | None = None
        self.write = WriteHalf(self, self.ending, sock, watermarks)
        self.read = ReadHalf(self, self.ending, sock, self.write, watermarks.receive_limit)
        self.write.channel = self.read.channel = Channel(
            poller,
            sock,
            on_readable=self.read.on_readable,
            on_writable=self.write.on_writable,
        )
        # Set when it drains; made when somebody asks.
        self.draining: trio.Event | None = None
        # To be called when it drains; let go at the close.
        self.draining_callbacks: list[Callable[[TcpConnection], object]] | None = None
        opened = state is ConnectionState.CONNECTED
        self.watches = Watches(self, timeouts, begin=opened)
        if not opened:
            self.write.hold()

    def expire(self, reason: CloseReason) -> None:
        """A deadline has passed."""
        self.force_close(reason, reset=False)

    # -- state

    def _become(self, state: ConnectionState) -> None:
        """The only setter of the state."""
        check_transition(TRANSITIONS, self.state, state)
        logger.debug("%s: %s -> %s", self.ending.name, self.state.name, state.name)
        self.state = state

    def opened(self) -> None:
        """Every handshake is done: the connection is its user's."""
        if self.state is ConnectionState.CONNECTING:
            # A header that came before is not the peer's first byte, nor its user's. First, for
            # other threads take what is counted of a connected one for its user's.
            self.read.bytes_received = 0
        self._become(ConnectionState.CONNECTED)
        self.write.release()
        self.watches.begin()

    def not_opening(self) -> Exception:
        """What to raise to somebody who would send in front of everything else."""
        if self.state is ConnectionState.DISCONNECTED or self.ending.broken is not None:
            return self.ending.error()
        return RuntimeError(f"{self.ending.name} is open already: use send()")

    def close(self, reason: CloseReason, *, reset: bool = False) -> None:
        """Close the descriptor and wake everyone. Idempotent: the first reason stays."""
        if self.state is ConnectionState.DISCONNECTED:
            return
        self.ending.reason = reason
        self._leave_loop()
        if reset:
            reset_on_close(self._sock)
        if self.stream is None:
            self._sock.close()
            return
        if self._is_twin:
            self._sock.detach()
        # Tells trio, too: somebody may wait for the stream's descriptor.
        self.stream.socket.close()

    def _leave_loop(self) -> None:
        self._become(ConnectionState.DISCONNECTED)
        if self._force_timer is not None:
            self._force_timer.cancel()
        self.callbacks = None
        self.draining_callbacks = None
        self.watches.stop()
        self.write.channel.close()
        if self.tls is not None:
            self.tls.forget()
        self.write.close()
        self.read.close(self.ending.error() if self.ending.broken else None)
        if self._closed is not None:
            self._closed.set()
        self.on_eof()

    async def wait_closed(self) -> None:
        """Wait until the descriptor is closed."""
        if self.state is ConnectionState.DISCONNECTED:
            await trio.lowlevel.checkpoint()
            return
        if self._closed is None:
            self._closed = trio.Event()
        await self._closed.wait()

    @trio.lowlevel.enable_ki_protection
    async def wait_eof(self) -> None:
        """Wait until the peer's EOF is next to be read, or the connection breaks or ends."""
        if self._eof is None:
            self._eof = trio.Event()
        over = self._aclosing or self.state is ConnectionState.DISCONNECTED
        if self.read.eof or over or self.ending.broken is not None:
            self._eof.set()
        else:
            self.read.watch_for_end()
        await self._eof.wait()

    # -- TLS

    def begin_tls(self, tls: TlsSocket) -> None:
        """Put *tls* between the halves and the socket. Nothing is queued."""
        self.tls = tls
        self.read.use(tls)
        self.write.use(tls)

    def fail_tls(self, error: OSError) -> HandshakeFailed:
        """Close: the handshake failed by *error*. What to raise to who waits for it."""
        self.ending.broken = handshake_failed(error)
        self.close(CloseReason.HANDSHAKE_FAILED)
        return handshake_failed(error)

    # -- closing on purpose

    @trio.lowlevel.enable_ki_protection
    def force_close(self, reason: CloseReason, *, reset: bool) -> None:
        """Close now; drop what is queued; cancel the handler."""
        self.ending.closed_here = True
        # First, so that the handler sees one thing, the cancellation, and not two. Also when the
        # connection is closed already, for its handler may still be at something else.
        if self.handler_scope is not None:
            self.handler_scope.cancel()
        self.close(reason, reset=reset)

    def force_close_after(self, seconds: float) -> None:
        """`force_close` in a while. A later call replaces an earlier one."""
        if self._force_timer is not None:
            self._force_timer.cancel()
        if self.state is not ConnectionState.DISCONNECTED:
            self._force_timer = self.poller.call_at(
                trio.current_time() + seconds,
                lambda: self.force_close(CloseReason.FORCED, reset=False),
            )

    def start_ending(self) -> None:
        """No more sends from here on; what is queued still goes."""
        if self.state is ConnectionState.CONNECTED:
            self._become(ConnectionState.DISCONNECTING)

    def shutdown(self) -> None:
        """Half-close after everything queued, within `linger`."""
        if self.state is ConnectionState.CONNECTED:
            self.write.end()
            self.watches.start_linger()

    def on_linger_expired(self, reason: CloseReason | None) -> None:
        """The peer has had `Timeouts.linger` seconds."""
        self.close(reason or self._natural_reason())

    def _natural_reason(self) -> CloseReason:
        """The reason of a close by us, if nothing else comes between."""
        if self.ending.broken is not None:
            return CloseReason.PEER_RESET
        if self.ending.fault is not None:
            return self.ending.fault
        return CloseReason.PEER_EOF if self.read.eof else CloseReason.LOCAL_CLOSE

    @trio.lowlevel.enable_ki_protection
    async def aclose(self) -> None:
        """Flush, linger if the peer would lose our last bytes otherwise, close."""
        self.ending.closed_here = True
        try:
            if self._aclosing:
                await self.wait_closed()
            elif self.state is not ConnectionState.DISCONNECTED:
                self._aclosing = True
                self.on_eof()
                # Before we change anything, or our own act would change the reason.
                reason = self._natural_reason()
                self.write.start_closing()
                self.read.start_closing()
                await trio.lowlevel.checkpoint_if_cancelled()
                await self._flush_and_linger()
                self.close(reason)
        except BaseException:
            self.close(CloseReason.CANCELLED)
            raise
        await self.poller.wait_stopped()

    def close_at_eof(self) -> bool:
        """`aclose` where it has nothing to wait for: the peer's EOF was read and nothing is queued.
        Whether that was so.
        """
        if not self.read.eof or self.write.queued or self._aclosing:
            return False
        if self.tls is not None:
            self.write.end_now()
            if not self.write.eof_sent or self.state is ConnectionState.DISCONNECTED:
                return False
        self.ending.closed_here = True
        self.close(self._natural_reason())
        return True

    async def _flush_and_linger(self) -> None:  # noqa: ASYNC910 aclose has checkpoints
        if self.write.buffer.size:
            self.watches.start_linger()
            await self.write.wait_at_most(0)
        if self.tls is not None:
            await self._end_tls(self.tls)
        if self.read.eof or not self.read.has_unread():
            # Closing sends FIN, and the kernel delivers the rest.
            return  # noqa: ASYNC910 as above
        # Closing with unread input sends RST, which can overtake our last bytes.
        self.write.end_now()
        self.watches.start_linger()
        while self._discard():
            await self.read.wait_readable()

    async def _end_tls(self, tls: TlsSocket) -> None:  # noqa: ASYNC910 aclose has checkpoints
        """Send close_notify: without it the peer would take what it has got for cut."""
        # What the peer sends from here on nobody reads, so nothing is missed if that is.
        tls.https_compatible = True
        if tls.ready:
            self.write.end_now()
        if self.write.eof_wanted:
            self.watches.start_linger()
            await self.write.wait_eof_sent()

    def _discard(self) -> bool:
        """Read and drop what is there. False once nothing can come.

        The peer's bytes must leave our kernel before the socket closes, or closing sends a reset
        that can destroy our own last bytes on their way.
        """
        self.read.buffer = Buffer()
        try:
            # More than one read is for later: a peer that floods must not keep us here.
            self.read.receive_nowait(RECEIVE_SIZE)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return False
        return not self.read.eof

    def detach(self) -> bytes:
        """Leave the loop without closing the descriptor; return what was read and not consumed."""
        if self.tls is not None:
            raise RuntimeError("TLS cannot be taken off a connection again: close it instead")
        self.write.uncork()
        if self.write.buffer.size:
            raise trio.BusyResourceError("data is still queued: await wait_drained() first")
        if self.read.busy or self.read.dispatching:
            raise trio.BusyResourceError("another task is receiving on this connection")
        if self.state is not ConnectionState.CONNECTED:
            raise self.ending.error()
        left_over = self.read.buffer.take()
        self.ending.closed_here = True
        self.ending.reason = CloseReason.LOCAL_CLOSE
        self._leave_loop()
        if self._is_twin:
            self._sock.detach()
        return left_over

    # -- what the halves tell

    def on_receive_failed(self, error: OSError) -> None:
        """A read found the connection broken: nothing is left in it."""
        if self.ending.broken is None:
            self.ending.broken = broken(error)
        self.close(CloseReason.PEER_RESET)

    def on_eof(self) -> None:
        """The peer's EOF was read, or is next to be."""
        if self._eof is not None:
            self._eof.set()

    def on_send_failed(self, error: OSError) -> None:
        """A write found the connection broken. What came before the break may still be unread."""
        if self.ending.broken is None:
            self.ending.broken = broken(error)
        if error.errno != errno.EPIPE:
            # EPIPE: the peer had sent its EOF before, and that stays a clean one to read.
            self.read.reset_error = error
        self.write.fail()
        self.on_eof()
        # Somebody who reads will find the end. A paused dispatch, or nobody, will not.
        if not self.read.busy and (self.read.dispatching or not self.read.has_unread()):
            self.close(CloseReason.PEER_RESET)

    def on_send_buffer_full(self) -> None:
        """The peer is too slow for a sender that does not wait."""
        self.ending.broken = trio.BrokenResourceError("the send buffer reached its limit")
        self.close(CloseReason.SLOW_CONSUMER)

    def on_send_torn(self) -> None:
        """A message was cut off half-way, so nothing can follow it."""
        if self.state is not ConnectionState.DISCONNECTED:
            self.ending.broken = trio.BrokenResourceError("a send_all was cancelled half-way")
            self.close(CloseReason.CANCELLED)

    def on_write_stalled(self, was_away: bool) -> None:
        """The kernel has taken nothing for `Timeouts.write_stall` seconds."""
        sent = self.write.bytes_sent
        if was_away:
            # It may have had room for long. Else it has none that the peer has made: it says so
            # when a third is free, and would take more before, from whomever.
            self.write.on_writable()
        if self.write.bytes_sent == sent and self.ending.broken is None:
            self.force_close(CloseReason.WRITE_STALLED, reset=False)

    def on_eof_sent(self) -> None:
        """Our EOF is on its way; a linger that runs begins anew."""
        self.watches.on_eof_sent()

    def on_high_water_mark(self) -> None:
        """The send buffer rose above the high mark."""
        if self.callbacks is not None:
            self.callbacks.on_high_water_mark(self.write.buffer.size)

    def on_low_water_mark(self) -> None:
        """The send buffer sank to the low mark."""
        if self.callbacks is not None:
            self.callbacks.on_low_water_mark(self.write.buffer.size)

    def on_write_complete(self) -> None:
        """Everything sent is with the kernel."""
        if self.callbacks is not None:
            self.callbacks.on_write_complete()
