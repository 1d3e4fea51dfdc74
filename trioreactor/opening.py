"""Opening: the handshakes between a connected socket and a connection that is its user's."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias

import trio

from trioreactor.errors import ProtocolError
from trioreactor.exception_groups import leaves
from trioreactor.state import CloseReason, ConnectionState
from trioreactor.tcp_connection import TcpConnection

logger = logging.getLogger("trioreactor.server")

Opening: TypeAlias = Callable[[TcpConnection], Awaitable[object]]
"""Brings a connection that is CONNECTING as far as that it may be opened, or raises."""


def in_order(steps: Sequence[Opening]) -> Opening | None:
    """One after the other; None for none."""
    if not steps:
        return None

    async def opening(conn: TcpConnection) -> None:  # noqa: ASYNC910 there is a step
        for step in steps:
            await step(conn)

    return opening


async def open_connection(  # noqa: ASYNC910 the opening has checkpoints
    conn: TcpConnection, opening: Opening
) -> None:
    """Run *opening*, in time, and open *conn*; or close it. Its state tells which.

    An error is logged: it is this connection's only. Cancelled, it closes the connection.
    """
    seconds = conn.timeouts.handshake
    deadline = trio.CancelScope()
    if seconds is not None:
        deadline.deadline = trio.current_time() + seconds
    scope = conn.handler_scope or trio.CancelScope()
    reason = CloseReason.CANCELLED
    try:
        with scope, deadline:
            await opening(conn)
            if conn.state is ConnectionState.CONNECTING:
                conn.opened()
                return
        reason = CloseReason.HANDSHAKE_FAILED
        if deadline.cancelled_caught:
            logger.warning("%s: the handshake was not done within %g s", conn.name, seconds)
    except Exception as error:
        reason = CloseReason.PEER_EOF if _said_nothing(conn) else CloseReason.HANDSHAKE_FAILED
        _tell(conn, error)
    finally:
        if conn.state is not ConnectionState.CONNECTED:
            conn.force_close(reason)


def _said_nothing(conn: TcpConnection) -> bool:
    """Whether the peer has only connected, and closed."""
    return conn.at_eof and not conn.statistics().bytes_received


def _tell(conn: TcpConnection, error: Exception) -> None:
    if conn.broken or conn.closing or _said_nothing(conn):
        # The peer went, or we closed it; or a port scan, or a health check that only connects.
        logger.debug("%s: ended while it was opened: %r", conn.name, error)
    elif all(isinstance(leaf, (ProtocolError, trio.BrokenResourceError)) for leaf in leaves(error)):
        logger.warning("%s: %s", conn.name, "; ".join(map(str, leaves(error))))
    else:
        logger.error("%s: the handshake raised", conn.name, exc_info=error)
