"""Supervisor: keeps N worker processes of one server running, on sockets that all have."""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import chain
from types import MappingProxyType

import trio

from trioreactor.acceptor import Acceptor
from trioreactor.address import SocketAddress
from trioreactor.backoff import Delays
from trioreactor.errors import WorkerStartError
from trioreactor.exception_groups import unwrapped
from trioreactor.inspector import describe_statistics
from trioreactor.listen import open_acceptors, open_sharing
from trioreactor.options import SocketOptions, check_count
from trioreactor.serve_options import ServeOptions
from trioreactor.server_target import parse_target
from trioreactor.sockets import is_tcp
from trioreactor.source_watch import SourceWatch
from trioreactor.statistics_totals import NOTHING, after_death, total
from trioreactor.supervisor_statistics import SupervisorStatistics
from trioreactor.worker_link import Begin
from trioreactor.worker_options import WorkerOptions
from trioreactor.worker_process import WorkerProcess

logger = logging.getLogger("trioreactor.workers")

# How often the source files are looked at, seconds: at once, for a person.
_LOOK = 0.5


class _Slot:
    """A place for a worker: who has it now, and how often it has failed."""

    def __init__(self, number: int, listeners: Sequence[Acceptor], delays: Delays) -> None:
        self.number = number
        self.listeners = listeners
        self.delays = delays
        self.worker: WorkerProcess


