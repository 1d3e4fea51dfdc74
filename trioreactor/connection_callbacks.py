"""ConnectionCallbacks: when a user's write-side callbacks run, and what becomes of their errors."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVarTuple, cast

import trio

from trioreactor.handler_errors import close_and_log
from trioreactor.state import ConnectionState

if TYPE_CHECKING:
    from trioreactor.buffer import Buffer
    from trioreactor.lifecycle import Lifecycle
    from trioreactor.poller import Poller
    from trioreactor.read_half import ReadHalf
    from trioreactor.tcp_connection import TcpConnection
    from trioreactor.write_half import WriteHalf

Args = TypeVarTuple("Args")

Handler = Callable[["TcpConnection"], Awaitable[object]]
MessageCallback = Callable[["TcpConnection", "Buffer"], object]
# The same for those that do not know whose connection it is.
OnMessage = Callable[[Any, "Buffer"], object]
# Told, with the connection, what a dispatch ended by.
OnEnd = Callable[[Any, "BaseException | None"], object]
WriteCompleteCallback = Callable[["TcpConnection"], object]
WaterMarkCallback = Callable[["TcpConnection", int], object]


# Ctrl-C has to get out of a callback that never returns; it is caught like every other error.
@trio.lowlevel.disable_ki_protection
def call_on_message(fn: OnMessage, conn: object, buffer: Buffer) -> None:
    """Call a message callback, in a context that is protected from Ctrl-C."""
    fn(conn, buffer)


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

    def call_soon(self, fn: Callable[[TcpConnection], object]) -> None:
        """Call *fn*, as the others are."""
        self._poller.call_soon(lambda: self._call(fn, self._conn))

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


class CallbackAttributes:
    """A connection's write-side callbacks, as its attributes: they may be set at any time."""

    __slots__ = ()

    _life: Lifecycle
    _write: WriteHalf

    @property
    def write_complete_callback(self) -> WriteCompleteCallback | None:
        """Called with the connection when the send buffer has become empty after a send, also
        when it never filled. Never inside `send`, never recursively.
        """
        return self._life.callbacks.write_complete if self._life.callbacks else None

    @write_complete_callback.setter
    def write_complete_callback(self, fn: WriteCompleteCallback | None) -> None:
        self._own_callbacks().write_complete = fn
        self._write.notify_complete = fn is not None

    @property
    def high_water_mark_callback(self) -> WaterMarkCallback | None:
        """Called with the connection and the buffer's size, once for each time that it rises
        above the high-water mark.
        """
        return self._life.callbacks.high_water_mark if self._life.callbacks else None

    @high_water_mark_callback.setter
    def high_water_mark_callback(self, fn: WaterMarkCallback | None) -> None:
        self._own_callbacks().high_water_mark = fn

    @property
    def low_water_mark_callback(self) -> WaterMarkCallback | None:
        """Called with the connection and the buffer's size, once for each time that it sinks to
        the low-water mark after having been above the high one.
        """
        return self._life.callbacks.low_water_mark if self._life.callbacks else None

    @low_water_mark_callback.setter
    def low_water_mark_callback(self, fn: WaterMarkCallback | None) -> None:
        self._own_callbacks().low_water_mark = fn

    def _own_callbacks(self) -> ConnectionCallbacks:
        life = self._life
        if life.callbacks is None:
            life.callbacks = ConnectionCallbacks(
                cast("TcpConnection", self), life.read, life.poller
            )
        return life.callbacks
