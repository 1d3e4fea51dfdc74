"""Broadcaster: one message to many connections of a loop, none of which waits for another."""

from __future__ import annotations

from collections.abc import Callable, Collection

import trio

from trioreactor.handler_errors import close_and_log
from trioreactor.overflow import Overflow, check_overflow
from trioreactor.send_buffer import Droppable
from trioreactor.state import ConnectionState
from trioreactor.tcp_connection import TcpConnection


class Broadcaster:
    """Sends as its *overflow* says, and tells *on_drop*. It has no state: every loop may use it."""

    def __init__(
        self,
        owner: str,
        overflow: Overflow,
        on_drop: Callable[[TcpConnection, int], object] | None,
    ) -> None:
        check_overflow(owner, overflow)
        if on_drop is not None and not callable(on_drop):
            raise TypeError(f"{owner}(on_drop={on_drop!r}): pass a function")
        self._overflow: Overflow = overflow
        self._on_drop = on_drop

    def message(self, data: bytes | bytearray | memoryview) -> bytes:
        """*data* as one object for all of them."""
        # What is never dropped may be gathered with what else waits.
        return bytes(memoryview(data)) if self._overflow == "close" else Droppable(data)

    def send(self, message: bytes, conns: Collection[TcpConnection]) -> int:
        """Send to each of *conns* without waiting for any; how many took it."""
        if not message:
            return sum(conn.state is ConnectionState.CONNECTED for conn in conns)
        behind: list[TcpConnection] = []
        sent = 0
        for conn in conns:
            try:
                took = conn.send_if_idle(message)
            except trio.BrokenResourceError:
                continue
            if took:
                sent += 1
            elif took is None:
                behind.append(conn)
        # They come last, so that queueing and closing delays none of the others.
        return sent + sum(self._offer(conn, message) for conn in behind)

    def _offer(self, conn: TcpConnection, message: bytes) -> bool:
        """Send without waiting. False if the connection did not take it."""
        if conn.state is not ConnectionState.CONNECTED:
            return False
        try:
            if self._overflow == "close":
                conn.send(message)
                return True
            refused = conn.refused
            dropped = conn.offer(message, self._overflow)
        except (trio.BrokenResourceError, trio.BusyResourceError):
            return False
        if dropped and self._on_drop is not None:
            try:
                self._on_drop(conn, dropped)
            except Exception as error:
                close_and_log(conn, error)
        return conn.refused == refused
