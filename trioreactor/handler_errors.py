"""What an error that a handler raised means for its connection: one place for the decision."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import trio

from trioreactor.errors import ProtocolError
from trioreactor.state import CloseReason

if TYPE_CHECKING:
    from trioreactor.tcp_connection import TcpConnection

logger = logging.getLogger("trioreactor.server")


def reason_for(conn: TcpConnection, error: BaseException) -> CloseReason:
    """Why *conn* is to be closed after its handler raised *error*.

    The peer's going away counts only if it is this connection that broke: an error of another
    resource that the handler used is the handler's own.
    """
    if conn.broken and not _others(error, trio.BrokenResourceError):
        return conn.close_reason or CloseReason.PEER_RESET
    if conn.close_reason is not None and not _others(error, trio.ClosedResourceError):
        # Used after a close of ours, which is what ended it.
        return conn.close_reason
    if not _others(error, ProtocolError):
        return CloseReason.PROTOCOL_ERROR
    return CloseReason.HANDLER_ERROR


def close_and_log(conn: TcpConnection, error: BaseException) -> None:
    """Close *conn*, whose handler raised *error*, and log that once, as loudly as it deserves."""
    reason = reason_for(conn, error)
    conn.force_close(reason)
    if reason is CloseReason.HANDLER_ERROR:
        logger.error("%s: the handler raised", conn.name, exc_info=error)
    elif reason is CloseReason.PROTOCOL_ERROR:
        logger.warning("%s: %s", conn.name, error)
    else:
        logger.debug("%s: ended (%s): %r", conn.name, reason.value, error)


def _others(error: BaseException, kind: type[Exception]) -> bool:
    """Whether *error*, or anything in it if it is a group, is not of *kind*."""
    if isinstance(error, ExceptionGroup):
        return error.split(kind)[1] is not None
    return not isinstance(error, kind)
