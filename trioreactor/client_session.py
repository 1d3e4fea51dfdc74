"""ClientSession: the time of one of a client's connections, and what its end means."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import TracebackType

import trio

from trioreactor.handler_errors import end_after, is_peers_doing
from trioreactor.state import CloseReason
from trioreactor.tcp_connection import TcpConnection

logger = logging.getLogger("trioreactor.client")


class ClientSession:
    """A context manager: see `TcpClient.session`.

    A class and not a generator, whose machinery keeps the block's error in a circle of frames, and
    with it the connection.
    """

    __slots__ = ("_conn", "_forget", "_scope")

    def __init__(self, conn: TcpConnection, forget: Callable[[TcpConnection], None]) -> None:
        self._conn = conn
        # Called with the connection at the end, whatever that is.
        self._forget = forget
        # The connection may have been ended since the client gave it, and its scope cancelled.
        self._scope = conn.handler_scope or trio.CancelScope()

    @trio.lowlevel.enable_ki_protection
    async def __aenter__(self) -> TcpConnection:  # noqa: ASYNC910 there is nothing to wait for
        self._conn.handler_scope = self._scope
        self._scope.__enter__()
        return self._conn

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        try:
            # Swallows the cancellation that came from `force_close`, or the end of a linger.
            if self._scope.__exit__(kind, error, traceback) or error is None:
                await self._conn.aclose()  # noqa: ASYNC102 bounded by linger
                return True
            if isinstance(error, Exception):
                return await self._ends_by(error)  # noqa: ASYNC102 bounded by linger
            return False  # noqa: ASYNC910 a cancellation, or worse
        finally:
            self._forget(self._conn)
            # What is left would be a circle: this frame, or the connection, and the error whose
            # traceback has it.
            self._conn.handler_error = None
            del kind, error, traceback

    async def _ends_by(self, error: Exception) -> bool:
        """The block raised *error*. Whether that ends its connection only."""
        conn = self._conn
        if not is_peers_doing(conn, error):
            conn.force_close(CloseReason.HANDLER_ERROR)
            return False  # noqa: ASYNC910 the block has ended by an error
        await end_after(conn, error, logger)
        return True  # noqa: ASYNC910 as above


def end_session(conn: TcpConnection) -> None:
    """Have the session of *conn* end, gracefully."""
    if conn.handler_scope is not None:
        conn.handler_scope.cancel()
