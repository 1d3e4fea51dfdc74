"""ServerLoops: a server's connections in several loops, each of which lives in one of them.

What is shared between threads, and how::

    accept loop (the server's own thread)              a connection's loop
    ----------------------------------------           ----------------------------------------
    Acceptor, permits and rate, loads
    accept_nowait ---- socket, queue_in_loop --------> LoopShare.admit: TcpConnection, handler
    _left <----------- address, queue_in_loop -------- LoopShare._forget
    statistics, connections ------ lock -------------> LoopShare's dict and counters
    ConnectionLimiter's peers <--- lock -------------- an opening that tells whose a connection is
"""

from __future__ import annotations

import contextvars
import socket
import threading
from collections.abc import (
    Awaitable,
    Callable,
    ItemsView,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
    ValuesView,
)
from typing import Protocol, TypeVar, TypeVarTuple

import trio

from trioreactor.acceptor import Acceptor
from trioreactor.address import SocketAddress
from trioreactor.connection_counters import ConnectionTotals, sum_of_totals
from trioreactor.default_poller import current_poller
from trioreactor.event_loop import EventLoop
from trioreactor.exception_groups import unwrapped
from trioreactor.limits import ConnectionLimiter
from trioreactor.loop_watchdog import LoopWatchdog
from trioreactor.poller import Poller
from trioreactor.server_connections import ServerConnections, Service
from trioreactor.state import CloseReason, ConnectionState
from trioreactor.tcp_connection import TcpConnection

T = TypeVar("T")
Args = TypeVarTuple("Args")


class LoopPool(Protocol):
    """What a server asks of several loops: `EventLoopThreadPool` has it."""

    @property
    def loops(self) -> Sequence[EventLoop]:
        """All of them. `RuntimeError` if they do not run."""
        ...

    def take_loop(self, peer: SocketAddress) -> EventLoop:
        """The loop for a connection from *peer*."""
        ...

    def give_back(self, loop: EventLoop) -> None:
        """A connection for which `take_loop` gave *loop* has ended."""
        ...

    async def run(self, loop: EventLoop, fn: Callable[[*Args], Awaitable[T]], *args: *Args) -> T:
        """Run an async function in *loop*; its result, or its error; cancellation is carried."""
        ...


