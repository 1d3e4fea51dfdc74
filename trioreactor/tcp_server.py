"""TcpServer: one accept task for each listening socket and one task for each connection."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from types import MappingProxyType
from typing import Any

import trio

from trioreactor.acceptor import Acceptor
from trioreactor.address import SocketAddress, format_address
from trioreactor.connection_callbacks import Handler
from trioreactor.exception_groups import unwrapped
from trioreactor.handler_errors import close_and_log
from trioreactor.limits import ConnectionLimiter
from trioreactor.listen import open_tcp_acceptors
from trioreactor.opening import Opening, in_order
from trioreactor.loop_watchdog import DEFAULT_THRESHOLD, LoopWatchdog, check_threshold
from trioreactor.options import Limits, SocketOptions, Timeouts, Watermarks, check_kinds
from trioreactor.overflow import Overflow, check_overflow
from trioreactor.send_buffer import Droppable
from trioreactor.server_connections import ServerConnections
from trioreactor.server_statistics import DrainReport, ServerStatistics
from trioreactor.state import CloseReason, ConnectionState
from trioreactor.tcp_connection import TcpConnection

# How long a drain waits for handlers that it has cancelled, when `Timeouts.linger` is off: as long
# as that one's default.
_UNWIND = 2.0

# How many of a listening socket's backlog a drain still takes. A bound, for a flood must not keep
# a server from ending; the default backlog of most systems.
_LAST_CALL = 4096


class TcpServer:
    """Serves connections with *handler*, each in a task of its own.

    *handler* is ``async def handler(conn)`` or `Callbacks`. When it returns, the connection is
    closed gracefully. When it raises, the error is logged on ``trioreactor.server`` and that
    connection is closed; the others do not notice. A peer that went away is no error.

    Where to listen: *port* (0: the system chooses) on *host* (None: every address, IPv4 and
    IPv6), or *listeners*: acceptors, or trio's socket listeners, which the server then owns.

    *overflow* says what a `broadcast` does to those who have reached their hard limit: close them,
    or leave out the new message or the oldest ones; *on_drop* is then called with the connection
    and how many it lost.

    *watchdog* is how many seconds one turn of the loop may take before `LoopWatchdog` warns of who
    holds it, while this serves; None for no watchdog. (0.1 s: asyncio's slow_callback_duration)

    A server serves once: make another to serve again.
    """

    def __init__(
        self,
        handler: Handler,
        port: int | None = None,
        *,
        host: str | None = None,
        listeners: Sequence[Acceptor | trio.SocketListener] | None = None,
        name: str = "server",
        watermarks: Watermarks = Watermarks(),
        limits: Limits = Limits(),
        timeouts: Timeouts = Timeouts(),
        socket_options: SocketOptions = SocketOptions(),
        overflow: Overflow = "close",
        on_drop: Callable[[TcpConnection, int], object] | None = None,
        watchdog: float | None = DEFAULT_THRESHOLD,
    ) -> None:
        if not callable(handler):
            raise TypeError(f"TcpServer({handler!r}): pass an async function or Callbacks")
        if (port is None) == (listeners is None):
            raise TypeError("TcpServer: pass either a port or listeners=[...]")
        if listeners is not None and host is not None:
            raise TypeError("TcpServer: host belongs to port; listeners have their own address")
        check_kinds(
            "TcpServer",
            watermarks=watermarks,
            limits=limits,
            timeouts=timeouts,
            socket_options=socket_options,
        )
        self.name = name
        self._port = port
        self._host = host
        self._given = listeners
        self._watermarks = watermarks
        self._timeouts = timeouts
        self._socket_options = socket_options
        check_overflow("TcpServer", overflow)
        self._overflow: Overflow = overflow
        if on_drop is not None and not callable(on_drop):
            raise TypeError(f"TcpServer(on_drop={on_drop!r}): pass a function")
        self._on_drop = on_drop
        check_threshold("TcpServer", "watchdog", watchdog, off=True)
        self._watchdog = None if watchdog is None else LoopWatchdog(watchdog)
        self._limiter = ConnectionLimiter(limits)
        self._acceptors: list[Acceptor] = []
        self._started = False
        # No more connections are wanted: close, drain, or the end of serve.
        self._ending = False
        # Unset while `stop_accepting` holds.
        self._may_accept = trio.Event()
        self._may_accept.set()
        # What comes before a connection is the handler's, in this order.
        steps: list[Opening] = []
        self._state = ConnectionState.CONNECTING if steps else ConnectionState.CONNECTED
        self._connections = ServerConnections(handler, self._limiter, in_order(steps))
        self._serial = count(1)
        self._rejected: Counter[str] = Counter()
        self.connections: Mapping[str, TcpConnection] = self._connections.by_name
        """The living connections by name: read-only, always up to date."""

    def __repr__(self) -> str:
        where = ", ".join(map(format_address, self.addresses)) or "nothing"
        return f"<TcpServer {self.name} on {where}, {len(self._connections)} connections>"

    @property
    def addresses(self) -> list[SocketAddress]:
        """Where it listens: empty before it has bound and after it has stopped."""
        return [] if self._ending else [acceptor.address for acceptor in self._acceptors]

    @property
    def limits(self) -> Limits:
        """The limits in force. They may be set while serving: they hold for newcomers."""
        return self._limiter.limits

    @limits.setter
    def limits(self, limits: Limits) -> None:
        self._limiter.limits = limits

    def statistics(self) -> ServerStatistics:
        """The counters as they are now."""
        return ServerStatistics(
            rejected=MappingProxyType(dict(self._rejected)),
            shed=sum(acceptor.statistics().shed for acceptor in self._acceptors),
            loop_lag=None if self._watchdog is None else self._watchdog.longest,
            loop_holds=0 if self._watchdog is None else self._watchdog.holds,
            **self._connections.counters.totals(self.connections.values()).as_fields(),
        )

    # -- serving

    async def serve(
        self,
        *,
        handler_nursery: trio.Nursery | None = None,
        task_status: trio.TaskStatus[list[Acceptor]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until cancelled, closed or drained.

        Reports the acceptors once it listens, so ``await nursery.start(server.serve)`` returns
        when clients can connect. With *handler_nursery*, connections' tasks run there and may
        outlive this call; else all have ended when it returns, and every descriptor is closed.

        Raises `OSError` if it cannot listen, or if a listening socket itself fails. Cancelling
        closes every connection at once.
        """
        if self._started:
            raise RuntimeError("this server has served already: make another TcpServer")
        self._started = True
        self._acceptors = await self._open()
        if self._watchdog is not None:
            self._watchdog.start()
        try:
            with unwrapped():
                async with trio.open_nursery() as nursery:
                    self._connections.serve_in(
                        handler_nursery or nursery, own=handler_nursery is None
                    )
                    for acceptor in self._acceptors:
                        nursery.start_soon(self._accept_loop, acceptor, name=repr(acceptor))
                    task_status.started(list(self._acceptors))
        finally:
            if self._watchdog is not None:
                self._watchdog.stop()
            self._stop_listening()
            with trio.CancelScope(shield=True):
                for acceptor in self._acceptors:
                    await acceptor.aclose()

    async def _open(self) -> list[Acceptor]:
        if self._given is None:
            assert self._port is not None
            return await open_tcp_acceptors(
                self._port, host=self._host, socket_options=self._socket_options
            )
        return [  # noqa: ASYNC910 serve has checkpoints
            acceptor
            if isinstance(acceptor, Acceptor)
            else Acceptor(acceptor.socket, socket_options=self._socket_options)
            for acceptor in self._given
        ]

    async def _accept_loop(self, acceptor: Acceptor) -> None:  # noqa: ASYNC910 a task of its own
        try:
            while not self._ending:
                await self._may_accept.wait()
                await acceptor.wait_acceptable()
                if self._may_accept.is_set() and not self._accept(acceptor, acceptor.batch):
                    await self._limiter.wait_for_room()
        except trio.ClosedResourceError:
            if not self._ending:
                raise

    def _accept(self, acceptor: Acceptor, most: int | None) -> bool:
        """Take up to *most* of those that wait (None: all). False if a limit says to wait."""
        for taken in count():
            # What is told of the one before may have closed the server.
            if taken == most or (taken and self._ending):
                break
            # The permit comes first, so that the limit is exact.
            obstacle = self._limiter.try_acquire()
            if obstacle and self.limits.when_full == "wait":
                return False
            accepted = acceptor.accept_nowait()
            if accepted is None:
                if not obstacle:
                    self._limiter.give_back()
                break
            sock, peer = accepted
            if not obstacle and not self._limiter.try_enter(peer):
                self._limiter.release()
                obstacle = "per_peer"
            if obstacle:
                sock.close()
                self._rejected[obstacle] += 1
                continue
            self._start(acceptor, sock, peer)
        return True

    def _start(self, acceptor: Acceptor, sock: socket.socket, peer: SocketAddress) -> None:
        try:
            conn = TcpConnection.from_socket(
                sock,
                local_address=acceptor.address_of(sock),
                peer_address=peer,
                name=f"{self.name}-{acceptor.name}#{next(self._serial)}",
                watermarks=self._watermarks,
                timeouts=self._timeouts,
                state=self._state,
            )
        except OSError as error:
            # epoll has no room for it (ENOSPC, ENOMEM): a shortage like any other at accept.
            self._limiter.leave(peer)
            acceptor.shed(sock, error)
            return
        self._connections.enter(conn)

    # -- all connections at once

    def broadcast(
        self, data: bytes | bytearray | memoryview, *, to: Iterable[TcpConnection] | None = None
    ) -> int:
        """Send *data* to every connection (or to those in *to*) without waiting for any.

        Returns how many took it. Slow ones queue it, up to their hard limit; for those that would
        pass it the server's *overflow* holds. Closed and closing ones are left out. Those that are
        behind come last, so that queueing and closing delays none of the others.
        """
        # What is never dropped may be gathered with what else waits.
        data = bytes(memoryview(data)) if self._overflow == "close" else Droppable(data)
        conns = self._connections.living() if to is None else list(to)
        if not data:
            return sum(conn.state is ConnectionState.CONNECTED for conn in conns)
        behind: list[TcpConnection] = []
        sent = 0
        for conn in conns:
            try:
                took = conn.send_if_idle(data)
            except trio.BrokenResourceError:
                continue
            if took:
                sent += 1
            elif took is None:
                behind.append(conn)
        return sent + sum(self._offer(conn, data) for conn in behind)

    def _offer(self, conn: TcpConnection, data: bytes) -> bool:
        """Send without waiting. False if the connection did not take it."""
        if conn.state is not ConnectionState.CONNECTED:
            return False
        try:
            if self._overflow == "close":
                conn.send(data)
                return True
            refused = conn.refused
            dropped = conn.offer(data, self._overflow)
        except (trio.BrokenResourceError, trio.BusyResourceError):
            return False
        if dropped and self._on_drop is not None:
            try:
                self._on_drop(conn, dropped)
            except Exception as error:
                close_and_log(conn, error)
        return conn.refused == refused

    def stop_accepting(self) -> None:
        """Leave newcomers in the backlog until `resume_accepting`. Idempotent."""
        if self._may_accept.is_set():
            self._may_accept = trio.Event()

    def resume_accepting(self) -> None:
        """Take newcomers again. Idempotent."""
        self._may_accept.set()

    # -- the end

    def close(self) -> None:
        """Close every listening socket and connection at once; `serve` returns. Idempotent."""
        self._stop_listening()
        for conn in self._connections.living():
            conn.force_close()

    async def drain(self, grace: float) -> DrainReport:
        """Stop accepting, let the connections finish, and close what has not after *grace* seconds.

        Those that wait in the backlog are still taken, as far as the limits let them in, for to
        their clients they are connected.
        Every connection's `draining` event is set. When the grace is over, the rest is closed
        with `CloseReason.DRAIN_TIMEOUT`, and their handlers are cancelled and given
        `Timeouts.linger` seconds to unwind. `serve` returns once all have ended. Cancelling leaves
        the server draining: call `drain` or `close` again.
        """
        if not grace >= 0:
            raise ValueError(f"drain({grace!r}): pass at least 0 seconds")
        begun = trio.current_time()
        if not self._ending:
            for acceptor in self._acceptors:
                self._accept(acceptor, _LAST_CALL)
        self._stop_listening()
        waiting = self._connections.living()
        for conn in waiting:
            conn.start_draining()
        with trio.move_on_after(grace):
            await self._connections.wait_empty()
        forced = self._connections.living()
        for conn in forced:
            conn.force_close(CloseReason.DRAIN_TIMEOUT)
        linger = self._timeouts.linger
        with trio.move_on_after(_UNWIND if linger is None else linger):
            await self._connections.wait_empty()
        return DrainReport(
            finished=len(waiting) - len(forced),
            forced=tuple(conn.name for conn in forced),
            stuck=tuple(self.connections),
            seconds=trio.current_time() - begun,
        )

    def _stop_listening(self) -> None:
        self._ending = True
        self._connections.stop_entering()
        self.resume_accepting()
        self._limiter.close()
        for acceptor in self._acceptors:
            acceptor.close()


async def serve_tcp(
    handler: Handler,
    port: int,
    *,
    host: str | None = None,
    backlog: int | None = None,
    handler_nursery: trio.Nursery | None = None,
    task_status: trio.TaskStatus[list[Acceptor]] = trio.TASK_STATUS_IGNORED,
    **server_options: Any,
) -> None:
    """Serve TCP connections until cancelled: takes the place of `trio.serve_tcp`.

    The arguments are trio's; *server_options* are those of `TcpServer`. Unlike with trio, a
    handler that raises ends its own connection and no more.
    """
    if backlog is not None:
        options = server_options.get("socket_options", SocketOptions())
        server_options["socket_options"] = replace(options, backlog=backlog)
    server = TcpServer(handler, port, host=host, **server_options)
    await server.serve(handler_nursery=handler_nursery, task_status=task_status)
