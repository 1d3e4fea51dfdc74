"""ReadHalf: a connection's way in, in both modes.

Coroutine mode reads lazily: unread data stays in the kernel, so the peer feels it. Dispatch mode
reads in the poller and calls the user's function there.
"""

from __future__ import annotations

import contextvars
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVarTuple

import trio

from trioreactor.codec import MessageDelivery
from trioreactor.connection_callbacks import OnEnd, OnMessage, call_on_message
from trioreactor.errors import ReceiveBufferFull
from trioreactor.half_owner import GONE
from trioreactor.sockets import broken
from trioreactor.unread_input import UnreadInput

if TYPE_CHECKING:
    from trioreactor.ending import Ending
    from trioreactor.half_owner import HalfOwner
    from trioreactor.sockets import DataSocket
    from trioreactor.write_half import WriteHalf

# One read, in bytes. (trio's and asyncio's usual size is 64 KiB to 256 KiB)
RECEIVE_SIZE = 65536

# Takes the place of a dispatching task's.
_NO_CONTEXT = contextvars.Context()

Args = TypeVarTuple("Args")


class ReadHalf(UnreadInput):
    """Reads for one task at a time, or for one callback."""

    __slots__ = (
        "_closed",
        "_conn",
        "_context",
        "_ending",
        "_error",
        "_interrupted",
        "_limit",
        "_on_end",
        "_owed",
        "_receive_limit",
        "_receive_size",
        "_write",
        "bytes_received",
        "moved",
    )

    def __init__(
        self,
        owner: HalfOwner,
        ending: Ending,
        sock: DataSocket,
        write: WriteHalf,
        receive_limit: int | None,
    ) -> None:
        super().__init__(owner, sock)
        self._ending = ending
        # Corked around callbacks, so that what they send leaves together.
        self._write = write
        # How much a dispatch callback may leave unconsumed: a plain one, and the one that runs.
        self._receive_limit = self._limit = receive_limit
        self._receive_size = (
            RECEIVE_SIZE if receive_limit is None else min(RECEIVE_SIZE, receive_limit)
        )
        self.bytes_received = 0
        self.moved: float | None = None  # when input was last read, if somebody wants to know
        # The connection and the context to call a dispatch's callback with.
        self._conn: object = None
        self._context = _NO_CONTEXT
        # Who hears of the end of a dispatch that has no task.
        self._on_end: OnEnd | None = None
        self._owed = False  # the callback is to be called for what an earlier call left
        self._error: BaseException | None = None  # what dispatch has to raise
        self._closed = self._interrupted = False

    # -- coroutine mode

    @trio.lowlevel.enable_ki_protection
    async def receive_some(self, max_bytes: int | None, *, iterating: bool = False) -> bytes:
        """Wait for input and return it: see `TcpConnection.receive_some`.

        With *iterating* the end is a StopAsyncIteration, so that ``__anext__`` needs no coroutine
        of its own.
        """
        if max_bytes is None:
            max_bytes = RECEIVE_SIZE
        elif operator.index(max_bytes) < 1:
            raise ValueError(f"receive_some({max_bytes}): pass at least 1 byte, or None")
        self._begin()
        self._interrupted = waited = False
        while True:
            if self._closed:
                raise self._ending.error()
            if self._interrupted:
                return b""  # noqa: ASYNC910 it waited
            if (self.channel.readable and self.reading) or self.buffer.size or self.eof:
                if not waited:
                    await trio.lowlevel.checkpoint_if_cancelled()
                data = self.receive_nowait(max_bytes)
                if data is not None:
                    if not waited:
                        await trio.lowlevel.cancel_shielded_checkpoint()
                    if iterating and not data:
                        raise StopAsyncIteration
                    return data  # noqa: ASYNC910 it waited, or else did both
            else:
                if not self.channel.read_armed:
                    self.channel.want_read()
                if self._task is not None:
                    # It came between our wake-up and our turn.
                    self._begin()
                self._task = trio.lowlevel.current_task()
                self.channel.park()
                await trio.lowlevel.wait_task_rescheduled(self._abort)
                waited = True

    def interrupt(self) -> None:
        """Let a `receive_some` that waits give b"", though there is no EOF."""
        if self._on_message is None:
            # Also where it has been woken, and may find nothing. The next one does not hear of it.
            self._interrupted = True
            self._wake()

    def _begin(self) -> None:
        if self._closed:
            raise self._ending.error()
        if self._task is not None or self._on_end is not None:
            raise trio.BusyResourceError("another task is already receiving on this connection")

    def claim(self) -> None:
        """Keep others from reading until `release`; raises if somebody does."""
        self._begin()
        self._on_end = lambda _conn, _error: None  # as in a dispatch without a task; not called

    def release(self) -> None:
        """Others may read."""
        self._on_end = None

    def receive_nowait(self, max_bytes: int) -> bytes | None:
        """What is there, b"" at EOF, or None if there is nothing yet."""
        if self.buffer.size:
            if self._watching:
                self.channel.read_again()
            return self.buffer.take(min(max_bytes, self.buffer.size))
        if self.eof:
            return b""
        channel = self.channel
        try:
            data = self._sock.recv(max_bytes)
        except BlockingIOError:
            channel.readable = False
            return None
        except OSError as error:
            self._owner.on_receive_failed(error)
            raise broken(error) from error
        n = len(data)
        if n < max_bytes and not channel.hangup:
            channel.readable = False
        if not n:
            self._see_eof()
            if self._closed:
                raise self._ending.error()
        elif self._watching:
            channel.want_read()
            if channel.hangup:
                # The end was announced behind what has just been read.
                channel.read_again()
        self.bytes_received += n
        if self.moved is not None:
            self.moved = trio.current_time()
        return data

    def _abort(self, _raise_cancel: object) -> trio.lowlevel.Abort:
        self._task = None
        self.channel.unpark()
        self._on_message = None
        return trio.lowlevel.Abort.SUCCEEDED

    # -- dispatch mode

    @trio.lowlevel.enable_ki_protection
    async def dispatch(self, conn: object, on_message: OnMessage) -> None:
        """Call *on_message* for input until EOF or close: see `TcpConnection.dispatch`."""
        self._begin()
        await trio.lowlevel.checkpoint_if_cancelled()
        if self.eof and not self.buffer.size:
            await trio.lowlevel.cancel_shielded_checkpoint()
            return
        task = self._task = trio.lowlevel.current_task()
        self._start(conn, on_message, task.context)
        try:
            await trio.lowlevel.wait_task_rescheduled(self._abort)
            self._check_end(on_message)
        finally:
            self._let_go()

    def dispatch_nowait(
        self,
        conn: object,
        on_message: OnMessage,
        context: contextvars.Context,
        on_end: OnEnd,
    ) -> None:
        """`dispatch` with no task to wait in: at the end *on_end* is called, with *conn* and what
        `dispatch` would raise or None. Maybe from inside another call, of a callback even.
        """
        self._begin()
        self._on_end = on_end
        self._start(conn, on_message, context)

    def _start(self, conn: object, on_message: OnMessage, context: contextvars.Context) -> None:
        self._on_message = on_message
        if self._receive_limit is not None:
            room = on_message.room if isinstance(on_message, MessageDelivery) else 0
            self._limit = max(self._receive_limit, room)
        self._conn = conn
        self._context = context
        self._begin_reading()

    def _check_end(self, on_message: OnMessage) -> None:
        """Raise what a dispatch that has ended has to raise."""
        if self._error is not None:
            raise self._error
        if self.eof and isinstance(on_message, MessageDelivery):
            on_message.at_eof(self.buffer)

    def _let_go(self) -> None:
        """Nothing of a dispatch may hold on to anything: each would be a cycle."""
        self._error = None
        self._conn = None
        self._context = _NO_CONTEXT

    def on_readable(self) -> None:
        """There is input, an EOF or an error, or something left over. The hot path of dispatch."""
        on_message = self._on_message
        channel = self.channel
        if on_message is None or not self.reading:
            if self._task is not None and self.reading:
                self._wake()
            elif channel.failed or self._watching:
                self._look_for_end()
            return
        size = self._receive_size
        buffer = self.buffer
        if buffer.size:
            if self._limit is not None:
                size = min(size, self._limit - buffer.size)
            if self._owed or size <= 0:
                self._deliver_left_over(on_message)
                return
        try:
            data = self._sock.recv(size)
        except BlockingIOError:
            channel.readable = False
            if not channel.read_armed:
                channel.want_read()
            return
        except OSError as error:
            self._owner.on_receive_failed(error)
            return
        n = len(data)
        if not n:
            self._see_eof()
            self._finish(None)
            return
        self.bytes_received += n
        if self.moved is not None:
            self.moved = trio.current_time()
        buffer.append(data)
        if n == size or channel.hangup:
            # More may be there; the others have their turn first.
            channel.read_again()
        else:
            channel.readable = False
            if not channel.read_armed:
                channel.want_read()
        self._deliver(on_message)

    def _deliver(self, on_message: OnMessage) -> None:
        write = self._write
        write.corked = True
        try:
            self._context.run(call_on_message, on_message, self._conn, self.buffer)
        except BaseException as error:  # noqa: ASYNC103 dispatch raises it
            self._finish(error)
        if write.corked:
            write.uncork()
        if self.buffer.size and self._limit is not None:
            self._check_limit(self._limit)

    def _check_limit(self, limit: int) -> None:
        if self.buffer.size >= limit and self.reading and self._on_message is not None:
            self._finish(ReceiveBufferFull(self.buffer.size, limit))

    def _deliver_left_over(self, on_message: OnMessage) -> None:
        """Call again for what an earlier call left: reading starts again, or there was no room."""
        self._owed = False
        channel = self.channel
        if channel.readable:
            channel.read_again()
        else:
            channel.want_read()
        self._deliver(on_message)
        if self.eof and self.reading and not self._owed:
            self._finish(None)

    def run_in_context(self, fn: Callable[[*Args], object], *args: *Args) -> None:
        """Call *fn*, in the context of the task that dispatches if there is one."""
        if self._on_message is not None:
            self._context.run(fn, *args)
        else:
            fn(*args)

    def callback_failed(self, error: BaseException) -> bool:
        """Raise *error* out of a running dispatch. False if none runs."""
        if self._on_message is None:
            return False
        self._finish(error)
        return True

    def _finish(self, error: BaseException | None) -> None:
        """End a running dispatch."""
        on_message, self._on_message = self._on_message, None
        if on_message is None:
            return
        self._error = error
        # Raised below, its traceback has this frame, which must not have it.
        del error
        if self._on_end is None:
            self._wake()
            return
        # A copy, for it may end in a callback, and a context cannot be entered twice.
        on_end, conn, context = self._on_end, self._conn, self._context.copy()
        self._on_end = None
        try:
            self._check_end(on_message)
        except BaseException as raised:  # noqa: ASYNC103 it is handed on
            # From in here, for kept any longer it would be a cycle: its traceback has this frame.
            self._let_go()
            context.run(on_end, conn, raised)
        else:
            self._let_go()
            context.run(on_end, conn, None)

    def deliver_again(self) -> None:
        """Call the callback in the next round, for what it has left."""
        self._owed = True
        self.channel.read_again()

    # -- both

    def stop_reading(self) -> None:
        """Leave input in the kernel. Idempotent."""
        self.reading = False

    def start_reading(self) -> None:
        """Take input again. Idempotent."""
        if not self.reading:
            self.reading = True
            if not self._closed:
                self._begin_reading()

    def _begin_reading(self) -> None:
        """Catch up on what no further event will tell of."""
        channel = self.channel
        self._owed = self._on_message is not None and self.buffer.size > 0
        if channel.readable or self._owed:
            channel.read_again()
        else:
            channel.want_read()

    @trio.lowlevel.enable_ki_protection
    async def wait_readable(self) -> None:
        """Wait for something for `receive_nowait`."""
        if self.channel.readable or self.channel.closed:
            await trio.lowlevel.checkpoint()
            return
        self.channel.want_read()
        self._task = trio.lowlevel.current_task()
        self.channel.park()
        await trio.lowlevel.wait_task_rescheduled(self._abort)

    def start_closing(self) -> None:
        """`aclose` has begun: whoever reads hears of it. Reading goes on only to discard."""
        self._closed = True
        self.reading = True
        self._end_reader(None)

    def close(self, error: BaseException | None) -> None:
        """The socket is closed: wake whoever reads; a dispatch raises *error*. Idempotent."""
        self._closed = True
        self._end_reader(error)
        self._owner = GONE

    def _end_reader(self, error: BaseException | None) -> None:
        """A dispatch raises *error*; whoever receives looks by itself."""
        if self._on_message is not None:
            self._finish(error)
        else:
            self._wake()

    def _wake(self) -> None:
        if self._task is not None:
            task, self._task = self._task, None
            self.channel.unpark()
            self.channel.poller.woke = True
            trio.lowlevel.reschedule(task)
