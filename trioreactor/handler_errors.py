"""What an error that a handler raised means for its connection: one place for the decision."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import trio

from trioreactor.errors import ProtocolError
from trioreactor.exception_groups import leaves
from trioreactor.state import CloseReason, ConnectionState

if TYPE_CHECKING:
    from trioreactor.tcp_connection import TcpConnection

logger = logging.getLogger("trioreactor.server")


def reason_for(conn: TcpConnection, error: BaseException) -> CloseReason:
    """Why *conn* is to be closed after its handler raised *error*."""
    if is_consequence(conn, error):
        if conn.close_reason is not None:
            return conn.close_reason
        if conn.broken:
            return CloseReason.PEER_RESET
        return CloseReason.PEER_EOF if conn.at_eof else CloseReason.LOCAL_CLOSE
    if not _others(error, ProtocolError):
        return CloseReason.PROTOCOL_ERROR
    return CloseReason.HANDLER_ERROR


async def end_after(  # noqa: ASYNC910 the handler has ended by an error
    conn: TcpConnection, error: Exception, logger: logging.Logger = logger
) -> None:
    """As `close_and_log`; but where *error* only says that there is no more to do, what is queued
    still goes, as after a handler that returned.
    """
    if not conn.broken and is_consequence(conn, error):
        await conn.aclose()
    close_and_log(conn, error, logger)


def close_and_log(
    conn: TcpConnection, error: BaseException, logger: logging.Logger = logger
) -> None:
    """Close *conn*, whose handler raised *error*, and log that once, as loudly as it deserves."""
    reason = reason_for(conn, error)
    if is_consequence(conn, error):
        logger.debug("%s: ended (%s): %r", conn.name, reason.value, error)
    elif reason is CloseReason.PROTOCOL_ERROR:
        logger.warning("%s: %s", conn.name, "; ".join(map(str, leaves(error))))
    else:
        logger.error("%s: the handler raised", conn.name, exc_info=error)
    # Told. It would be a circle: its traceback has the frames that have the connection.
    conn.handler_error = None
    # What it has sent before is not to depend on whether that was gathered.
    conn.uncork()
    conn.force_close(reason)


def is_peers_doing(conn: TcpConnection, error: BaseException) -> bool:
    """Whether *error* says no more than that the peer went, or broke the protocol."""
    return is_consequence(conn, error) or not _others(error, ProtocolError)


def is_consequence(conn: TcpConnection, error: BaseException) -> bool:
    """Whether *error* only says that the connection was at its end before.

    It counts only if it is this connection that broke or was closed: an error of another resource
    that the handler used is the handler's own.
    """
    if error is conn.handler_error:
        return False
    if conn.broken and not _others(error, trio.BrokenResourceError):
        return True
    # `draining` and no longer CONNECTED: it was not the handler who half-closed.
    half_closed = conn.state is ConnectionState.DISCONNECTING and conn.draining.is_set()
    ended = conn.close_reason is not None or conn.closing or half_closed
    if ended and not _others(error, trio.ClosedResourceError):
        return True
    # A channel on it has no more messages to give.
    nothing_more = ended or conn.at_eof or conn.draining.is_set()
    return nothing_more and not _others(error, trio.EndOfChannel)


def _others(error: BaseException, kind: type[Exception]) -> bool:
    """Whether *error*, or anything in it if it is a group, is not of *kind*."""
    if isinstance(error, ExceptionGroup):
        return error.split(kind)[1] is not None
    return not isinstance(error, kind)
