"""Serving until the system's signals end it: one server in this process, or several in workers."""

from __future__ import annotations

import logging
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

import trio

from trioreactor.acceptor import Acceptor
from trioreactor.address import SocketAddress
from trioreactor.ending_server import end_gracefully
from trioreactor.exception_groups import unwrapped
from trioreactor.inspector import describe_statistics, log_everything
from trioreactor.options import SocketOptions, check_seconds
from trioreactor.serve_options import ServeOptions
from trioreactor.service_notifier import ServiceNotifier
from trioreactor.tcp_server import TcpServer
from trioreactor.worker_options import UNWIND, WorkerOptions
from trioreactor.workers import Supervisor

logger = logging.getLogger("trioreactor.signals")

# What is heeded, of what this platform has.
_HEEDED = [
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
    if hasattr(signal, name)
]

# Seconds in which a process ends after a second signal, whatever its handlers do.
_AT_ONCE = 0.5

Deadline = Callable[[float, int], object]
"""``deadline(seconds, code)``: so many seconds from now this process must have ended, or be ended
with this exit code."""


async def serve_until_signalled(
    server: TcpServer,
    *,
    grace: float = WorkerOptions().grace,
    notifier: ServiceNotifier | None = None,
    deadline: Deadline | None = None,
    task_status: trio.TaskStatus[list[Acceptor]] = trio.TASK_STATUS_IGNORED,
) -> int:
    """Serve in this process until SIGTERM or SIGINT, drain within *grace* seconds, and return the
    exit code: 0.

    A second one of them closes everything at once, and the exit code is 128 and its number. SIGUSR1
    writes every connection and task to the log. SIGHUP does nothing, for here are no workers to
    replace. Reports the acceptors once the server listens.

    *notifier* tells the service manager (None: one made here, which has somebody to tell only under
    systemd). A handler that does not end though it is cancelled holds the end up for ever, unless
    *deadline* sees to that: it is called at each signal with the seconds that are left, and the
    exit code. Raises what `TcpServer.serve` raises. In the main thread only.
    """
    check_seconds("serve_until_signalled", "grace", grace, zero=True, off=False)
    notifier = ServiceNotifier() if notifier is None else notifier
    served = _OneServer(server, grace)
    return await _Signalled(served, notifier, deadline).run(task_status)


async def run_workers(
    target: str,
    bind: str | Sequence[str],
    *,
    workers: int,
    options: ServeOptions = ServeOptions(),
    worker_options: WorkerOptions = WorkerOptions(),
    socket_options: SocketOptions = SocketOptions(),
    reload: bool = False,
    notifier: ServiceNotifier | None = None,
    task_status: trio.TaskStatus[list[SocketAddress]] = trio.TASK_STATUS_IGNORED,
) -> int:
    """Run a `Supervisor` until SIGTERM or SIGINT, drain its workers, and return the exit code: 0.

    A second one of them kills the workers at once, and the exit code is 128 and its number. SIGHUP
    replaces the workers one by one, SIGUSR1 has each write its connections and tasks to the log,
    and writes the statistics of all there. Reports the addresses once every worker accepts.

    *notifier* as in `serve_until_signalled`; no worker inherits it. The other arguments, and the
    errors, are those of `Supervisor`. In the main thread only.
    """
    supervisor = Supervisor(
        target,
        bind,
        workers=workers,
        options=options,
        worker_options=worker_options,
        socket_options=socket_options,
        reload=reload,
    )
    notifier = ServiceNotifier(unset_environment=True) if notifier is None else notifier
    served = _Workers(supervisor, worker_options.grace, notifier)
    return await _Signalled(served, notifier, None).run(task_status)


class _Served(Protocol):
    """What signals are about."""

    grace: float

    async def serve(self, *, task_status: trio.TaskStatus[Any]) -> None: ...

    async def drain(self) -> None: ...

    def close(self) -> None: ...

    async def dump(self) -> None: ...

    async def replace(self) -> None: ...


class _OneServer:
    """A server in this process."""

    def __init__(self, server: TcpServer, grace: float) -> None:
        self.grace = grace
        self._server = server
        self.serve = server.serve
        self.close = server.close

    async def drain(self) -> None:
        await end_gracefully(self._server, self.grace)

    async def dump(self) -> None:
        await log_everything([self._server])

    async def replace(self) -> None:
        logger.warning("SIGHUP: there are no worker processes here that could be replaced")
        await trio.lowlevel.checkpoint()


class _Workers:
    """A supervisor and its workers."""

    def __init__(self, supervisor: Supervisor, grace: float, notifier: ServiceNotifier) -> None:
        self.grace = grace
        self._supervisor = supervisor
        self._notifier = notifier
        self.serve = supervisor.serve
        self.close = supervisor.close

    async def drain(self) -> None:
        await self._supervisor.drain()

    async def dump(self) -> None:
        self._supervisor.dump()
        counted = await self._supervisor.statistics()
        logger.info("all workers: %s", describe_statistics(counted.total))
        logger.info(
            "%d processes started, %d died, %d of them hung, %d replaced",
            counted.started,
            counted.died,
            counted.hung,
            counted.replaced,
        )

    async def replace(self) -> None:
        self._notifier.reloading()
        await self._supervisor.replace()
        self._notifier.ready()


class _Signalled:
    """One run of what is served, from its start to what the signals make of it."""

    def __init__(
        self, served: _Served, notifier: ServiceNotifier, deadline: Deadline | None
    ) -> None:
        self._served = served
        self._notifier = notifier
        self._deadline = deadline
        self._code = 0
        # Set when it serves.
        self._serves = trio.Event()
        # Of the drain, if there is one.
        self._drained: trio.Event | None = None

    async def run(self, task_status: trio.TaskStatus[Any]) -> int:
        # Signals come first, so that whoever knows that it has started can send one.
        with trio.open_signal_receiver(*_HEEDED) as signals, unwrapped():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._heed, signals, nursery)
                with unwrapped():
                    async with trio.open_nursery() as serving:
                        started = await serving.start(self._served.serve)
                        self._notifier.ready()
                        self._serves.set()
                        nursery.start_soon(self._notifier.keep_watchdog)
                        task_status.started(started)
                if self._drained is not None:
                    # The last connection may have gone before the drain has looked again.
                    await self._drained.wait()
                # With a dump or a replacement that is under way.
                nursery.cancel_scope.cancel()
        return self._code

    async def _heed(self, signals: AsyncIterator[int], nursery: trio.Nursery) -> None:
        async for number in signals:
            name = signal.Signals(number).name
            if name == "SIGUSR1":
                nursery.start_soon(self._served.dump)
            elif name == "SIGHUP":
                if self._drained is None:
                    nursery.start_soon(self._replace)
            elif self._drained is None:
                self._drained = trio.Event()
                grace = self._served.grace
                logger.info("%s: draining, at most %g s; once more ends at once", name, grace)
                self._notifier.stopping()
                self._must_end(grace + UNWIND, 1)
                nursery.start_soon(self._drain, self._drained)
            else:
                logger.warning("%s: ending at once", name)
                self._code = 128 + number
                self._must_end(_AT_ONCE, self._code)
                self._served.close()

    async def _replace(self) -> None:
        # Those that are only just being started may have read what was there before.
        await self._serves.wait()
        await self._served.replace()

    async def _drain(self, drained: trio.Event) -> None:
        await self._served.drain()
        drained.set()

    def _must_end(self, seconds: float, code: int) -> None:
        if self._deadline is not None:
            self._deadline(seconds, code)
