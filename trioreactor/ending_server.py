"""The end of a server whose process is to end: in peace, and with nobody overlooked."""

from __future__ import annotations

import logging
from dataclasses import replace

import trio

from trioreactor.server_statistics import DrainReport
from trioreactor.state import ConnectionState
from trioreactor.tcp_connection import TcpConnection
from trioreactor.tcp_server import TcpServer

logger = logging.getLogger("trioreactor.server")

# How long a client that has just connected is given to say its first word, seconds: it has not seen
# that the server is leaving, and its question is on the way. Several round trips around the world.
_FIRST_WORD = 1.0

# How often it is looked whether all have.
_LOOK = 0.02


async def end_gracefully(
    server: TcpServer, grace: float, *, take_waiting: bool = True
) -> DrainReport:
    """Stop listening, let newcomers say their first word, and drain, in *grace* seconds in all.

    A drain tells handlers that they may end where they are between two messages. To a client whose
    connection was accepted in the same moment that would be an end before its first question, so
    those that have said nothing are given up to a second of the grace before it begins.
    """
    begun = trio.current_time()
    server.stop_listening(take_waiting=take_waiting)
    silent = list(server.connections.values())
    with trio.move_on_after(min(grace, _FIRST_WORD)):
        while silent := [conn for conn in silent if _is_silent(conn)]:  # noqa: ASYNC110 an event for each first byte would cost more
            await trio.sleep(_LOOK)
    spent = trio.current_time() - begun
    report = await server.drain(max(0.0, grace - spent))
    report = replace(report, seconds=trio.current_time() - begun)
    log_report(server, report)
    return report


def _is_silent(conn: TcpConnection) -> bool:
    opening = conn.state is ConnectionState.CONNECTING
    return conn.close_reason is None and (opening or not conn.statistics().bytes_received)


def log_report(server: TcpServer, report: DrainReport) -> None:
    """Say how it went, as loudly as it deserves."""
    logger.info(
        "%s: drained in %.2f s: %d connections ended, %d were closed by force",
        server.name,
        report.seconds,
        report.finished,
        len(report.forced),
    )
    if report.stuck:
        logger.error(
            "%s: handlers that do not end though they are cancelled: %s",
            server.name,
            ", ".join(report.stuck),
        )
