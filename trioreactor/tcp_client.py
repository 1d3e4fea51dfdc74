"""TcpClient: one connection at a time, made again whenever it is lost."""

from __future__ import annotations

import logging
import ssl
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import TracebackType
from typing import Self, Unpack

import trio

from trioreactor.client_session import ClientSession, end_session
from trioreactor.client_statistics import ClientStatistics
from trioreactor.client_waiters import ClientWaiters
from trioreactor.connect_options import RetryOptions, check_known, check_on_attempt
from trioreactor.connecting import ConnectionMaker, client_tls, numbered
from trioreactor.connection_callbacks import Handler
from trioreactor.connection_counters import ConnectionCounters
from trioreactor.connector import Connector, Made, discard
from trioreactor.endpoints import ConnectAttempt
from trioreactor.errors import ConnectError, NotConnected
from trioreactor.exception_groups import unwrapped
from trioreactor.options import Timeouts, Watermarks, check_count, check_kinds
from trioreactor.proxy_protocol import HeaderToSend, checked_header_to_send
from trioreactor.state import CloseReason, ConnectionState
from trioreactor.tcp_connection import TcpConnection

logger = logging.getLogger("trioreactor.client")


class TcpClient:
    """Stays connected: makes a connection, and another one after the backoff when it is lost.

    Where to and how to retry is said as for `Connector`, whose options these are: *host* and
    *port*, or ``path=...``, or ``endpoints=[...]``. With ``retry=False`` it makes one connection.

    Three ways to use it, one at a time:

    - ``await client.run(handler)`` runs *handler* for each connection, in turn.
    - ``async with client:`` does so in the background; without a handler the block uses
      `connection`, `wait_connected`, `send` and `send_all`.
    - ``async for conn in client:`` gives each connection in turn; use it in `session`.

    With an *ssl_context* it has TLS, as of `TcpConnection.start_tls`, for *server_hostname* or the
    endpoint's host. A handshake that fails is a failed attempt; a wrong certificate, the last one.
    With *proxy_protocol* each connection begins with a PROXY header: 1 or 2 for our own addresses
    in that version, a `ProxyHeader`, or a function from the connection to one.
    A client belongs to one trio run.
    """

    def __init__(
        self,
        host: str | None = None,
        port: int | None = None,
        handler: Handler | None = None,
        *,
        name: str = "client",
        watermarks: Watermarks = Watermarks(),
        timeouts: Timeouts = Timeouts(),
        proxy_protocol: HeaderToSend | None = None,
        ssl_context: ssl.SSLContext | None = None,
        server_hostname: str | None = None,
        https_compatible: bool = False,
        **options: Unpack[RetryOptions],
    ) -> None:
        if handler is not None and not callable(handler):
            raise TypeError(f"TcpClient: handler={handler!r}: pass an async function or Callbacks")
        self.name = name
        self._handler = handler
        self._timeouts = timeouts
        check_known("TcpClient", options, RetryOptions)
        check_kinds("TcpClient", watermarks=watermarks, timeouts=timeouts)
        self._on_attempt = options.get("on_attempt")
        check_on_attempt(self._on_attempt)
        self._connector = Connector(
            host, port, name=name, **(options | {"on_attempt": self._attempted})
        )
        self._maker = ConnectionMaker(
            self._connector,
            tls=client_tls("TcpClient", ssl_context, server_hostname, https_compatible),
            name_for=numbered(name),
            header=checked_header_to_send("TcpClient", proxy_protocol),
            watermarks=watermarks,
            timeouts=timeouts,
        )
        # The one that lives, or has ended and is not counted yet.
        self._connection: TcpConnection | None = None
        self._connecting: trio.CancelScope | None = None  # what `disconnect` cancels
        self._running = False  # a run, or the block, is under way
        # It is to have a connection. Not before it begins, for `disconnect` is for what goes on.
        self._wanted = True
        self._stopped = False
        self._over = False  # no connection will come any more
        self._made_one = False  # since it began
        self._connected_at = 0.0  # when the connection was made
        self._waiters = ClientWaiters()
        self._counters = ConnectionCounters()
        self._block: AbstractAsyncContextManager[None] | None = None

    def __repr__(self) -> str:
        return f"<TcpClient {self.name} {self.connection or self._connector.state.value}>"

    # -- how it is

    @property
    def connection(self) -> TcpConnection | None:
        """The connection of this moment, or None."""
        conn = self._connection
        return None if conn is None or conn.state is ConnectionState.DISCONNECTED else conn

    @property
    def retry(self) -> bool:
        """Whether a connection that is lost, or cannot be made, is followed by another attempt.

        May be set at any time: turned off, the connection there is stays, and is the last one.
        While it waits for the next attempt, that ends it with `ConnectError`.
        """
        return self._connector.retry

    @retry.setter
    def retry(self, retry: bool) -> None:
        self._connector.retry = retry

    def reset_backoff(self) -> None:
        """Begin the delays anew, and end the one that is being waited for: see `Connector`."""
        self._connector.reset_backoff()

    def statistics(self) -> ClientStatistics:
        """The counters as they are now."""
        connector = self._connector.statistics()
        living = [] if self._connection is None else [self._connection]
        return ClientStatistics(
            attempts=connector.attempts,
            failures=connector.failures,
            **self._counters.totals(living).as_fields(),
        )

    async def wait_connected(self, max_failures: int | None = None) -> TcpConnection:
        """Wait until there is a connection whose peer has not closed it, and give it.

        In a block without a handler that has read nothing from a connection whose peer has closed
        it, that one is given up. Raises `ConnectError` when *max_failures* attempts have failed
        since this call, though the client goes on; `trio.ClosedResourceError` when it has ended.
        Any number of tasks may wait.
        """
        check_count("wait_connected", "max_failures", max_failures, least=1, unit="failures")
        await trio.lowlevel.checkpoint()
        before = self._waiters.failed
        while True:
            conn = self._connection
            if conn is not None and conn.state is ConnectionState.CONNECTED:
                if not conn.peer_closed:
                    return conn
                unread = not conn.statistics().bytes_received
                if self._block is not None and self._handler is None and unread:
                    # That may hide its end, and nobody will see to it.
                    end_session(conn)
            if self._over or self._stopped:
                # If it ended by an error, the nursery that this is in may be about to cancel us:
                # then that error is the one to be heard of.
                await trio.lowlevel.checkpoint()
                raise self._not_connected()
            if max_failures is not None and self._waiters.failed - before >= max_failures:
                raise self._waiters.error(self.name, max_failures)
            await self._waiters.wait()

    # -- sending, on whatever connection there is

    def send(self, data: bytes | bytearray | memoryview) -> bool:
        """`TcpConnection.send` on the connection of this moment.

        Raises `NotConnected`, a `trio.BrokenResourceError`, while there is none, and
        `trio.ClosedResourceError` when none will come.
        """
        return self._current().send(data)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """`TcpConnection.send_all` on the connection of this moment; errors as `send`.

        A connection that is lost loses what it had not sent; none of it goes to the next one.
        """
        await self._current().send_all(data)

    def _current(self) -> TcpConnection:
        conn = self.connection
        if conn is None:
            raise self._not_connected()
        return conn

    def _not_connected(self) -> Exception:
        reason = self._waiters.reason
        if self._over or self._stopped or not self._wanted:
            return trio.ClosedResourceError(f"{self.name}: this client has ended{reason}")
        return NotConnected(f"{self.name}: no connection at the moment{reason}")

    # -- the ways to use it

    async def run(self, handler: Handler | None = None) -> None:
        """Run *handler* (None: the client's own) for each connection, one after the other.

        When the handler returns, its connection is closed gracefully and the next is made; so to
        end from inside call `disconnect` or `stop`. That a peer has gone or broke the protocol
        is logged, and no error. Whatever else the handler raises closes the connection and leaves.

        Returns after `disconnect` or `stop`, or when `retry` is off and the connection has ended.
        Raises `ConnectError` when no attempt is left. Cancelled, it closes the connection at once.
        """
        if handler is None:
            handler = self._handler
        if not callable(handler):
            raise TypeError(f"TcpClient: handler={handler!r}: pass an async function or Callbacks")
        self._begin()
        self._running = True
        await self._run(handler)

    async def _run(self, handler: Handler) -> None:
        try:
            while (conn := await self._next()) is not None:
                async with self.session(conn):
                    await handler(conn)
        finally:
            self._running = False
            if self._connection is not None:
                # Ctrl-C came between its making and its session.
                self._forget(self._connection)
            self._end()

    async def __aenter__(self) -> Self:
        """Connect, and run the handler if there is one, in the background until the block ends.

        At the block's normal end the connection is closed as by `disconnect`; without a handler,
        as by `TcpConnection.aclose`. An error in the block, or a cancellation, closes it at once.
        What `run` would raise cancels the block and leaves it.
        """
        self._begin()
        self._running = True
        self._block = self._in_background()
        await self._block.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        assert self._block is not None
        try:
            return await self._block.__aexit__(kind, error, traceback)  # noqa: ASYNC102 bounded by linger
        finally:
            self._block = None

    @asynccontextmanager
    async def _in_background(self) -> AsyncGenerator[None]:
        with unwrapped():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._run, self._handler or TcpConnection.wait_eof)
                yield
                conn = self._connection
                self.disconnect()
                if self._handler is None and conn is not None:
                    # Nobody is left to read an answer.
                    end_session(conn)

    def __aiter__(self) -> Self:
        """Give each connection in turn, and close it when the next is asked for.

        What the body raises leaves the loop, with the connection open: so use `session` in it.
        """
        self._begin()
        return self

    async def __anext__(self) -> TcpConnection:
        """The next connection; the end as for `run`."""
        conn = await self._next()
        if conn is None:
            raise StopAsyncIteration
        return conn

    def session(self, conn: TcpConnection) -> ClientSession:
        """The time of one connection: ``async with client.session(conn):`` closes it at the end.

        Gracefully after the block's normal end; at once if it raises or is cancelled. That the
        peer has gone or broke the protocol does not leave the block: the loop around it goes on to
        the next connection. `force_close` cancels the block.
        """
        return ClientSession(conn, self._forget)

    # -- the end

    def disconnect(self) -> None:
        """End gracefully: no further attempt, and the connection is closed once it has sent what
        is queued. From anywhere in the loop. Idempotent. The client may be run again.

        The handler hears of it by ``conn.draining``, and the peer by our EOF; both then have
        `Timeouts.linger` seconds, after which the handler is cancelled.
        """
        self._wanted = False
        if self._connecting is not None:
            self._connecting.cancel()
        conn = self.connection
        if self._made_one and not self._running and self._connecting is None:
            # A loop that was left: nobody else will tell those who wait.
            self._end()
        if conn is None:
            return
        conn.start_draining()
        conn.shutdown()
        scope, linger = conn.handler_scope, self._timeouts.linger
        if scope is not None and linger is not None:
            scope.deadline = min(scope.deadline, trio.current_time() + linger)

    def stop(self) -> None:
        """End at once: no further attempt, and the connection is force-closed, which cancels its
        handler. From anywhere in the loop. Idempotent, and final: a later `run` ends at once, too.
        """
        self._stopped = True
        self._connector.stop()
        if self._connection is not None:
            self._connection.force_close()
        self._waiters.changed()

    # -- making connections

    def _begin(self) -> None:
        if self._running or self._block is not None:
            raise trio.BusyResourceError(f"{self.name}: this client is in use already")
        if not self._wanted:
            # Our own end was no loss, which would ask for a pause.
            self._connector.forget()
        self._wanted = True
        self._over = self._made_one = False

    def _end(self) -> None:
        self._over = True
        self._waiters.changed()

    async def _next(self) -> TcpConnection | None:
        """The next connection, or None at the end."""
        try:
            if self._connection is not None:
                await self._leave(self._connection)
            while (made := await self._connect()) is not None:
                try:
                    return self._enter(made)
                except OSError as error:
                    # What a connection needs beside its socket is short, and that can pass.
                    if not self.retry:
                        raise
                    logger.warning("%s: connected, and lost at once: %s", self.name, error)
        except BaseException:
            self._end()
            raise
        self._end()
        return None

    async def _connect(self) -> Made | None:
        await trio.lowlevel.checkpoint()
        if not self._wanted or self._stopped or (self._made_one and not self.retry):
            return None
        made: Made | None = None
        try:
            with trio.CancelScope() as self._connecting:
                made = await self._maker.connect()
        except ConnectError:
            if self._wanted:
                raise
            # Disconnected in the very turn in which the last attempt failed.
            return None
        except trio.ClosedResourceError:
            if not self._stopped:
                # Not the connector's: what the user's on_attempt raised.
                raise
            return None
        finally:
            self._connecting = None
        if made is not None and not self._wanted:
            # Disconnected in the very turn that connected it.
            discard(made)
            return None
        return made

    @trio.lowlevel.enable_ki_protection
    def _enter(self, made: Made) -> TcpConnection:
        conn = self._maker.connection(made)
        conn.handler_scope = trio.CancelScope()
        self._counters.opened += 1
        self._connected_at = trio.current_time()
        self._made_one = True
        self._connection = conn
        self._waiters.connected()
        return conn

    async def _leave(self, conn: TcpConnection) -> None:
        """End a connection whose user did not."""
        try:
            await conn.aclose()
        finally:
            self._forget(conn)

    @trio.lowlevel.enable_ki_protection
    def _forget(self, conn: TcpConnection) -> None:
        conn.force_close(CloseReason.CANCELLED)
        # It refers to the task, and the task's frames to the connection.
        conn.handler_scope = None
        if conn is self._connection:
            self._connection = None
            self._maker.ended(conn)
            self._counters.count_end(conn)
            assert conn.close_reason is not None
            lived = trio.current_time() - self._connected_at
            logger.info("%s: ended after %.1f s (%s)", conn.name, lived, conn.close_reason.value)

    def _attempted(self, attempt: ConnectAttempt) -> None:
        if attempt.error is not None:
            self._waiters.attempt_failed(attempt)
        if self._on_attempt is not None:
            self._on_attempt(attempt)