class LoopShare(ServerConnections):
    """Those of a server's connections that live in one loop. Other threads look by its lock."""

    def __init__(
        self,
        service: Service,
        loop: EventLoop,
        home: EventLoop,
        left: Callable[[LoopShare, SocketAddress], object],
    ) -> None:
        super().__init__(service, self._leave)
        self.loop = loop
        self.watchdog = None if service.watchdog is None else LoopWatchdog(service.watchdog)
        # How many were handed over and have not left, as the accept loop knows: it alone counts.
        self.present = 0
        # Where the server is, and what it is to be told there.
        self._home = home
        self._left = left
        # As a task of the server's has it.
        self._context = contextvars.copy_context()
        # The last one that had a channel of ours.
        self._poller: Poller | None = None
        # Nobody is let in any more.
        self._over = False
        # So that others see the living and the counters as they were at one moment. It can be taken
        # twice, for a signal handler may ask.
        self._lock = threading.RLock()

    # -- from any thread

    def totals(self) -> ConnectionTotals:
        """The counters, all of one moment."""
        with self._lock:
            return super().totals()

    def snapshot(self) -> dict[str, TcpConnection]:
        """The living by name, as they are now."""
        with self._lock:
            return dict(self._living)

    def tell(self, fn: Callable[[*Args], object], *args: *Args) -> bool:
        """Call *fn* in the loop soon. False if that is over."""
        try:
            self.loop.queue_in_loop(fn, *args)
        except trio.RunFinishedError:
            return False
        return True

    def hand_over(
        self, acceptor: Acceptor, sock: socket.socket, peer: SocketAddress, name: str
    ) -> None:
        """Let the loop serve what was accepted."""
        if not self.tell(self._admit_in_context, acceptor, sock, peer, name):
            self._turn_away(sock, peer)

    # -- in the loop

    async def serve(self, ready: Callable[[], object]) -> None:
        """Serve until all have ended and no more will come, or until cancelled."""
        try:
            if self.watchdog is not None:
                self.watchdog.start()
            with unwrapped():
                async with trio.open_nursery() as nursery:
                    await self.serve_in(nursery, own=True)
                    self._home.queue_in_loop(ready)
                    try:
                        await self.wait_ended()
                    finally:
                        # The nursery may close as soon as this has ended.
                        self._over = True
        finally:
            if self.watchdog is not None:
                self.watchdog.stop()
            self.forget_the_rest()
            if self._poller is not None:
                await self._poller.wait_stopped()  # noqa: ASYNC102 shielded

    def admit(
        self, acceptor: Acceptor, sock: socket.socket, peer: SocketAddress, name: str
    ) -> None:
        """Serve what was handed over, or close it if it comes too late."""
        if self._over:
            self._turn_away(sock, peer)
            return
        self._poller = current_poller()
        super().admit(acceptor, sock, peer, name)

    def _admit_in_context(
        self, acceptor: Acceptor, sock: socket.socket, peer: SocketAddress, name: str
    ) -> None:
        self._context.run(self.admit, acceptor, sock, peer, name)

    def _turn_away(self, sock: socket.socket, peer: SocketAddress) -> None:
        sock.close()
        self._leave(self._service.entrant(peer))

    def _leave(self, peer: SocketAddress) -> None:
        self._home.queue_in_loop(self._left, self, peer)

    def _shed(self, acceptor: Acceptor, sock: socket.socket, error: OSError) -> None:
        sock.close()
        self._home.queue_in_loop(super()._shed, acceptor, sock, error)

    def _add(self, conn: TcpConnection) -> None:
        with self._lock:
            super()._add(conn)

    def _forget(self, conn: TcpConnection) -> None:
        with self._lock:
            super()._forget(conn)

    def force_close_into(self, names: list[str], reason: CloseReason) -> None:
        """Close all, and add their names to *names*."""
        names += self.force_close(reason)


