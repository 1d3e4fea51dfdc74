"""The few errors that trio has no word for.

For everything else trio's three words are used: `trio.ClosedResourceError` (we closed it),
`trio.BrokenResourceError` (the peer or the network did) and `trio.BusyResourceError` (two tasks
on one end).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import trio

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trioreactor.endpoints import ConnectAttempt


class TrioReactorError(Exception):
    """The base of every error that is trioreactor's own."""


class IllegalStateTransition(TrioReactorError, RuntimeError):
    """A connection was asked to make a move that the transition table does not have.

    Nothing has changed when this is raised. It is a bug in whoever asked.
    """


class ConnectError(TrioReactorError, OSError):
    """No connection could be made, and no further attempt follows.

    Its `__cause__` is the last attempt's error, and its `errno` is that one's if it has one (the
    resolver's are its own numbers, as those of `socket.gaierror`).
    """

    attempts: Sequence[ConnectAttempt]
    """The attempts that failed, oldest first: the last ones, if they were very many."""

    def __init__(self, text: str, attempts: Sequence[ConnectAttempt]) -> None:
        super().__init__(text)
        self.attempts = tuple(attempts)
        last = self.attempts[-1].error if attempts else None
        if isinstance(last, OSError):
            self.errno = last.errno
        self.__cause__ = last

    def __reduce__(self) -> tuple[Any, ...]:
        # OSError's own would make the copy from the text alone.
        return type(self), (*self.args, self.attempts)


class InheritedSocketError(TrioReactorError, OSError):
    """A descriptor that was handed over to listen on is no listening stream socket.

    It was left as it was, and so were the others that came with it.
    """

    descriptor: int | None
    """Which one is wrong; None if the list of them is."""

    def __init__(self, text: str, descriptor: int | None = None, errno: int | None = None) -> None:
        super().__init__(text)
        self.descriptor = descriptor
        self.errno = errno

    def __reduce__(self) -> tuple[Any, ...]:
        # OSError's own would make the copy from the text alone.
        return type(self), (*self.args, self.descriptor, self.errno)


class NotConnected(TrioReactorError, trio.BrokenResourceError):
    """A client that reconnects has no connection at the moment. Nothing was sent."""


class SendBufferFull(TrioReactorError, trio.BrokenResourceError):
    """`send` would have taken the send buffer over `Watermarks.limit`.

    The peer reads too slowly and the sender did not wait. The data was not queued, and the
    connection has been closed with `CloseReason.SLOW_CONSUMER`.
    """


class HandshakeFailed(TrioReactorError, trio.BrokenResourceError):
    """TLS could not be begun: the peer refused, was refused, went away, or took too long.

    The connection has been closed with `CloseReason.HANDSHAKE_FAILED`. The `__cause__` is an
    `OSError` that says why: an `ssl.SSLError`, for a certificate that is not to be trusted an
    `ssl.SSLCertVerificationError`; or a `TimeoutError`.
    """


class ProtocolError(TrioReactorError):
    """The peer sent what the protocol does not allow. Its connection ends, nothing else does."""


class FrameTooLarge(ProtocolError):
    """A message is longer than the codec's `max_frame`: found before anything was allocated."""


class IncompleteFrame(ProtocolError):
    """The peer's EOF came inside a message."""


class ProxyProtocolError(ProtocolError):
    """A connection did not begin with a PROXY protocol header that can be believed."""


class ReceiveBufferFull(ProtocolError):
    """`on_message` left `Watermarks.receive_limit` bytes unconsumed, so no more can be read.

    Raised out of `TcpConnection.dispatch`. A callback that wants to wait on purpose calls
    `stop_reading()`, and then this is not raised.
    """

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(size, limit)

    def __str__(self) -> str:
        size, limit = self.args
        return (
            f"on_message left {size} bytes unconsumed, and receive_limit is {limit}: raise "
            "Watermarks(receive_limit=...), or call stop_reading() to wait on purpose"
        )


class WorkerStartError(TrioReactorError):
    """A worker process did not get ready to serve: its text says why, in a line."""

    details: str
    """The traceback of an error of the program's own; else empty."""

    def __init__(self, reason: str, details: str = "") -> None:
        super().__init__(reason, details)
        self.details = details

    def __str__(self) -> str:
        return str(self.args[0])