class Supervisor:
    """Runs *workers* processes that serve *target* on the addresses in *bind*.

    *target* is ``"module:attribute"``, imported in each worker: a handler (an async function),
    `Callbacks`, or a function that is called with keyword arguments and returns a `TcpServer` made
    with them, or an async context manager that gives one. *bind* is written as for
    `open_acceptors`. *options* is what each of the servers is told besides, *worker_options* how
    workers are treated.

    The supervisor opens the listening sockets and each worker inherits them, so a worker that ends
    takes no waiting client with it. A worker that ends is started again, and so is one whose loop
    does not turn: both after a delay. Workers are new interpreters, never forks.
    With *reload* the files that a worker was imported from are watched, and when one changes, all
    workers are replaced.

    What is said of one server holds in each process: N workers hold N times `Limits.connections`.
    Needs POSIX.
    """

    def __init__(
        self,
        target: str,
        bind: str | Sequence[str],
        *,
        workers: int,
        options: ServeOptions = ServeOptions(),
        worker_options: WorkerOptions = WorkerOptions(),
        socket_options: SocketOptions = SocketOptions(),
        reload: bool = False,
    ) -> None:
        if sys.platform == "win32":
            raise RuntimeError("Supervisor: worker processes need POSIX; serve in one process here")
        parse_target(target)
        check_count("Supervisor", "workers", workers, least=1, unit="processes")
        for name, value, kind in (
            ("options", options, ServeOptions),
            ("worker_options", worker_options, WorkerOptions),
            ("socket_options", socket_options, SocketOptions),
        ):
            if not isinstance(value, kind):
                raise TypeError(f"Supervisor({name}={value!r}): pass {kind.__name__}(...)")
        self.target = target
        self._bind = [bind] if isinstance(bind, str) else list(bind)
        self._workers = workers
        self._options = options
        self._worker_options = worker_options
        self._socket_options = socket_options
        self._reload = reload
        self._acceptors: list[Acceptor] = []
        self._slots: list[_Slot] = []
        # Every process that has not ended, those that drain too.
        self._living: list[WorkerProcess] = []
        self._nursery: trio.Nursery
        # Around all of `serve`.
        self._scope = trio.CancelScope()
        self._started = False
        # drain or close was called: nobody is started any more.
        self._ending = False
        self._one_by_one = trio.Lock()
        # Rounds of replacement: asked for, begun, and how the last one went.
        self._round = trio.Lock()
        self._asked = self._begun = 0
        self._succeeded = True
        self._past = NOTHING
        self._counts = {"started": 0, "died": 0, "hung": 0, "replaced": 0}

    def __repr__(self) -> str:
        return f"<Supervisor of {self._workers} workers of {self.target}>"

    @property
    def addresses(self) -> list[SocketAddress]:
        """Where the workers listen; empty before and after."""
        # Those of one port are one address.
        return list(dict.fromkeys(acceptor.address for acceptor in self._acceptors))

    @property
    def pids(self) -> list[int]:
        """The process numbers of those that serve now, in the workers' order; not of those that
        are being started or drain.
        """
        living = [slot.worker for slot in self._slots]
        return [w.pid for w in living if w.pid is not None and w.ready and not w.ended.is_set()]

    async def statistics(self) -> SupervisorStatistics:
        """Ask each worker for its counters, and add them up.

        A worker that does not answer within two seconds counts with what it has said before.
        """
        asked = [worker for worker in self._living if worker.pid is not None]
        async with trio.open_nursery() as nursery:
            for worker in asked:
                nursery.start_soon(worker.count)
        now = {w.pid: w.counted for w in self._living if w.pid is not None}
        return SupervisorStatistics(
            total=total([self._past, *now.values()]),
            workers=MappingProxyType(now),
            **self._counts,
        )

    # -- serving

    async def serve(
        self, *, task_status: trio.TaskStatus[list[SocketAddress]] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Run the workers until drained, closed or cancelled, which kills them.

        Reports the addresses once every worker accepts. Raises `OSError` if an address cannot be
        listened on, and `WorkerStartError` if one of the first workers does not get ready; later
        ones are tried again and again.
        """
        if self._started:
            raise RuntimeError("this supervisor has served already: make another Supervisor")
        self._started = True
        reported = False
        try:
            with self._scope, unwrapped():
                await self._open()
                async with trio.open_nursery() as self._nursery:
                    await self._start_all()
                    task_status.started(self.addresses)
                    reported = True
        finally:
            self._ending = True
            self._close_sockets()
        logger.info("all workers: %s", describe_statistics(self._past))
        if not reported:
            # It was ended before they were ready.
            task_status.started([])
        await trio.lowlevel.checkpoint()

    async def _open(self) -> None:
        reuse = self._worker_options.reuse_port
        options = replace(self._socket_options, reuse_port=reuse or self._socket_options.reuse_port)
        first = await open_acceptors(*self._bind, socket_options=options)
        self._acceptors += first
        for number in range(1, self._workers + 1):
            listeners = list(first)
            if reuse and number > 1:
                # Descriptors and Unix sockets are one for all, as ever.
                mine = [
                    open_sharing(acceptor, options) if self._may_share(acceptor) else acceptor
                    for acceptor in first
                ]
                self._acceptors += [acceptor for acceptor in mine if acceptor not in first]
                listeners = mine
            delays = Delays(self._worker_options.backoff)
            self._slots.append(_Slot(number, listeners, delays))

    @staticmethod
    def _may_share(acceptor: Acceptor) -> bool:
        sock = acceptor.socket
        return is_tcp(sock) and bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT))

    def _close_sockets(self) -> None:
        for acceptor in self._acceptors:
            acceptor.close()
        self._acceptors.clear()

    async def _start_all(self) -> None:  # noqa: ASYNC910 serve has checkpoints
        for slot in self._slots:
            slot.worker = self._launch(slot)
        first = [slot.worker for slot in self._slots]
        for worker in first:
            await worker.started.wait()
            if self._ending:
                return
            if not worker.ready:
                raise _start_error(worker)
        for slot, worker in zip(self._slots, first, strict=True):
            self._nursery.start_soon(self._keep, slot, worker)
        if self._reload:
            watch = SourceWatch()
            watch.add(self._sources())
            self._nursery.start_soon(self._watch_sources, watch)

    def _launch(self, slot: _Slot) -> WorkerProcess:
        """Start a process for *slot*; it is not its worker yet."""
        begin = Begin(
            target=self.target,
            options=self._options.as_plain(),
            listeners=[acceptor.socket.fileno() for acceptor in slot.listeners],
            socket_options=asdict(self._socket_options),
            grace=self._worker_options.grace,
            # What else is in there (a Path, by mistake) the import system passes over, too.
            path=[entry for entry in sys.path if isinstance(entry, str)],
        )
        worker = WorkerProcess(begin, self._worker_options, slot.number)
        worker.on_leaving = self._on_leaving
        self._counts["started"] += 1
        self._living.append(worker)
        self._nursery.start_soon(self._run, worker)
        return worker

    async def _run(self, worker: WorkerProcess) -> None:
        try:
            await worker.run()
        finally:
            self._living.remove(worker)
            self._past = total([self._past, after_death(worker.counted)])
        if worker.draining:
            logger.info("%r has drained: it %s", worker, worker.end)

    async def _keep(self, slot: _Slot, worker: WorkerProcess) -> None:
        """When *worker* has ended and is the slot's still, start another, and keep that."""
        while True:
            await worker.ended.wait()
            if slot.worker is not worker or self._ending:
                # It has a successor, which has such a task of its own; or it was meant to end.
                return
            self._counts["died"] += 1
            self._counts["hung"] += worker.hung
            if worker.served >= slot.delays.reset_after:
                slot.delays.restart()
            delay = slot.delays.next()
            assert delay is not None
            logger.error(
                "%r %s, %s; starting another in %.2f s",
                worker,
                worker.end,
                f"after {worker.served:.1f} s" if worker.ready else _why(worker),
                delay,
            )
            await trio.sleep(delay)
            if slot.worker is not worker or self._ending:
                return
            slot.worker = worker = self._launch(slot)

    # -- replacing

    async def replace(self) -> bool:
        """Replace the workers one by one, as SIGHUP does: each is told to drain when a new one, of
        the program as it is now, accepts in its place. The drains are not waited for.

        False if a new one does not get ready: that is logged, and the rest stays as it is.
        Cancelling leaves off between two. Who asks while others are being replaced waits for
        another round, and all who do share it.
        """
        self._asked = mine = self._asked + 1
        async with self._round:
            if self._begun < mine:
                self._begun = self._asked
                logger.info("replacing %d workers, one by one", len(self._slots))
                self._succeeded = await self._replace_all()
            return self._succeeded

    async def _replace_all(self) -> bool:
        for slot in self._slots:
            if not await self._replace(slot, slot.worker):
                return False
        await trio.lowlevel.checkpoint()
        return True

    async def _replace(self, slot: _Slot, old: WorkerProcess) -> bool:
        async with self._one_by_one:
            if self._ending or slot.worker is not old:
                return True
            new = self._launch(slot)
            try:
                await new.started.wait()
            except trio.Cancelled:
                new.kill()
                raise
            if self._ending:
                return False
            if not new.ready:
                logger.error("%r %s: %r serves on", new, _why(new), slot.worker)
                return False
            # Not `old`: that may have ended, and been started again, meanwhile.
            previous, slot.worker = slot.worker, new
            self._nursery.start_soon(self._keep, slot, new)
            logger.info("%r takes the place of %r", new, previous)
            self._counts["replaced"] += 1
            previous.drain(self._worker_options.grace, take_waiting=False)
            return True

    def _on_leaving(self, worker: WorkerProcess) -> None:
        for slot in self._slots:
            if slot.worker is worker and not self._ending:
                logger.info("%r was asked to end: replacing it", worker)
                self._nursery.start_soon(self._replace, slot, worker)

    def _sources(self) -> set[str]:
        return set(chain.from_iterable(slot.worker.sources for slot in self._slots))

    async def _watch_sources(self, watch: SourceWatch) -> None:  # noqa: ASYNC910 a task of its own
        while not self._ending:
            watch.add(self._sources())
            await trio.sleep(_LOOK)
            changed = watch.changed()
            if changed:
                logger.info("changed: %s", ", ".join(changed))
                await self.replace()

    # -- the end

    def dump(self) -> None:
        """Have every worker write its connections and tasks to the log, as SIGUSR1 does."""
        for worker in self._living:
            logger.info("%r: %s", worker, "drains" if worker.draining else "serves")
            worker.dump()

    async def drain(self, grace: float | None = None) -> None:
        """Stop listening, have every worker drain within *grace* seconds (None: that of the
        options), and wait for their end; `serve` returns then.

        A worker that has not ended five seconds later is killed. Cancelling leaves them draining.
        """
        seconds = self._worker_options.grace if grace is None else grace
        self._ending = True
        # Before any of them: so the last one that stops listening takes all who wait.
        self._close_sockets()
        for worker in list(self._living):
            worker.drain(seconds, take_waiting=True)
        for worker in list(self._living):
            await worker.ended.wait()
        self._scope.cancel()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """Kill every worker at once; `serve` returns then. Idempotent."""
        self._ending = True
        self._close_sockets()
        for worker in list(self._living):
            worker.kill()
        self._scope.cancel()


def _why(worker: WorkerProcess) -> str:
    """Why it did not get ready."""
    return worker.failed.reason if worker.failed is not None else "before it was ready"


def _start_error(worker: WorkerProcess) -> WorkerStartError:
    if worker.failed is not None:
        return WorkerStartError(worker.failed.reason, worker.failed.details)
    return WorkerStartError(f"the worker {worker.end} before it was ready", "")
