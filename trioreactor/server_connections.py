"""ServerConnections: a server's living connections, and whoever serves each of them."""

from __future__ import annotations

import contextvars
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import trio

from trioreactor.acceptor import Acceptor
from trioreactor.address import SocketAddress
from trioreactor.broadcaster import Broadcaster
from trioreactor.callbacks import Callbacks
from trioreactor.connection_callbacks import Handler
from trioreactor.connection_counters import ConnectionCounters, ConnectionTotals
from trioreactor.exception_groups import lone
from trioreactor.handler_errors import close_and_log, end_after
from trioreactor.loop_watchdog import LoopWatchdog
from trioreactor.opening import Opening, open_connection
from trioreactor.options import Timeouts, Watermarks
from trioreactor.proxy_protocol import NOBODY, counted_address
from trioreactor.state import CloseReason, ConnectionState
from trioreactor.tcp_connection import TcpConnection


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """What a server does for a connection, in whatever loop it is."""

    handler: Handler
    opening: Opening | None
    broadcaster: Broadcaster
    watermarks: Watermarks
    timeouts: Timeouts
    behind_proxy: bool
    watchdog: float | None = None
    """The threshold, seconds, in loops that are not the server's own."""

    def entrant(self, peer: SocketAddress) -> SocketAddress:
        """Whom the limits count one from *peer* as when it comes: behind a proxy its client is not
        known yet.
        """
        return NOBODY if self.behind_proxy else peer


