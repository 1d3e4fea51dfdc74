"""Callbacks: a handler made of functions, for code in muduo's style."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, fields

from trioreactor.codec import Codec
from trioreactor.connection_callbacks import (
    MessageCallback,
    WaterMarkCallback,
    WriteCompleteCallback,
)
from trioreactor.handler_errors import reason_for
from trioreactor.state import CloseReason
from trioreactor.tcp_connection import TcpConnection


@dataclass(frozen=True, kw_only=True, slots=True)
class Callbacks:
    """A handler that dispatches to functions: pass it wherever a handler is wanted.

    What any of them raises ends that connection, as with any handler.
    """

    message: MessageCallback
    """``message(conn, buffer)``: input has come."""
    connection: Callable[[TcpConnection], object] | None = None
    """``connection(conn)``: called when the connection is up (``conn.state`` is CONNECTED) and
    again when it is down (DISCONNECTED, with ``conn.close_reason`` set)."""
    write_complete: WriteCompleteCallback | None = None
    """``write_complete(conn)``: everything sent is with the kernel."""
    high_water_mark: WaterMarkCallback | None = None
    """``high_water_mark(conn, size)``: the send buffer rose above the high mark."""
    low_water_mark: WaterMarkCallback | None = None
    """``low_water_mark(conn, size)``: it has sunk to the low one."""
    draining: Callable[[TcpConnection], object] | None = None
    """``draining(conn)``: the server drains, or the client disconnects: finish, and
    `TcpConnection.shutdown`."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value: object = getattr(self, field.name)
            if callable(value) or (value is None and field.name != "message"):
                continue
            hint = ""
            if isinstance(value, Codec):
                hint = ", such as codec.on_message(function) makes it"
            raise TypeError(f"Callbacks({field.name}={value!r}): pass a function{hint}")

    async def __call__(self, conn: TcpConnection) -> None:
        """Serve *conn* until its peer's EOF or its close, then close it."""
        with self._ending(conn):
            self.begin(conn)
            await conn.dispatch(self.message)
            await conn.aclose()

    def begin(self, conn: TcpConnection) -> None:
        """What comes before the first message."""
        # A connection without any is spared what would hold them.
        if self.write_complete is not None:
            conn.write_complete_callback = self.write_complete
        if self.high_water_mark is not None:
            conn.high_water_mark_callback = self.high_water_mark
        if self.low_water_mark is not None:
            conn.low_water_mark_callback = self.low_water_mark
        if self.draining is not None:
            conn.add_draining_callback(self.draining)
        if self.connection is not None:
            self.connection(conn)

    async def finish(self, conn: TcpConnection, error: BaseException | None) -> None:
        """What comes after the last one: a dispatch without a task has ended by *error*."""
        with self._ending(conn):
            if error is not None:
                try:
                    raise error
                finally:
                    # Its traceback has this frame now.
                    del error
            await conn.aclose()

    @contextmanager
    def _ending(self, conn: TcpConnection) -> Generator[None]:
        """Close *conn* for what ends the block, and tell that it is down."""
        try:
            yield
        except Exception as error:
            reason = reason_for(conn, error)
            if reason is CloseReason.HANDLER_ERROR:
                conn.handler_error = error
            conn.force_close(reason)
            raise
        except BaseException:
            conn.force_close(CloseReason.CANCELLED)
            raise
        finally:
            if self.connection is not None:
                self.connection(conn)
