"""TcpConnection: one established connection, from the first byte to the closed descriptor."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any

import trio

from trioreactor.address import SocketAddress, format_address
from trioreactor.connection_callbacks import (
    MessageCallback,
    WaterMarkCallback,
    WriteCompleteCallback,
)
from trioreactor.connection_statistics import ConnectionStatistics
from trioreactor.default_poller import current_poller
from trioreactor.draining_attributes import DrainingAttributes
from trioreactor.event_loop import EventLoop
from trioreactor.handler_errors import reason_for
from trioreactor.lifecycle import Lifecycle
from trioreactor.opening_attributes import OpeningAttributes
from trioreactor.options import Timeouts, Watermarks
from trioreactor.overflow import Overflow, check_overflow, offer
from trioreactor.proxy_attributes import ProxyAttributes
from trioreactor.proxy_header import ProxyHeader
from trioreactor.reading_attributes import ReadingAttributes
from trioreactor.send_buffer import Droppable
from trioreactor.sending_attributes import SendingAttributes
from trioreactor.socket_attributes import SocketAttributes
from trioreactor.sockets import ConnectedSocket, peer_of, stdlib_twin
from trioreactor.state import CloseReason, ConnectionState
from trioreactor.timing_attributes import TimingAttributes
from trioreactor.tls_attributes import TlsAttributes


class TcpConnection(
    DrainingAttributes,
    OpeningAttributes,
    ProxyAttributes,
    ReadingAttributes,
    SendingAttributes,
    SocketAttributes,
    TimingAttributes,
    TlsAttributes,
    trio.abc.HalfCloseableStream,
):
    """An established connection, over TCP or a Unix socket: a `trio.abc.HalfCloseableStream`.

    It owns *stream* from here on and closes it. Nobody else may read, write or close that stream
    before `detach`. In the *state* CONNECTING it waits for `opened`: nothing may be sent, and no
    deadline runs. Not reusable: a closed connection stays closed. Use it from the trio run it
    was made in; from other threads go through `EventLoop.queue_in_loop`.

    Errors: `trio.ClosedResourceError` after we closed, `trio.BrokenResourceError` after the peer or
    the network did, `trio.BusyResourceError` when two tasks use the same way at once.
    """

    __slots__ = (
        "__weakref__",
        "_life",
        "_proxied",
        "_read",
        "_sock",
        "_write",
        "context",
        "handler_error",
        "local_address",
        "peer_address",
    )

    context: Any
    """Yours: the library never looks at it."""
    handler_error: BaseException | None
    """What a handler raised, where it closed the connection itself before raising: so that whoever
    logs it can tell it from the consequences of a close."""
    local_address: SocketAddress
    """Our end."""
    peer_address: SocketAddress
    """The other end, as `accept` returned it; empty if it was gone before it could be asked. Behind
    a proxy that sends a PROXY header, the client: see `proxy_address`."""

    def __init__(
        self,
        stream: trio.SocketStream,
        *,
        name: str | None = None,
        watermarks: Watermarks = Watermarks(),
        timeouts: Timeouts = Timeouts(),
        state: ConnectionState = ConnectionState.CONNECTED,
    ) -> None:
        sock = stdlib_twin(stream.socket)
        try:
            self._set_up(
                sock, stream, sock.getsockname(), peer_of(sock), name, watermarks, timeouts, state
            )
        except BaseException:
            sock.detach()
            raise

    @classmethod
    def from_socket(
        cls,
        sock: ConnectedSocket,
        *,
        local_address: SocketAddress,
        peer_address: SocketAddress,
        name: str | None = None,
        watermarks: Watermarks = Watermarks(),
        timeouts: Timeouts = Timeouts(),
        state: ConnectionState = ConnectionState.CONNECTED,
    ) -> TcpConnection:
        """Make one, as the server does, from a connected, non-blocking standard socket."""
        self = cls.__new__(cls)
        self._set_up(sock, None, local_address, peer_address, name, watermarks, timeouts, state)
        return self

    def _set_up(
        self,
        sock: ConnectedSocket,
        stream: trio.SocketStream | None,
        local_address: SocketAddress,
        peer_address: SocketAddress,
        name: str | None,
        watermarks: Watermarks,
        timeouts: Timeouts,
        state: ConnectionState,
    ) -> None:
        self.local_address = local_address
        self.peer_address = peer_address
        self._proxied = None
        self.context = None
        self.handler_error = None
        self._sock = sock
        if name is None:
            name = f"{format_address(local_address)}-{format_address(peer_address)}"
        self._life = Lifecycle(
            name, sock, stream, current_poller(), watermarks, timeouts, state=state
        )
        # Shortcuts for what is called most.
        self._read = self._life.read
        self._write = self._life.write

    # -- identity

    @property
    def name(self) -> str:
        """For logs and registries. A server numbers its own; else the two addresses."""
        return self._life.ending.name

    def set_proxy_header(self, header: ProxyHeader) -> None:
        """Believe *header*: `peer_address` is its source from now on, if it has one.

        `receive_proxy_header` does this; it is for whoever gets to know a client in another way.
        Raises `RuntimeError` if there is a header already.
        """
        if self._proxied is not None:
            raise RuntimeError(f"{self.name} has a PROXY header already")
        self._proxied = header, self.peer_address
        if header.source is not None:
            self.peer_address = header.source

    @property
    def loop(self) -> EventLoop:
        """The loop that it lives in. Other threads have their say by its `EventLoop.queue_in_loop`;
        they may look at the name, the addresses, `state`, `close_reason` and `statistics`.
        """
        return self._life.poller.loop

    @property
    def state(self) -> ConnectionState:
        """Where the connection stands."""
        return self._life.state

    @property
    def close_reason(self) -> CloseReason | None:
        """Why it was closed; None until then."""
        return self._life.ending.reason

    @property
    def closing(self) -> bool:
        """Whether we have begun to close it, by `aclose` or `force_close`."""
        return self._life.ending.closed_here

    @property
    def peer_closed(self) -> bool:
        """Whether the peer has closed its side or broken the connection, as far as we know: input
        from before may be unread. On the trio poller we know once it is read, or a send fails.
        """
        return self._read.eof or self.broken or self._read.channel.hangup

    @property
    def broken(self) -> bool:
        """Whether the peer or the network has broken it. Input from before may still be unread."""
        return self._life.ending.broken is not None

    @property
    def handler_scope(self) -> trio.CancelScope | None:
        """What `force_close` cancels: set by whoever runs a handler for this connection."""
        return self._life.handler_scope

    @handler_scope.setter
    def handler_scope(self, scope: trio.CancelScope | None) -> None:
        self._life.handler_scope = scope

    def __repr__(self) -> str:
        return f"<TcpConnection {self.name} {self.state.value}>"

    # -- sending

    def send(self, data: bytes | bytearray | memoryview) -> bool:
        """Send *data* without ever blocking; all of it is taken, in order.

        True: go on. False: the send buffer has risen above the high-water mark, so wait with
        `wait_send_all_might_not_block` before sending more; it stays False until the buffer has
        sunk to the low one. Empty data does nothing. In a dispatch callback, what several calls
        send leaves together after the callback.

        Raises `trio.ClosedResourceError` after `shutdown`, `send_eof` or a close,
        `trio.BrokenResourceError` on a broken connection, `SendBufferFull` if it would take the
        buffer over the hard limit (the connection is closed then), and `trio.BusyResourceError`
        while a `send_all` streams data larger than that limit. Never drops anything silently.
        """
        return self._write.send(data)

    def offer(self, data: bytes, overflow: Overflow = "drop_newest") -> int:
        """`send` for what may be lost: news of which there is always newer. Never blocks.

        Where `send` would close the connection, because *data* passes the hard limit, this drops
        *data* (``"drop_newest"``) or the oldest that were offered (``"drop_oldest"``), and answers
        how many. Else errors as `send`. What was sent, or partly written, stays.
        """
        check_overflow("offer", overflow)
        return offer(self._write, data if type(data) is Droppable else Droppable(data), overflow)

    # This one and receive_some are plain functions that hand on a coroutine: one layer less to go
    # through at every wait. (pyright would have the very class of an async function's result)
    def send_all(self, data: bytes | bytearray | memoryview) -> Coroutine[Any, Any, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Send *data*: all of it is queued at once, then this waits while the peer is slow.

        It waits only if the send buffer rose above the high-water mark, until it has sunk to the
        low one. Cancelling that wait loses nothing and leaves no hole: the data is queued and
        will be sent. Cancelled before, nothing is queued. Data larger than `Watermarks.limit` is
        streamed in slices; cancelling that breaks the connection, for half a message cannot be
        taken back. Errors are those of `send`.
        """
        return self._write.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until the send buffer is not congested: at or below the low-water mark if it had
        risen above the high one. Cancelling changes nothing.
        """
        await self._write.wait_send_all_might_not_block()

    async def wait_drained(self) -> None:
        """Wait until everything queued is with the kernel. Any number of tasks may wait.

        `trio.BrokenResourceError` or `trio.ClosedResourceError` if that will not happen.
        """
        await self._write.wait_drained()

    def shutdown(self) -> None:
        """Half-close once everything queued is sent; input can still be read. Idempotent.

        The peer then has `Timeouts.linger` seconds to close its side, or the connection is
        closed. To half-close and read on for as long as you like, use `send_eof`.
        """
        self._life.shutdown()

    async def send_eof(self) -> None:
        """Half-close after everything queued, and wait until that is done. Idempotent.

        Cancelling the wait changes nothing: the EOF follows the data. Errors are those of `send`.
        """
        await self._write.send_eof()

    # -- receiving

    def receive_some(self, max_bytes: int | None = None) -> Coroutine[Any, Any, bytes]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Wait for input and return up to *max_bytes* of it (None: what one read gives).

        ``b""`` at the peer's EOF, every time. Cancelling loses nothing. Raises
        `trio.BrokenResourceError` after what came before the break has been read, and
        `trio.ClosedResourceError` once we have closed.
        """
        return self._read.receive_some(max_bytes)

    def __anext__(self) -> Coroutine[Any, Any, bytes]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The next chunk, as `receive_some` gives it; the end at EOF."""
        return self._read.receive_some(None, iterating=True)

    async def dispatch(
        self,
        on_message: MessageCallback,
        *,
        write_complete: WriteCompleteCallback | None = None,
        high_water_mark: WaterMarkCallback | None = None,
        low_water_mark: WaterMarkCallback | None = None,
    ) -> None:
        """Callback mode: call ``on_message(conn, buffer)`` for input, until EOF or close.

        The callback takes from the `Buffer` what it wants; what it leaves is there again next
        time, together with what came since. It runs in this task's context, in the reactor, so it
        must not block. The other callbacks, if given, replace the connection's own attributes.

        Returns at the peer's EOF and after a close of ours. Raises what a callback raises,
        `trio.BrokenResourceError` if the connection breaks, and `ReceiveBufferFull` if the
        callback leaves `Watermarks.receive_limit` bytes unread without `stop_reading`. Cancelling
        ends callback mode; unconsumed bytes come from the next `receive_some` or `dispatch`.
        """
        if write_complete is not None:
            self.write_complete_callback = write_complete
        if high_water_mark is not None:
            self.high_water_mark_callback = high_water_mark
        if low_water_mark is not None:
            self.low_water_mark_callback = low_water_mark
        await self._read.dispatch(self, on_message)

    def dispatch_nowait(
        self,
        on_message: MessageCallback,
        on_end: Callable[[TcpConnection, BaseException | None], object],
    ) -> None:
        """`dispatch` with no task: at its end *on_end* is called, with the connection and what
        `dispatch` would raise, or None. Callbacks run in a copy of the caller's context.

        *on_end* may be called from inside anything that ends a dispatch, a callback included, so it
        should only note what happened, or start a task. What it raises is a mistake, and logged.
        """
        self._read.dispatch_nowait(self, on_message, contextvars.copy_context(), on_end)

    # -- the end

    async def aclose(self) -> None:
        """Close gracefully: send what is queued, then close. Idempotent.

        Tasks blocked on this connection hear of it at once (`trio.ClosedResourceError`). With
        unread input it half-closes first and reads on until the peer's EOF, for closing then would
        send a reset that can destroy our last bytes. Each of these waits is bounded by
        `Timeouts.linger`. Cancelling closes at once; what was still queued is lost.
        """
        await self._life.aclose()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """As `aclose`. An error that leaves the block is the reason of the close, as where it
        leaves a handler: `CloseReason.PROTOCOL_ERROR` or `CloseReason.HANDLER_ERROR`.
        """
        if isinstance(error, Exception):
            self._life.ending.fault = reason_for(self, error)
        await self.aclose()

    def close_at_eof(self) -> bool:
        """Close, if the peer has sent its EOF and nothing is queued: what `aclose` does then, at
        once. Whether that was so.
        """
        return self._life.close_at_eof()

    def force_close(self, reason: CloseReason = CloseReason.FORCED, *, reset: bool = False) -> None:
        """Close at once, from anywhere in the loop, a callback too. Idempotent.

        What is queued is dropped, everyone blocked on the connection is woken, and the handler's
        scope is cancelled. With *reset* the peer gets RST instead of FIN.
        """
        self._life.force_close(reason, reset=reset)

    def force_close_after(self, seconds: float) -> None:
        """`force_close` in *seconds*, unless closed by then. A later call replaces this."""
        if not seconds >= 0:
            raise ValueError(f"force_close_after({seconds!r}): pass at least 0 seconds")
        self._life.force_close_after(seconds)

    async def wait_closed(self) -> None:
        """Wait until the descriptor is closed, by whomever. Any number of tasks may wait."""
        await self._life.wait_closed()

    def detach(self) -> tuple[trio.SocketStream, bytes]:
        """Hand the socket back, with what was read from it and not consumed.

        The connection is closed after this, but the stream is open and yours. Raises
        `trio.BusyResourceError` if data is still queued or a task is receiving, `RuntimeError`
        with TLS, which stays here.
        """
        stream = self.stream
        return stream, self._life.detach()

    # -- how it is

    def statistics(self) -> ConnectionStatistics:
        """The counters as they are now; they stay readable after the close."""
        write = self._write
        return ConnectionStatistics(
            bytes_received=self._read.bytes_received,
            bytes_sent=write.bytes_sent,
            buffered=write.queued,
            pauses=write.buffer.pauses,
            resumes=write.buffer.resumes,
            dropped=write.buffer.dropped,
        )