class ServerConnections:
    """Enters a connection, serves it, and forgets it when it has ended.

    A handler runs in a task for each connection. Callbacks need none while a connection lives, for
    the poller calls them: that is half the memory, and nearly half the cost of a connection that is
    short. A task sees to its end, where that has to wait for something, and to an *opening*: what
    comes before a connection is the handler's.
    """

    def __init__(self, service: Service, leave: Callable[[SocketAddress], object]) -> None:
        self._service = service
        self._handler = service.handler
        self._opening = service.opening
        # What a new one is.
        self._state = (
            ConnectionState.CONNECTED if service.opening is None else ConnectionState.CONNECTING
        )
        # To be told of each one's end.
        self._leave = leave
        # Where the tasks run, while serving.
        self._nursery: trio.Nursery
        # The handler, where connections need no task.
        self._callbacks: Callbacks | None = None
        # Somebody sees to those without a task.
        self._held_open = False
        self._living: dict[str, TcpConnection] = {}
        # No more will be entered.
        self._ending = False
        # Whoever waits for the last one to end.
        self._empty = trio.lowlevel.ParkingLot()
        self._counters = ConnectionCounters()
        self.by_name: Mapping[str, TcpConnection] = MappingProxyType(self._living)

    def __len__(self) -> int:
        return len(self._living)

    def _all(self) -> list[TcpConnection]:
        # A list of its own, for whoever may end some of them.
        return list(self._living.values())

    def watchdogs(self) -> list[LoopWatchdog]:
        """Those of loops that are not the server's own: none."""
        return []

    def totals(self) -> ConnectionTotals:
        """The counters as they are now."""
        return self._counters.totals(self._living.values())

    async def serve_in(self, nursery: trio.Nursery, *, own: bool) -> None:  # noqa: ASYNC910 serve has checkpoints
        """Tasks are to run in *nursery*, which has nobody else's if it is the server's *own*."""
        self._nursery = nursery
        # Somebody else's does not know of those without a task, and would not end them with it.
        handler = self._handler
        # Unless it serves in a way of its own.
        if own and isinstance(handler, Callbacks) and type(handler).__call__ is Callbacks.__call__:
            self._callbacks = handler
            self._held_open = True
            nursery.start_soon(self._hold_open)

    async def _hold_open(self) -> None:  # noqa: ASYNC910 a task of its own
        """By this one, connections without a task belong to the nursery."""
        try:
            await self.wait_ended()
        finally:
            # The accept task may be past its last checkpoint, and still enter some.
            self._held_open = False
            self.force_close(CloseReason.CANCELLED)

    async def wait_ended(self) -> None:  # noqa: ASYNC910 tasks of their own wait
        """Wait until none is left and no more will come."""
        while self._living or not self._ending:
            await self._empty.park()

    def admit(
        self, acceptor: Acceptor, sock: socket.socket, peer: SocketAddress, name: str
    ) -> None:
        """Make a connection of what was accepted, which has a permit, and serve it from now on."""
        try:
            conn = TcpConnection.from_socket(
                sock,
                local_address=acceptor.address_of(sock),
                peer_address=peer,
                name=name,
                watermarks=self._service.watermarks,
                timeouts=self._service.timeouts,
                state=self._state,
            )
        except OSError as error:
            # epoll has no room for it (ENOSPC, ENOMEM): a shortage like any other at accept.
            self._leave(self._service.entrant(peer))
            self._shed(acceptor, sock, error)
            return
        self.enter(conn)

    def enter(self, conn: TcpConnection) -> None:
        """Serve *conn*, which has a permit, from now on."""
        self._add(conn)
        if self._opening is not None:
            self._start_task(conn, self._opening, self._open)
        elif self._callbacks is not None and self._held_open:
            self._dispatch(conn, self._callbacks)
        else:
            self._start_task(conn, self._handler, self._run)

    @trio.lowlevel.enable_ki_protection
    def _add(self, conn: TcpConnection) -> None:
        self._living[conn.name] = conn
        self._counters.opened += 1

    def _shed(self, acceptor: Acceptor, sock: socket.socket, error: OSError) -> None:
        acceptor.shed(sock, error)

    def _start_task(
        self,
        conn: TcpConnection,
        handler: Handler,
        run: Callable[[TcpConnection, Handler], Awaitable[None]],
    ) -> None:
        conn.handler_scope = trio.CancelScope()
        try:
            if isinstance(self._nursery, trio.Nursery):
                self._nursery.start_soon(run, conn, handler, name=conn.name)
            else:
                # trio takes anything that has a start_soon, and asks no more of it than this.
                self._nursery.start_soon(run, conn, handler)
        except BaseException:
            # A nursery of the user's that has closed.
            conn.force_close(CloseReason.CANCELLED)
            self._forget(conn)
            raise

    def _dispatch(self, conn: TcpConnection, callbacks: Callbacks) -> None:
        def begin() -> None:
            try:
                callbacks.begin(conn)
            except BaseException as error:  # noqa: ASYNC103 its task raises it
                self._dispatched(conn, error)
                return  # noqa: ASYNC104 as above
            try:
                conn.dispatch_nowait(callbacks.message, self._dispatched)
            except Exception as error:
                # It was closed, or found to be broken, when it was told that it is up.
                self._dispatched(conn, error)

        # Each has a context of its own, as tasks have.
        contextvars.copy_context().run(begin)

    def _dispatched(self, conn: TcpConnection, error: BaseException | None) -> None:
        """There is no more input for the callbacks."""
        callbacks = self._callbacks
        assert callbacks is not None
        # A callback that is due is called soon, and not after a close.
        nobody_is_told = callbacks.connection is None and callbacks.write_complete is None
        # One that is being closed is not to leave the mapping at once: whoever closes it may be at
        # going through that.
        closed = conn.state is ConnectionState.DISCONNECTED
        if error is None and nobody_is_told and not closed and conn.close_at_eof():
            self._forget(conn)
        else:
            # What is left to do may take its time, or raise.
            self._start_task(conn, partial(callbacks.finish, error=error), self._run)

    async def _open(self, conn: TcpConnection, opening: Opening) -> None:  # noqa: ASYNC910 a task of its own
        """The life of a connection's task before it is open."""
        try:
            await open_connection(conn, opening)
        finally:
            if conn.state is not ConnectionState.CONNECTED:
                self._forget(conn)
        if conn.state is not ConnectionState.CONNECTED:
            return
        if self._callbacks is not None and self._held_open:
            conn.handler_scope = None
            self._dispatch(conn, self._callbacks)
        else:
            conn.handler_scope = trio.CancelScope()
            await self._run(conn, self._handler)

    async def _run(self, conn: TcpConnection, handler: Handler) -> None:  # noqa: ASYNC910 a task of its own
        """The whole life of a connection's task."""
        try:
            assert conn.handler_scope is not None
            with conn.handler_scope:
                serving = handler(conn)
                # It may have an error, whose traceback will have this frame.
                del handler
                await serving
                # Most have nothing to wait for, and so no need of the loop's turn.
                if not conn.close_at_eof():
                    await conn.aclose()
        except Exception as error:
            await end_after(conn, error)  # noqa: ASYNC102 bounded by linger
        except BaseExceptionGroup as group:
            errors, rest = group.split(Exception)
            if errors is not None:
                close_and_log(conn, errors)
            if rest is not None:
                raise lone(rest) from None
        finally:
            if conn.state is not ConnectionState.DISCONNECTED:
                conn.force_close(CloseReason.CANCELLED)
            self._forget(conn)

    @trio.lowlevel.enable_ki_protection
    def _forget(self, conn: TcpConnection) -> None:
        del self._living[conn.name]
        self._counters.count_end(conn)
        # It refers to the task, and the task's frames to the connection.
        conn.handler_scope = None
        self._leave(counted_address(conn, behind_proxy=self._service.behind_proxy))
        if not self._living and self._empty:
            self._empty.unpark_all()

    def forget_the_rest(self) -> None:
        """The tasks have all ended. Close those that are left: Ctrl-C came where nobody held them,
        such as between their opening and their handler.
        """
        for conn in self._all():
            conn.force_close(CloseReason.CANCELLED)
            self._forget(conn)

    # -- all of them at once

    def broadcast(self, message: bytes, to: Iterable[TcpConnection] | None) -> int:
        """Send to all, or to those in *to*; how many took it."""
        return self._service.broadcaster.send(message, self._all() if to is None else list(to))

    def start_draining(self) -> int:
        """Tell each that it is to finish; how many there are."""
        conns = self._all()
        for conn in conns:
            conn.start_draining()
        return len(conns)

    def force_close(self, reason: CloseReason) -> list[str]:
        """Close all; their names."""
        conns = self._all()
        for conn in conns:
            conn.force_close(reason)
        return [conn.name for conn in conns]

    def stop_entering(self) -> None:
        """No more will come. Idempotent."""
        self._ending = True
        self._empty.unpark_all()

    async def wait_empty(self) -> None:
        """Wait until none is left."""
        await trio.lowlevel.checkpoint()
        while self._living:
            await self._empty.park()
