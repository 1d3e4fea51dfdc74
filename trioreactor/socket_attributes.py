"""SocketAttributes: what a connection shows of its socket."""

from __future__ import annotations

import socket as stdlib_socket
from typing import TYPE_CHECKING

from trioreactor.sockets import ConnectedSocket, TcpInfo, read_tcp_info, stream_around
from trioreactor.state import ConnectionState

if TYPE_CHECKING:
    import trio

    from trioreactor.address import SocketAddress
    from trioreactor.lifecycle import Lifecycle


class SocketAttributes:
    """A connection's socket, as `trio.SocketStream` has it, and what the kernel knows of it."""

    __slots__ = ()

    _life: Lifecycle
    _sock: ConnectedSocket
    local_address: SocketAddress

    @property
    def stream(self) -> trio.SocketStream:
        """The stream underneath, for looking only: use `detach` to take it over."""
        if self._life.stream is None:
            sock = self._open_socket()
            assert isinstance(sock, stdlib_socket.socket)
            self._life.stream = stream_around(sock)
        return self._life.stream

    @property
    def socket(self) -> trio.socket.SocketType:
        """The trio socket, for handlers written for `trio.SocketStream`."""
        return self.stream.socket

    def set_no_delay(self, no_delay: bool) -> None:
        """Set TCP_NODELAY; nothing on a Unix socket."""
        # A Unix socket's address is a path.
        if isinstance(self.local_address, tuple):
            self.setsockopt(stdlib_socket.IPPROTO_TCP, stdlib_socket.TCP_NODELAY, no_delay)

    def setsockopt(self, level: int, option: int, value: int | bytes) -> None:
        """Set a socket option, as `trio.SocketStream.setsockopt`."""
        self._open_socket().setsockopt(level, option, value)

    def getsockopt(self, level: int, option: int, buffersize: int = 0) -> int | bytes:
        """Read a socket option, as `trio.SocketStream.getsockopt`."""
        if not buffersize:
            return self._open_socket().getsockopt(level, option)
        return self._open_socket().getsockopt(level, option, buffersize)

    def _open_socket(self) -> ConnectedSocket:
        if self._life.state is ConnectionState.DISCONNECTED:
            raise self._life.ending.error()
        return self._sock

    def tcp_info(self) -> TcpInfo | None:
        """What the kernel knows of this connection; None off Linux and on Unix sockets."""
        return read_tcp_info(self._sock)
