"""ConnectionCallbacks: when a user's write-side callbacks run, and what becomes of their errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVarTuple

import trio

from trioreactor.handler_errors import close_and_log
from trioreactor.state import ConnectionState

if TYPE_CHECKING:
    from trioreactor.buffer import Buffer
    from trioreactor.poller import Poller
    from trioreactor.read_half import ReadHalf
    from trioreactor.tcp_connection import TcpConnection

Args = TypeVarTuple("Args")

MessageCallback = Callable[["TcpConnection", "Buffer"], object]
WriteCompleteCallback = Callable[["TcpConnection"], object]
WaterMarkCallback = Callable[["TcpConnection", int], object]


class ConnectionCallbacks:
    """Calls come from the poller, after what it is doing: never inside `send`, never recursively.

    What a callback raises comes out of the connection's running `dispatch`; where none runs, it is
    logged and the connection is closed with `CloseReason.HANDLER_ERROR`.
    """

    __slots__ = (
        "_complete_pending",
        "_conn",
        "_poller",
        "_read",
        "high_water_mark",
        "low_water_mark",
        "write_complete",
    )

    def __init__(self, conn: TcpConnection, read: ReadHalf, poller: Poller) -> None:
        self._conn = conn
        self._read = read
        self._poller = poller
        self.write_complete: WriteCompleteCallback | None = None
        self.high_water_mark: WaterMarkCallback | None = None
        self.low_water_mark: WaterMarkCallback | None = None
        # A write_complete call is on its way: several sends that end before it are one.
        self._complete_pending = False

    def on_high_water_mark(self, size: int) -> None:
        """The send buffer rose above the high-water mark, to *size* bytes."""
        fn = self.high_water_mark
        if fn is not None:
            self._poller.call_soon(lambda: self._call(fn, self._conn, size))

    def on_low_water_mark(self, size: int) -> None:
        """The send buffer sank to the low-water mark, to *size* bytes."""
        fn = self.low_water_mark
        if fn is not None:
            self._poller.call_soon(lambda: self._call(fn, self._conn, size))

    def on_write_complete(self) -> None:
        """Everything that was sent is with the kernel."""
        if not self._complete_pending:
            self._complete_pending = True
            self._poller.call_soon(self._call_write_complete)

    def _call_write_complete(self) -> None:
        self._complete_pending = False
        if self.write_complete is not None:
            self._call(self.write_complete, self._conn)

    def _call(self, fn: Callable[[*Args], object], *args: *Args) -> None:
        if self._conn.state is ConnectionState.DISCONNECTED or self._conn.broken:
            return
        try:
            self._read.run_in_context(fn, *args)
        except trio.ClosedResourceError as error:
            # One that sends on and on (chargen) meets the closing sooner or later.
            if self._conn.state is ConnectionState.CONNECTED:
                self._failed(error)
        except BaseException as error:  # noqa: ASYNC103 dispatch raises it, or it is logged
            self._failed(error)

    def _failed(self, error: BaseException) -> None:
        if not self._read.callback_failed(error):
            close_and_log(self._conn, error)