class ServerLoops:
    """`ServerConnections` for several loops. Each connection is in one of them, from its first to
    its last moment; what is done to it is done there.
    """

    def __init__(self, service: Service, limiter: ConnectionLimiter, pool: LoopPool) -> None:
        self._service = service
        self._limiter = limiter
        self._pool = pool
        self._shares: dict[EventLoop, LoopShare] = {}
        # How many there are, those included that are on their way. The accept loop's.
        self._present = 0
        # No more will be handed over.
        self._ending = False
        # A loop has ended before its share of the server.
        self._lost = False
        # Whoever waits for the last one to end.
        self._empty = trio.lowlevel.ParkingLot()
        self.by_name: Mapping[str, TcpConnection] = _ByName(self._shares)

    def __len__(self) -> int:
        return len(self.by_name)

    async def serve_in(self, nursery: trio.Nursery, *, own: bool) -> None:  # noqa: ASYNC910 there is a loop
        """Serve in every loop, in tasks that *nursery* owns, and be ready for connections."""
        if not own:
            raise TypeError("TcpServer: handler_nursery belongs to one loop; pass it or loops")
        home = EventLoop.current()
        for loop in self._pool.loops:
            share = LoopShare(self._service, loop, home, self._left)
            await nursery.start(self._serve_share, share)
            self._shares[loop] = share
            if self._ending:
                share.tell(share.stop_entering)

    async def _serve_share(self, share: LoopShare, *, task_status: trio.TaskStatus[None]) -> None:  # noqa: ASYNC910 a task of its own
        try:
            await self._pool.run(share.loop, share.serve, task_status.started)
        except trio.RunFinishedError:
            # Loops end together, and one of them is enough to say so.
            if not self._lost:
                self._lost = True
                raise
        finally:
            # Not zero only if the loop has crashed: nobody will tell.
            self._count(share, -share.present)

    def admit(
        self, acceptor: Acceptor, sock: socket.socket, peer: SocketAddress, name: str
    ) -> None:
        """Hand what was accepted, which has a permit, to a loop."""
        share = self._shares[self._pool.take_loop(peer)]
        self._count(share, 1)
        share.hand_over(acceptor, sock, peer, name)

    def _left(self, share: LoopShare, peer: SocketAddress) -> None:
        """One of *share* has ended."""
        self._limiter.leave(peer)
        self._pool.give_back(share.loop)
        self._count(share, -1)

    def _count(self, share: LoopShare, change: int) -> None:
        share.present += change
        self._present += change
        if not self._present and self._empty:
            self._empty.unpark_all()

    def totals(self) -> ConnectionTotals:
        """The counters over all loops. Those of each loop are of one moment."""
        return sum_of_totals([share.totals() for share in self._all()])

    def watchdogs(self) -> list[LoopWatchdog]:
        """Those of the loops, if they are watched."""
        return [share.watchdog for share in self._all() if share.watchdog is not None]

    def broadcast(self, message: bytes, to: Iterable[TcpConnection] | None) -> int:
        """Send in every loop: at once in the caller's, soon in the others, in the order in which
        this is called. How many took it here, and how many there are elsewhere.
        """
        sent = 0
        for share, conns in self._parts(to):
            if share.loop.in_loop:
                sent += share.broadcast(message, conns)
            elif share.tell(share.broadcast, message, conns):
                sent += len(share) if conns is None else len(conns)
        return sent

    def _parts(
        self, to: Iterable[TcpConnection] | None
    ) -> list[tuple[LoopShare, list[TcpConnection] | None]]:
        if to is None:
            return [(share, None) for share in self._all()]
        conns_of: dict[LoopShare, list[TcpConnection]] = {}
        for conn in to:
            share = self._shares.get(conn.loop)
            if share is not None and conn.state is ConnectionState.CONNECTED:
                conns_of.setdefault(share, []).append(conn)
        return list(conns_of.items())

    def start_draining(self) -> int:
        """Tell each that it is to finish; how many there are."""
        for share in self._all():
            share.tell(share.start_draining)
        return self._present

    def force_close(self, reason: CloseReason) -> list[str]:
        """Close all; a list that gets their names when it is done."""
        names: list[str] = []
        for share in self._all():
            share.tell(share.force_close_into, names, reason)
        return names

    def stop_entering(self) -> None:
        """No more will come, but those that are on their way. Idempotent."""
        self._ending = True
        for share in self._all():
            share.tell(share.stop_entering)

    def forget_the_rest(self) -> None:
        """Each share does, in its loop."""

    async def wait_empty(self) -> None:
        """Wait until none is left, nor on its way."""
        await trio.lowlevel.checkpoint()
        while self._present:
            await self._empty.park()

    def _all(self) -> list[LoopShare]:
        # Shares are only ever added.
        return list(self._shares.values())


class _ByName(Mapping[str, "TcpConnection"]):
    """The connections of all loops. What iterates goes over a copy, for they come and go."""

    def __init__(self, shares: Mapping[EventLoop, LoopShare]) -> None:
        self._shares = shares

    def __getitem__(self, name: str) -> TcpConnection:
        for share in list(self._shares.values()):
            conn = share.by_name.get(name)
            if conn is not None:
                return conn
        raise KeyError(name)

    def __len__(self) -> int:
        return sum(map(len, list(self._shares.values())))

    def __iter__(self) -> Iterator[str]:
        return iter(self._copy())

    def values(self) -> ValuesView[TcpConnection]:
        """A copy's."""
        return self._copy().values()

    def items(self) -> ItemsView[str, TcpConnection]:
        """A copy's."""
        return self._copy().items()

    def __repr__(self) -> str:
        return repr(self._copy())

    def _copy(self) -> dict[str, TcpConnection]:
        copy: dict[str, TcpConnection] = {}
        for share in list(self._shares.values()):
            copy |= share.snapshot()
        return copy
