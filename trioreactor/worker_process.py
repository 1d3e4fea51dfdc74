"""WorkerProcess: one worker process, as its supervisor sees it."""

from __future__ import annotations

import errno
import logging
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import trio

from trioreactor.errors import ProtocolError
from trioreactor.framed import FramedChannel
from trioreactor.server_statistics import ServerStatistics
from trioreactor.statistics_totals import NOTHING, from_plain
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
)
from trioreactor.worker_options import UNWIND, WorkerOptions

logger = logging.getLogger("trioreactor.workers")

# Seconds between two pings: a hung worker is found this much after its time at the most.
PING_INTERVAL = 1.0

# How long a worker that hangs may take to write where, seconds.
_LAST_WORDS = 2.0

# How long the last words of a process that has ended may be on their way, seconds: if somebody
# else holds its end of the link, that end does not come.
_STRAGGLING = 1.0

# How long a worker may take to answer what it has counted, seconds.
_COUNT_PATIENCE = 2.0


class WorkerProcess:
    """One worker process. `run` is its whole life; the rest may be called at any time of it."""

    def __init__(self, begin: Begin, options: WorkerOptions, number: int) -> None:
        self.number = number
        """Which of the workers it is, from 1 on; a successor has the same."""
        self.ready = False
        """It accepts, or did before it was told to drain."""
        self.draining = False
        self.failed: Failed | None = None
        """Why it could not begin, if it has said so."""
        self.sources: Sequence[str] = ()
        """Directories that its program was imported from."""
        self.counted: ServerStatistics = NOTHING
        """What it has said last that it counted."""
        self.hung = False
        """It was ended because it did not answer."""
        self.started = trio.Event()
        """Set when it is ready, and when it never will be."""
        self.ended = trio.Event()
        self.on_leaving: Callable[[WorkerProcess], object] | None = None
        """Called when somebody asks the process to end."""
        self._begin = begin
        self._options = options
        self._process: trio.Process | None = None
        self._link: FramedChannel[Message] | None = None
        # It answered the last ping, or has not been asked.
        self._answered = True
        # How often it was asked for its counters, and has told them: each answer is to the first
        # question that has none.
        self._asked = self._told = 0
        self._told_more = trio.lowlevel.ParkingLot()
        # Of the process: it is to be killed as soon as it is there.
        self._killed = False
        self._nursery: trio.Nursery
        self._spawned_at = trio.current_time()
        self._ready_at: float | None = None
        self._ended_at = 0.0

    def __repr__(self) -> str:
        return f"worker {self.number} (pid {self.pid})"

    @property
    def pid(self) -> int | None:
        """The process's number; None before it has one."""
        return None if self._process is None else self._process.pid

    @property
    def served(self) -> float:
        """Seconds from when it was ready to its end."""
        return 0.0 if self._ready_at is None else self._ended_at - self._ready_at

    @property
    def end(self) -> str:
        """How it has ended, for the log."""
        code = None if self._process is None else self._process.returncode
        if code is None:
            how = "could not be started"
        elif code < 0:
            with suppress(ValueError):
                return f"was ended by {signal.Signals(-code).name}"
            how = f"was ended by signal {-code}"
        else:
            how = f"ended with exit code {code}"
        return how

    async def run(self) -> None:  # noqa: ASYNC910 a task of its own
        """Start the process and see to its end. Cancelling kills it. Never raises otherwise."""
        try:
            ours, theirs = socket.socketpair()
            try:
                with theirs:
                    self._process = await self._spawn(theirs.fileno())
            except BaseException:
                ours.close()
                raise
            await self._accompany(self._process, open_link(ours, repr(self)))
        except OSError as error:
            self.failed = Failed(reason=f"cannot start a process: {error}", details="")
        finally:
            process = self._process
            if process is not None and process.returncode is None:
                process.kill()
                with trio.CancelScope(shield=True):
                    await process.wait()
            self._ended_at = trio.current_time()
            self.ended.set()
            self.started.set()
            self._told_more.unpark_all()

    async def _spawn(self, link: int) -> trio.Process:
        command = [
            sys.executable,
            *_interpreter_flags(),
            "-m",
            "trioreactor.worker",
            str(link),
            self._begin.target,
        ]
        try:
            # A session of its own: a Ctrl-C at the terminal is for the supervisor.
            return await trio.lowlevel.open_process(
                command, pass_fds=(link, *self._begin.listeners), start_new_session=True
            )
        except RuntimeError as error:
            # Trio does it in a thread, and there is none to be had: with EAGAIN, as for a process.
            raise OSError(errno.EAGAIN, str(error)) from error

    async def _accompany(self, process: trio.Process, link: FramedChannel[Message]) -> None:
        self._link = link
        async with link, trio.open_nursery() as self._nursery:
            if self._killed:
                process.kill()
            # It may have ended already.
            self._say(self._begin)
            listened = trio.Event()
            self._nursery.start_soon(self._listen, link, listened)
            self._nursery.start_soon(self._wait_started)
            await process.wait()
            self._link = None
            with trio.move_on_after(_STRAGGLING):
                await listened.wait()
            self._nursery.cancel_scope.cancel()

    async def _listen(  # noqa: ASYNC910 a task of its own
        self, link: FramedChannel[Message], done: trio.Event
    ) -> None:
        # A process that was killed may leave half a message behind.
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError, ProtocolError):
            async for message in link:
                self._hear(message)
        done.set()

    def _hear(self, message: Message) -> None:
        match message:
            case Ready(sources=sources):
                self.ready = True
                self.sources = sources
                self._ready_at = trio.current_time()
                logger.info("%r is ready, after %.1f s", self, self._ready_at - self._spawned_at)
                self.started.set()
                self._nursery.start_soon(self._ping)
            case Pong():
                self._answered = True
            case Counted(statistics=statistics):
                self.counted = from_plain(statistics)
                self._told += 1
                self._told_more.unpark_all()
            case Leaving():
                if self.on_leaving is not None:
                    self.on_leaving(self)
            case Failed():
                self.failed = message
                self._nursery.start_soon(self._bound_end)
            case _:
                raise AssertionError(f"a supervisor is not told {message!r}")

    # -- what it is asked and told

    def _say(self, message: Message) -> None:
        # If it has gone, `run` sees that.
        if self._link is not None:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                self._link.send_nowait(message)

    def drain(self, grace: float, *, take_waiting: bool) -> None:
        """Tell it to drain and end; kill it if it has not some time after. Once more may only make
        that time shorter.

        One that is not ready is told so, too, and drains when it is: it may have accepted by now.
        """
        if self.ended.is_set():
            return
        if self._link is None:
            # Not even the process is there; or it is no more.
            self.draining = True
            self.kill()
            return
        if not self.draining:
            self.draining = True
            self._say(Drain(grace=grace, take_waiting=take_waiting))
        self._nursery.start_soon(self._bound_drain, grace)

    def dump(self) -> None:
        """Have it write its connections and tasks to the log."""
        self._say(Dump())

    def kill(self) -> None:
        """End it at once."""
        self._killed = True
        if self._process is not None:
            self._process.kill()

    async def count(self) -> ServerStatistics:
        """What it has counted; if it does not answer soon, what it said last."""
        await trio.lowlevel.checkpoint()
        if self.ready and not self.ended.is_set():
            self._asked = mine = self._asked + 1
            self._say(Count())
            with trio.move_on_after(_COUNT_PATIENCE):
                while self._told < mine and not self.ended.is_set():
                    await self._told_more.park()
        return self.counted

    # -- deadlines

    async def _wait_started(self) -> None:
        with trio.move_on_after(self._options.start_timeout):
            await self.started.wait()
        if not self.ready and not self.failed:
            seconds = self._options.start_timeout
            self.failed = Failed(reason=f"it was not ready after {seconds:g} s", details="")
            logger.error("%r was not ready after %g s: ending it", self, seconds)
            await self._abort()

    async def _bound_end(self) -> None:
        """Of one that has failed: what its program has started (a thread) may keep it."""
        await trio.sleep(UNWIND)
        self.kill()

    async def _bound_drain(self, grace: float) -> None:
        await trio.sleep(grace + UNWIND)
        logger.error("%r has not drained after %g s: killing it", self, grace + UNWIND)
        self.kill()

    async def _ping(self) -> None:  # noqa: ASYNC910 a task of its own
        """End it if it answers no ping.

        What is counted are pings, not seconds on the clock: if it was this process that stood
        still, or the machine, only one was sent meanwhile.
        """
        timeout = self._options.hang_timeout
        silent = 0.0
        while timeout is not None:
            interval = min(PING_INTERVAL, timeout)
            if self._answered:
                silent = 0.0
                self._answered = False
                self._say(Ping())
            await trio.sleep(interval)
            if not self._answered:
                silent += interval
            if silent >= timeout:
                self.hung = True
                logger.error("%r has answered no ping for %g s: ending it", self, silent)
                await self._abort()

    async def _abort(self) -> None:
        """End it, but let it say first where it is: see `faulthandler`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGABRT)
        await trio.sleep(_LAST_WORDS)
        self.kill()
        await trio.sleep_forever()


def _interpreter_flags() -> list[str]:
    """Those of this interpreter that a worker is to have, too."""
    flags: list[tuple[str, Any]] = [
        ("-O", sys.flags.optimize == 1),
        ("-OO", sys.flags.optimize > 1),
        ("-I", sys.flags.isolated),
        ("-E", sys.flags.ignore_environment and not sys.flags.isolated),
        ("-s", sys.flags.no_user_site and not sys.flags.isolated),
        ("-P", sys.flags.safe_path and not sys.flags.isolated),
        ("-Xdev", sys.flags.dev_mode),
        ("-Xutf8", sys.flags.utf8_mode),
    ]
    return [
        *(flag for flag, is_set in flags if is_set),
        *(f"-W{option}" for option in sys.warnoptions),
    ]
