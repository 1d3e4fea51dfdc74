"""TcpServer: one accept task for each listening socket and one task for each connection."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from types import MappingProxyType
from typing import Any

import trio

from trioreactor.acceptor import Acceptor
from trioreactor.address import SocketAddress, format_address
from trioreactor.broadcaster import Broadcaster
from trioreactor.connection_callbacks import Handler
from trioreactor.exception_groups import unwrapped
from trioreactor.limits import ConnectionLimiter
from trioreactor.listen import open_tcp_acceptors
from trioreactor.loop_watchdog import DEFAULT_THRESHOLD, LoopWatchdog, check_threshold
from trioreactor.opening import Opening, in_order
from trioreactor.options import Limits, SocketOptions, Timeouts, Watermarks, check_kinds
from trioreactor.overflow import Overflow
from trioreactor.proxy_protocol import ProxyOpening, ProxyProtocol
from trioreactor.server_connections import ServerConnections, Service
from trioreactor.server_loops import LoopPool, ServerLoops
from trioreactor.server_statistics import DrainReport, ServerStatistics
from trioreactor.state import CloseReason
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

    With *proxy_protocol* every connection must begin with a PROXY header from a proxy that is
    trusted, and is its client's: see `ProxyProtocol`.

    With an *ssl_context* a connection is the handler's when TLS's handshake is done, as by
    `TcpConnection.start_tls`: `TcpConnection.tls` then tells of it. It has `Timeouts.handshake`
    seconds, in a task of its own.

    *watchdog* is how many seconds one turn of a loop, this or one of *loops*, may take before
    `LoopWatchdog` warns of who holds it; None for no watchdog. (0.1 s: as asyncio's)

    With *loops*, an `EventLoopThreadPool` that runs, this loop accepts and the pool's serve: each
    connection lives in one of theirs, handler, callbacks and *on_drop* included, and only there may
    anything be done with it (`TcpConnection.loop`). `broadcast`, `statistics` and `connections`
    may be used from any of the threads; all else of the server belongs to its own loop.

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
        proxy_protocol: ProxyProtocol | None = None,
        ssl_context: ssl.SSLContext | None = None,
        https_compatible: bool = False,
        watchdog: float | None = DEFAULT_THRESHOLD,
        loops: LoopPool | None = None,
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
        if loops is not None and not callable(getattr(loops, "take_loop", None)):
            raise TypeError(f"TcpServer(loops={loops!r}): pass an EventLoopThreadPool")
        self.name = name
        self._port = port
        self._host = host
        self._given = listeners
        self._socket_options = socket_options
        check_threshold("TcpServer", "watchdog", watchdog, off=True)
        self._watchdog = None if watchdog is None else LoopWatchdog(watchdog)
        # How long a drain waits for handlers that it has cancelled.
        self._unwind = _UNWIND if timeouts.linger is None else timeouts.linger
        self._limiter = ConnectionLimiter(limits)
        self.loops = loops
        """The pool whose loops serve the connections; None if they all live in the server's own."""
        self._acceptors: list[Acceptor] = []
        self._started = False
        # No more connections are wanted: close, drain, or the end of serve.
        self._ending = False
        # Unset while `stop_accepting` holds.
        self._may_accept = trio.Event()
        self._may_accept.set()
        self._serial = count(1)
        # What comes before a connection is the handler's, in this order.
        steps: list[Opening] = []
        if proxy_protocol is not None:
            steps.append(ProxyOpening(proxy_protocol, self._limiter))
        self._ssl_context: ssl.SSLContext | None = None
        self._https_compatible = https_compatible
        if ssl_context is None and https_compatible:
            raise TypeError("TcpServer: https_compatible wants an ssl_context")
        if ssl_context is not None:
            self.ssl_context = ssl_context
            steps.append(self._start_tls)
        self._service = Service(
            handler=handler,
            opening=in_order(steps),
            broadcaster=Broadcaster("TcpServer", overflow, on_drop),
            watermarks=watermarks,
            timeouts=timeouts,
            behind_proxy=proxy_protocol is not None,
            watchdog=watchdog,
        )
        self._connections = (
            ServerConnections(self._service, self._limiter.leave)
            if loops is None
            else ServerLoops(self._service, self._limiter, loops)
        )
        self.connections: Mapping[str, TcpConnection] = self._connections.by_name
        """The living connections by name: read-only, always up to date. With *loops* they come and
        go in other threads: what iterates goes over a copy, made when it begins."""

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

    @property
    def ssl_context(self) -> ssl.SSLContext | None:
        """What TLS begins with; None in a server without. It may be set while serving, with a new
        certificate for instance: it holds for newcomers.
        """
        return self._ssl_context

    @ssl_context.setter
    def ssl_context(self, ssl_context: ssl.SSLContext) -> None:
        if not isinstance(ssl_context, ssl.SSLContext):
            raise TypeError(f"TcpServer(ssl_context={ssl_context!r}): pass an ssl.SSLContext")
        if self._started and self._ssl_context is None:
            raise RuntimeError("this server serves without TLS: make one with ssl_context=...")
        self._ssl_context = ssl_context

    async def _start_tls(self, conn: TcpConnection) -> None:
        assert self._ssl_context is not None
        await conn.start_tls(
            self._ssl_context, server_side=True, https_compatible=self._https_compatible
        )

    def statistics(self) -> ServerStatistics:
        """The counters as they are now."""
        watchdogs = [] if self._watchdog is None else [self._watchdog]
        watchdogs += self._connections.watchdogs()
        return ServerStatistics(
            rejected=MappingProxyType(self._limiter.rejected()),
            shed=sum(acceptor.statistics().shed for acceptor in self._acceptors),
            loop_lag=max((watchdog.longest for watchdog in watchdogs), default=None),
            loop_holds=sum(watchdog.holds for watchdog in watchdogs),
            **self._connections.totals().as_fields(),
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
        try:
            if self._watchdog is not None:
                self._watchdog.start()
            with unwrapped():
                async with trio.open_nursery() as nursery:
                    await self._connections.serve_in(
                        handler_nursery or nursery, own=handler_nursery is None
                    )
                    for acceptor in self._acceptors:
                        nursery.start_soon(self._accept_loop, acceptor, name=repr(acceptor))
                    task_status.started(list(self._acceptors))
        finally:
            if self._watchdog is not None:
                self._watchdog.stop()
            self._stop_listening()
            if handler_nursery is None:
                self._connections.forget_the_rest()
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
            if not obstacle and not self._limiter.try_enter(self._service.entrant(peer)):
                self._limiter.release()
                obstacle = "per_peer"
            if obstacle:
                sock.close()
                self._limiter.reject(obstacle)
                continue
            name = f"{self.name}-{acceptor.name}#{next(self._serial)}"
            self._connections.admit(acceptor, sock, peer, name)
        return True

    # -- all connections at once

    def broadcast(
        self, data: bytes | bytearray | memoryview, *, to: Iterable[TcpConnection] | None = None
    ) -> int:
        """Send *data* to every connection (or to those in *to*) without waiting for any.

        Returns how many took it; with *loops*, how many it was handed to where that is another
        thread's, which sends soon, and in the order of these calls. Slow ones queue it, up to
        their hard limit; for those that would pass it the server's *overflow* holds. Closed and
        closing ones are left out. Those that are behind come last, so that queueing and closing
        delays none of the others.
        """
        return self._connections.broadcast(self._service.broadcaster.message(data), to)

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
        self._connections.force_close(CloseReason.FORCED)

    def stop_listening(self, *, take_waiting: bool = True) -> None:
        """Close the listening sockets; connections live on, and `serve` returns after the last of
        them. Idempotent.

        Those that wait in the backlog are taken first, as far as the limits let them in, for to
        their clients they are connected. Pass ``take_waiting=False`` where another process
        listens on the same sockets and will take them.
        """
        if take_waiting and not self._ending:
            for acceptor in self._acceptors:
                self._accept(acceptor, _LAST_CALL)
        self._stop_listening()

    async def drain(self, grace: float) -> DrainReport:
        """Stop accepting, let the connections finish, and close what has not after *grace* seconds.

        Those that wait in the backlog are still taken, unless `stop_listening` was called before.
        Every connection's `draining` event is set. When the grace is over, the rest is closed
        with `CloseReason.DRAIN_TIMEOUT`, and their handlers are cancelled and given
        `Timeouts.linger` seconds to unwind. `serve` returns once all have ended. Cancelling leaves
        the server draining: call `drain` or `close` again.
        """
        if not grace >= 0:
            raise ValueError(f"drain({grace!r}): pass at least 0 seconds")
        begun = trio.current_time()
        self.stop_listening()
        present = self._connections.start_draining()
        with trio.move_on_after(grace):
            await self._connections.wait_empty()
        forced = self._connections.force_close(CloseReason.DRAIN_TIMEOUT)
        with trio.move_on_after(self._unwind):
            await self._connections.wait_empty()
        stuck = tuple(self.connections)
        # Those of a loop that does nothing at all are not forced yet.
        forced += [name for name in stuck if name not in forced]
        return DrainReport(
            finished=present - len(forced),
            forced=tuple(forced),
            stuck=stuck,
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
