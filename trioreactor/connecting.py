"""How a connected stream becomes a connection, with TLS or without."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from itertools import count
from typing import Unpack

import trio

from trioreactor.address import format_address
from trioreactor.connect_options import ConnectOptions, check_known
from trioreactor.connector import Connector, Made
from trioreactor.endpoints import Endpoint
from trioreactor.errors import ConnectError
from trioreactor.options import Timeouts, Watermarks, check_kinds
from trioreactor.proxy_protocol import HeaderToSend, checked_header_to_send, introduce
from trioreactor.sockets import peer_of
from trioreactor.state import CloseReason, ConnectionState
from trioreactor.tcp_connection import TcpConnection


def connection_on(
    stream: trio.SocketStream,
    *,
    name: str | None,
    watermarks: Watermarks,
    timeouts: Timeouts,
    state: ConnectionState = ConnectionState.CONNECTED,
    header: HeaderToSend | None = None,
) -> TcpConnection:
    """A connection on *stream*, begun with *header*. The stream is closed if there can be none."""
    try:
        conn = TcpConnection(
            stream, name=name, watermarks=watermarks, timeouts=timeouts, state=state
        )
    except BaseException:
        # No descriptor for an epoll object, or no room in it (EMFILE, ENOSPC, ENOMEM).
        stream.socket.close()
        raise
    introduce(conn, header)
    return conn


class ClientTls:
    """A client's options for TLS, and the sessions that it may resume."""

    def __init__(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None, https_compatible: bool
    ) -> None:
        self._context = ssl_context
        self._server_hostname = server_hostname
        self._https_compatible = https_compatible
        # Of each endpoint, the last one.
        self._sessions: dict[Endpoint, ssl.SSLSession] = {}
        # Of the connection that was opened last.
        self._endpoint: Endpoint | None = None

    async def open(self, conn: TcpConnection, endpoint: Endpoint) -> None:
        """Bring *conn* from CONNECTING to CONNECTED, or raise as `TcpConnection.start_tls`."""
        host = endpoint[0] if isinstance(endpoint, tuple) else None
        await conn.start_tls(
            self._context,
            server_side=False,
            server_hostname=self._server_hostname or host,
            https_compatible=self._https_compatible,
            # If the handshake fails, that may be the session's fault.
            session=self._sessions.pop(endpoint, None),
        )
        conn.opened()
        self._endpoint = endpoint

    def remember(self, conn: TcpConnection) -> None:
        """*conn*, the last one, has ended: keep its session, which TLS 1.3 sends after a while."""
        session = conn.tls.session if conn.tls is not None else None
        if session is not None and self._endpoint is not None:
            self._sessions[self._endpoint] = session


def client_tls(
    owner: str,
    ssl_context: ssl.SSLContext | None,
    server_hostname: str | None,
    https_compatible: bool,
) -> ClientTls | None:
    """The options for TLS as one object, once they are checked; None for none."""
    if ssl_context is None:
        if server_hostname is not None or https_compatible:
            raise TypeError(f"{owner}: server_hostname and https_compatible want an ssl_context")
        return None
    if not isinstance(ssl_context, ssl.SSLContext):
        raise TypeError(f"{owner}(ssl_context={ssl_context!r}): pass an ssl.SSLContext")
    return ClientTls(ssl_context, server_hostname, https_compatible)


def numbered(name: str) -> Callable[[trio.SocketStream], str]:
    """Names for connections: where to, and which one it is."""
    serial = count(1)
    return lambda stream: f"{name}-{format_address(peer_of(stream.socket))}#{next(serial)}"


class ConnectionMaker:
    """Makes a client's connections, one after the other: by *connector*, with *tls* if that is
    given, with names of *name_for*. Each begins with *header*, before TLS.
    """

    def __init__(
        self,
        connector: Connector,
        *,
        tls: ClientTls | None,
        name_for: Callable[[trio.SocketStream], str | None],
        header: HeaderToSend | None,
        watermarks: Watermarks,
        timeouts: Timeouts,
    ) -> None:
        self._connector = connector
        self._tls = tls
        self._name_for = name_for
        self._header: HeaderToSend | None = header
        self._watermarks = watermarks
        self._timeouts = timeouts

    async def connect(self) -> Made:
        """Connect, for `connection`. TLS is a part of each attempt. Errors as `Connector`'s."""
        if self._tls is None:
            return await self._connector.connect()
        return await self._connector.establish(self._with_tls)

    async def _with_tls(self, stream: trio.SocketStream, endpoint: Endpoint) -> TcpConnection:
        assert self._tls is not None
        conn = self._make(stream, ConnectionState.CONNECTING)
        try:
            await self._tls.open(conn, endpoint)
        except BaseException:
            conn.force_close(CloseReason.CANCELLED)
            raise
        return conn

    def connection(self, made: Made) -> TcpConnection:
        """The connection on what `connect` has given, which is closed if there can be none."""
        return made if isinstance(made, TcpConnection) else self._make(made)

    def _make(
        self, stream: trio.SocketStream, state: ConnectionState = ConnectionState.CONNECTED
    ) -> TcpConnection:
        return connection_on(
            stream,
            name=self._name_for(stream),
            watermarks=self._watermarks,
            timeouts=self._timeouts,
            state=state,
            header=self._header,
        )

    def ended(self, conn: TcpConnection) -> None:
        """*conn*, the last one, has ended."""
        if self._tls is not None:
            self._tls.remember(conn)


async def open_tcp_connection(
    host: str | None = None,
    port: int | None = None,
    *,
    name: str | None = None,
    watermarks: Watermarks = Watermarks(),
    timeouts: Timeouts = Timeouts(),
    ssl_context: ssl.SSLContext | None = None,
    server_hostname: str | None = None,
    https_compatible: bool = False,
    proxy_protocol: HeaderToSend | None = None,
    **options: Unpack[ConnectOptions],
) -> TcpConnection:
    """Connect once, with no retry, and give the connection.

    The options are those of `Connector`; of several endpoints each is tried once. With an
    *ssl_context* the connection has TLS, as of `TcpConnection.start_tls`: *server_hostname* is the
    endpoint's host unless given. *proxy_protocol* is what it sends first, as of `TcpClient`. Raises
    `ConnectError`, which is an `OSError`. Cancelled, it leaves no socket open.
    """
    check_known("open_tcp_connection", options, ConnectOptions)
    check_kinds("open_tcp_connection", watermarks=watermarks, timeouts=timeouts)
    maker = ConnectionMaker(
        Connector(host, port, name=name or "connection", retry=False, **options),
        tls=client_tls("open_tcp_connection", ssl_context, server_hostname, https_compatible),
        name_for=lambda _stream: name,
        header=checked_header_to_send("open_tcp_connection", proxy_protocol),
        watermarks=watermarks,
        timeouts=timeouts,
    )
    made = await maker.connect()
    try:
        return maker.connection(made)
    except OSError as error:
        lost = ConnectError(f"connected, and lost at once: {error}", ())
        lost.errno = error.errno
        raise lost from error
