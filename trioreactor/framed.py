"""FramedChannel: a connection as a channel of messages."""

from __future__ import annotations

import ssl
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar, Unpack

import trio

from trioreactor.buffer import Buffer
from trioreactor.codec import MESSAGES_PER_TURN, Codec, check_callback, check_codec, check_taken
from trioreactor.errors import ProtocolError
from trioreactor.exception_groups import twin, without_frames
from trioreactor.heartbeat import Heartbeat, HeartbeatWatch, check_heartbeat
from trioreactor.state import CloseReason
from trioreactor.tcp_connection import TcpConnection
from trioreactor.tls_attributes import TlsOptions

T = TypeVar("T")

# So many sends that did not have to wait are followed by a turn for the other tasks.
_SENDS_PER_TURN = 64


class FramedChannel(trio.abc.Channel[T]):
    """Sends and receives messages over *conn*, as *codec* frames them.

    It takes the connection over: nobody else may read from it, what others send on it (a broadcast)
    must be whole messages, and closing the channel closes it. One task may receive; any number may
    send.

    Messages that came together are given without a task switch for each, and what is sent while
    further ones wait to be received leaves together. Every call can be cancelled; other tasks have
    their turn at least after each 32 messages.
    """

    def __init__(
        self, conn: TcpConnection, codec: Codec[T], *, heartbeat: Heartbeat[T] | None = None
    ) -> None:
        check_codec("FramedChannel", codec)
        if heartbeat is not None:
            check_heartbeat("FramedChannel", heartbeat)
        self.conn = conn
        """The connection underneath."""
        self._codec = codec
        # What was read and not decoded, and what was decoded and not received.
        self._buffer = Buffer()
        self._messages: deque[T] = deque()
        # The buffer may hold further whole messages: decoding stopped for the others' turn.
        self._more = False
        # What the peer did wrong, to be raised after the messages before it, and ever after.
        self._error: ProtocolError | None = None
        self._sends = 0
        # What is sent is gathered, for more messages are there to be answered.
        self._corked = False
        # A message has been decoded while draining: what is left over may stay.
        self._drained = False
        # A `receive` waits.
        self._waiting = False
        conn.add_draining_callback(self._on_draining)
        conn.stop_at_close(self)
        self._heartbeat = (
            None if heartbeat is None else HeartbeatWatch(conn, heartbeat, self.send_nowait)
        )

    # -- receiving

    async def receive(self) -> T:
        """Wait for the next message and give it. Cancelling loses nothing.

        Raises `trio.EndOfChannel` at the peer's EOF, and between two messages once the connection
        drains; `IncompleteFrame` if the EOF came inside a message, `FrameTooLarge` or another
        `ProtocolError` for what the codec refuses, after all messages before it have been given;
        and what `TcpConnection.receive_some` raises.
        """
        messages = self._messages
        if messages:
            await trio.lowlevel.checkpoint_if_cancelled()
            return messages.popleft()  # noqa: ASYNC910 others have their turn between batches
        while True:
            if self._more:
                # One turn of the loop in which it sees who else has input, and one for them.
                await trio.lowlevel.checkpoint()
                await trio.lowlevel.checkpoint()
            elif self._error is not None:
                # The error is likely to end the connection, and what was sent came before it.
                self.conn.uncork()
                await trio.lowlevel.checkpoint()
                # Raised itself it would keep a traceback, which has this frame, which has it.
                raise twin(self._error) from self._error.__cause__
            else:
                self.conn.uncork()
                data = await self._read()
                if self.conn.closing:
                    # Meanwhile. To read again says so.
                    continue
                if not data:
                    if not self._drained:
                        self._codec.check_end(self._buffer)
                    raise trio.EndOfChannel
                self._buffer.append(data)
            self._decode()
            if messages:
                return messages.popleft()

    async def __anext__(self) -> T:
        """As `receive`; the end where that raises `trio.EndOfChannel`."""
        # The base class's has a layer more.
        if self._messages:
            await trio.lowlevel.checkpoint_if_cancelled()
            return self._messages.popleft()  # noqa: ASYNC910 as in receive
        try:
            return await self.receive()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None

    def _decode(self) -> None:
        """Decode what has been read, up to a turn's worth."""
        buffer = self._buffer
        size = buffer.size
        found: list[T] = []
        self._more = False
        try:
            self._more = not self._codec.decode_into(buffer, found, MESSAGES_PER_TURN)
        except ProtocolError as error:
            self._error = without_frames(error)
        if self._more:
            check_taken(self._codec, len(found), size - buffer.size)
        if found:
            # What is left over counts as begun when somebody waits for its rest.
            self.conn.decoded(len(found), 0)
            self._drained = self.conn.draining.is_set()
        heartbeat = self._heartbeat
        if heartbeat is not None:
            found = [message for message in found if not heartbeat.takes(message)]
        self._messages.extend(found)

    async def _read(self) -> bytes:
        """The next input; b"" at the end."""
        if self._waiting:
            raise trio.BusyResourceError("another task is already receiving on this channel")
        at_boundary = self._drained or (self.conn.draining.is_set() and not self._buffer.size)
        if at_boundary and not self.conn.closing:
            await trio.lowlevel.checkpoint()
            return b""
        if self._buffer.size:
            self.conn.decoded(0, self._buffer.size)
        self._waiting = True
        try:
            return await self.conn.receive_some()
        finally:
            self._waiting = False

    def _on_draining(self, _conn: TcpConnection) -> None:
        if self._waiting and not self._buffer.size:
            self.conn.interrupt_receive()

    def stop(self) -> None:
        """The library's: the connection is closed. If we did that, nothing is given any more."""
        if self.conn.closing:
            self._forget()

    def _forget(self) -> None:
        self._messages.clear()
        self._buffer = Buffer()
        self._more = False
        self._error = None

    # -- sending

    async def send(self, value: T) -> None:
        """Send *value*, a message, after waiting until it passes no mark of the send buffer.

        Cancelled while it waits, nothing of the message is sent; but of one larger than
        `Watermarks.limit`, which is streamed, a part may be, and that breaks the connection.
        Messages that are sent one after another leave together, in the loop's next turn, but for
        the first, which leaves at once. `ValueError` if the codec cannot encode it; else errors as
        `TcpConnection.send`.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        data = self._codec.encode(value)
        conn = self.conn
        self._sends += 1
        if self._messages and conn.gathered(data):
            # Most answers. There will be more, and with the last of them these leave.
            self._corked = True
        else:
            if not conn.takes(len(data)):
                conn.uncork()
                await conn.wait_uncongested(len(data))
            if not conn.fits(len(data)):
                await conn.send_all(data)
                return
            self._put(data)
        if self._sends % _SENDS_PER_TURN == 0:
            # Not to be cancelled: the message is on its way.
            await trio.lowlevel.cancel_shielded_checkpoint()

    def send_nowait(self, message: T) -> bool:
        """Send *message* without waiting. False: the connection is congested, so rather wait, with
        `send` or `TcpConnection.wait_uncongested`. Errors as `send`, and `SendBufferFull`.
        """
        return self._put(self._codec.encode(message))

    def _put(self, data: bytes) -> bool:
        conn = self.conn
        if self._messages:
            # Whoever handles messages has more of them here, and will send more.
            conn.cork()
            self._corked = True
            return conn.send(data)
        if not self._corked:
            conn.gather()
            return conn.send(data)
        # The last answer takes the others along.
        self._corked = False
        conn.send(data)
        conn.uncork()
        return not conn.congested

    def flush(self) -> None:
        """Hand what was gathered to the kernel now."""
        self.conn.uncork()

    def detach(self) -> tuple[trio.SocketStream, bytes]:
        """Hand the socket back, with what was read from it and not decoded, for a protocol that
        begins another.

        Raises `trio.BusyResourceError` if messages have come that nobody has received, and what
        `TcpConnection.detach` raises. The connection is closed after this, the stream is yours.
        """
        if self._more and not self._messages:
            self._decode()
        if self._messages:
            raise trio.BusyResourceError("messages have come that were not received")
        unread = self._buffer.take()
        try:
            stream, rest = self.conn.detach()
        except BaseException:
            self._buffer.append(unread)
            raise
        return stream, unread + rest

    async def start_tls(
        self, ssl_context: ssl.SSLContext, *, server_side: bool, **options: Unpack[TlsOptions]
    ) -> None:
        """`TcpConnection.start_tls`, for whose messages follow each other in the open and in TLS.

        `ProtocolError`, and the end of the connection, if more has come in the open than was
        received: it must not pass for what comes in TLS.
        """
        unread = self._buffer.take()
        if self._messages or unread:
            self.conn.force_close(CloseReason.PROTOCOL_ERROR)
            raise ProtocolError("messages came in the open, in front of TLS")
        self.conn.uncork()
        await self.conn.start_tls(ssl_context, server_side=server_side, **options)

    async def aclose(self) -> None:
        """Send what is on its way, then close the connection: see `TcpConnection.aclose`."""
        self.conn.uncork()
        self._forget()
        await self.conn.aclose()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """As `aclose`; the reason is that of `TcpConnection.__aexit__`."""
        self.conn.uncork()
        self._forget()
        await self.conn.__aexit__(kind, error, traceback)  # noqa: ASYNC102 bounded by linger


async def dispatch_messages(
    conn: TcpConnection,
    codec: Codec[T],
    on_message: Callable[[TcpConnection, T], object],
    *,
    heartbeat: Heartbeat[T],
) -> None:
    """Callback mode with a heartbeat: ``on_message(conn, message)`` for each that is not its own.

    Else as ``await conn.dispatch(codec.on_message(on_message))``.
    """
    check_codec("dispatch_messages", codec)
    check_heartbeat("dispatch_messages", heartbeat)
    check_callback("dispatch_messages", "on_message", on_message)
    watch = HeartbeatWatch(conn, heartbeat, lambda message: conn.send(codec.encode(message)))

    def deliver(conn: TcpConnection, message: T) -> None:
        if not watch.takes(message):
            on_message(conn, message)

    try:
        await conn.dispatch(codec.on_message(deliver))
    finally:
        watch.stop()
