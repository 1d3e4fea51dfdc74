"""The inspector: writes every connection and every task of this process to the log."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from types import FrameType

import trio

from trioreactor.address import format_address
from trioreactor.connection_statistics import ConnectionStatistics
from trioreactor.event_loop import EventLoop
from trioreactor.server_loops import LoopPool
from trioreactor.server_statistics import ServerStatistics
from trioreactor.tcp_connection import TcpConnection
from trioreactor.tcp_server import TcpServer

logger = logging.getLogger("trioreactor.inspector")

# Lines that are written before the other tasks have their turn: some milliseconds' worth.
_LINES_PER_TURN = 50

# Frames of a task that are shown, innermost first: where it waits, and for whom.
_FRAMES = 8


async def log_everything(servers: Sequence[TcpServer]) -> None:
    """Write to ``trioreactor.inspector`` (INFO) a line for each server, for each of its
    connections, and for each task of this trio run, and of the servers' other loops, with what it
    waits in.

    Others have their turn meanwhile; what ends before its line is written is left out.
    """
    here = EventLoop.current()
    for server in servers:
        logger.info("server %s: %s", repr(server), describe_statistics(server.statistics()))
    conns = [conn for server in servers for conn in server.connections.values()]
    await _log_loop([conn for conn in conns if conn.loop is here])
    pools = {server.loops for server in servers if server.loops is not None}
    for pool in pools:
        # An error here would be their end who asked: a pool may have ended, or end meanwhile.
        for loop in _loops_of(pool):
            with suppress(trio.RunFinishedError):
                await pool.run(loop, _log_loop, [conn for conn in conns if conn.loop is loop])
    await trio.lowlevel.checkpoint()


def _loops_of(pool: LoopPool) -> Sequence[EventLoop]:
    try:
        return pool.loops
    except RuntimeError:
        return ()


async def _log_loop(conns: Sequence[TcpConnection]) -> None:
    """What lives in the loop that this runs in."""
    lines = _lines(conns)
    while some := list(islice(lines, _LINES_PER_TURN)):
        for line in some:
            logger.info("%s", line)
        await trio.lowlevel.checkpoint()
    await trio.lowlevel.checkpoint()


def _lines(conns: Sequence[TcpConnection]) -> Iterator[str]:
    for conn in conns:
        if conn.close_reason is None:
            yield f"connection {describe_connection(conn)}"
    root = trio.lowlevel.current_root_task()
    if root is not None:
        yield from _tasks(root, 0)


def describe_connection(conn: TcpConnection) -> str:
    """What there is to know of a connection, in a line. Called in its loop."""
    counted = conn.statistics()
    parts = [
        f"{conn.name} from {format_address(conn.peer_address)}",
        conn.state.name,
        _bytes(counted),
    ]
    if not conn.reading:
        parts.append("reading is stopped")
    if conn.draining.is_set():
        parts.append("draining")
    return "; ".join(parts)


def describe_statistics(statistics: ServerStatistics) -> str:
    """A server's counters, in a line; those that are 0 only where that says something."""
    closed = ", ".join(f"{number} {why.value}" for why, number in statistics.closed.items())
    parts = [
        f"{statistics.opened} opened, {statistics.active} active",
        f"closed: {closed or 'none'}",
        _bytes(statistics),
    ]
    for limit, number in statistics.rejected.items():
        parts.append(f"{number} rejected by {limit}")
    for name in ("shed", "pauses", "resumes", "dropped"):
        if number := getattr(statistics, name):
            parts.append(f"{number} {name}")
    if statistics.loop_lag is not None:
        parts.append(f"the loop was away for {statistics.loop_lag * 1000:.0f} ms at the most")
    return "; ".join(parts)


def _bytes(counted: ConnectionStatistics | ServerStatistics) -> str:
    received, sent, queued = counted.bytes_received, counted.bytes_sent, counted.buffered
    return f"{received} bytes received, {sent} sent, {queued} queued"


def _tasks(task: trio.lowlevel.Task, depth: int) -> Iterator[str]:
    """A line for *task* and each below it, by the tree of nurseries."""
    yield f"task {'. ' * depth}{task.name}: {_where(task)}"
    for nursery in list(task.child_nurseries):
        for child in sorted(nursery.child_tasks, key=lambda child: child.name):
            yield from _tasks(child, depth + 1)


def _where(task: trio.lowlevel.Task) -> str:
    """The functions that it is in, innermost first; of trio's own only if there are no others."""
    frames = list(task.iter_await_frames())
    telling = [each for each in frames if not _is_trios(each[0])] or frames[:1]
    shown = [
        f"{frame.f_code.co_name} ({os.path.basename(frame.f_code.co_filename)}:{line})"
        for frame, line in reversed(telling[-_FRAMES:])
    ]
    return " < ".join(shown) or "not begun, or running"


def _is_trios(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] == "trio"
