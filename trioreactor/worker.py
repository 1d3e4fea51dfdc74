"""A worker process, from inside: ``python -m trioreactor.worker DESCRIPTOR TARGET``.

Started by a supervisor, which it obeys over the socket pair at DESCRIPTOR: see `worker_link`.
TARGET is there for whoever looks at the list of processes.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress

import trio

from trioreactor.acceptor import Acceptor
from trioreactor.ending_server import end_gracefully
from trioreactor.exception_groups import unwrapped
from trioreactor.framed import FramedChannel
from trioreactor.inspector import log_everything
from trioreactor.options import SocketOptions
from trioreactor.serve_logging import set_up_logging
from trioreactor.serve_options import ServeOptions
from trioreactor.server_target import TargetError, check_listens, open_server
from trioreactor.source_watch import source_directories
from trioreactor.statistics_totals import as_plain
from trioreactor.tcp_server import TcpServer
from trioreactor.worker_link import (
    Begin,
    Count,
    Counted,
    Drain,
    Dump,
    Failed,
    Leaving,
    Message,
    Ping,
    Pong,
    Ready,
    open_link,
    socket_options_from,
)
from trioreactor.worker_options import UNWIND

logger = logging.getLogger("trioreactor.worker")


class _Worker:
    """One worker, from its first message to its last."""

    def __init__(
        self, link: FramedChannel[Message], guard: _OrphanGuard, nursery: trio.Nursery
    ) -> None:
        self._link = link
        self._guard = guard
        # Runs what ends with the worker.
        self._nursery = nursery
        self._server: TcpServer
        # Of the drain, if there is one.
        self._drained: trio.Event | None = None

    async def run(self, signals: AsyncIterator[int]) -> int:
        """Serve what the supervisor says; the exit code."""
        try:
            begin = await self._link.receive()
        except (trio.EndOfChannel, trio.BrokenResourceError):
            # The supervisor has ended before it could say anything.
            return 1  # noqa: ASYNC910 it has waited
        assert isinstance(begin, Begin)
        self._guard.grace = begin.grace
        sys.path[:] = begin.path
        options = ServeOptions(**begin.options)
        if options.log_level is not None:
            set_up_logging(options.log_level)
        acceptors = _acceptors_on(begin.listeners, socket_options_from(begin.socket_options))
        try:
            async with open_server(begin.target, acceptors, options) as self._server:
                await self._serve(signals, begin.target, acceptors)
        except TargetError as error:
            await self._link.send(Failed(reason=str(error), details=error.details))
            return 1
        except OSError as error:
            # The server could not listen, or its socket failed.
            await self._link.send(Failed(reason=f"cannot serve: {error}", details=""))
            return 1
        finally:
            for acceptor in acceptors:
                acceptor.close()
        return 0

    async def _serve(
        self, signals: AsyncIterator[int], target: str, acceptors: Sequence[Acceptor]
    ) -> None:
        with unwrapped():
            async with trio.open_nursery() as nursery:
                serving = await nursery.start(self._server.serve)
                check_listens(target, self._server, acceptors, serving)
                await self._link.send(Ready(sources=source_directories(target)))
                self._nursery.start_soon(self._obey)
                self._nursery.start_soon(self._heed, signals)
        # The server has ended. Its last connection may have gone before the drain has looked again.
        if self._drained is not None:
            await self._drained.wait()
        self._tell_counts()

    async def _obey(self) -> None:  # noqa: ASYNC910 a task of its own
        try:
            async for message in self._link:
                self._do(message)
        except trio.BrokenResourceError:
            pass
        if self._drained is None:
            logger.warning("the supervisor is gone: draining")
            self._drain(self._guard.grace, take_waiting=True)

    def _do(self, message: Message) -> None:
        match message:
            case Ping():
                self._nursery.start_soon(self._pong)
            case Count():
                self._tell_counts()
            case Dump():
                self._nursery.start_soon(log_everything, [self._server])
            case Drain(grace=grace, take_waiting=take_waiting):
                self._drain(grace, take_waiting=take_waiting)
            case _:
                raise AssertionError(f"a worker is not told {message!r}")

    async def _pong(self) -> None:
        # Not before each of its loops has turned: one that hangs serves nobody.
        pool = self._server.loops
        if pool is not None:
            # They end with the server.
            with suppress(RuntimeError):
                for loop in pool.loops:
                    await pool.run(loop, trio.lowlevel.checkpoint)
        self._say(Pong())
        await trio.lowlevel.checkpoint()

    async def _heed(self, signals: AsyncIterator[int]) -> None:
        asked = False
        async for number in signals:
            if number == signal.SIGUSR1:
                self._nursery.start_soon(log_everything, [self._server])
            elif number == signal.SIGHUP:
                # A wish to be replaced, as by the supervisor's own. Said twice it is one.
                self._say(Leaving())
            elif not asked:
                # It may be the supervisor's turn, too (systemd signals them all): so it decides.
                asked = True
                self._say(Leaving())
            else:
                logger.warning("a second %s: ending at once", signal.Signals(number).name)
                self._server.close()

    def _drain(self, grace: float, *, take_waiting: bool) -> None:
        if self._drained is None:
            self._drained = trio.Event()
            self._nursery.start_soon(self._end, grace, take_waiting, self._drained)

    async def _end(self, grace: float, take_waiting: bool, drained: trio.Event) -> None:
        await end_gracefully(self._server, grace, take_waiting=take_waiting)
        drained.set()

    def _tell_counts(self) -> None:
        self._say(Counted(statistics=as_plain(self._server.statistics())))

    def _say(self, message: Message) -> None:
        # If the supervisor is gone, `_obey` sees it.
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            self._link.send_nowait(message)


def _acceptors_on(descriptors: Sequence[int], options: SocketOptions) -> list[Acceptor]:
    acceptors: list[Acceptor] = []
    for descriptor in descriptors:
        sock = socket.socket(fileno=descriptor)
        # Whatever this process starts has no part in it.
        sock.set_inheritable(False)
        acceptors.append(Acceptor(sock, socket_options=options))
    return acceptors


class _OrphanGuard:
    """Ends this process if its supervisor has ended and it has not, though its loop may hang."""

    def __init__(self, sock: socket.socket) -> None:
        self.grace = 0.0
        """What the worker has for its drain, seconds."""
        # Of its own: the link closes the other.
        self._descriptor = os.dup(sock.fileno())
        threading.Thread(target=self._watch, name="orphan-guard", daemon=True).start()

    def _watch(self) -> None:
        poll = select.poll()
        # A hang-up is told, whatever else is asked for.
        poll.register(self._descriptor, 0)
        poll.poll()
        # As long as a supervisor waits.
        time.sleep(self.grace + UNWIND)
        os._exit(1)


async def _run(sock: socket.socket) -> int:
    guard = _OrphanGuard(sock)
    link = open_link(sock, "supervisor")
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1) as signals:
        async with link, trio.open_nursery() as nursery:
            code = await _Worker(link, guard, nursery).run(signals)
            nursery.cancel_scope.cancel()
    return code


def main(arguments: Sequence[str]) -> int:
    """Be a worker; returns the exit code."""
    # Where it hangs, when the supervisor loses patience, and where it crashed.
    faulthandler.enable()
    # It is in no terminal's group of processes, so this would be meant for another.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sock = socket.socket(fileno=int(arguments[0]))
    # The link ends with this process, whatever it starts.
    sock.set_inheritable(False)
    return trio.run(_run, sock)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
