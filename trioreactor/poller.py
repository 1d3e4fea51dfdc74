"""Poller: one per trio run, the only hidden task of the library.

It lives in a `RunVar`, starts with the first channel as a system task and ends with the last, so
that descriptors and tasks return to where they were. Nothing may escape that task, for an
exception there would end the whole trio run: everything it calls is contained.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from time import perf_counter
from typing import TYPE_CHECKING

import trio

from trioreactor.event_loop import EventLoop
from trioreactor.timer_queue import Timer, TimerQueue
from trioreactor.timing_wheel import TimingWheel

if TYPE_CHECKING:
    from trioreactor.channel import Channel

logger = logging.getLogger("trioreactor.poller")

# How many rounds may follow each other, while events keep coming, before other trio tasks have
# their turn. A round takes what is ready, so a few of them save most of trio's own wake-ups.
MAX_ROUNDS = 4

# Nor does another round begin after so many seconds: callbacks that compute gain nothing by it, and
# others wait. (below what people notice, and many times what a round of short ones takes)
LONG_ROUNDS = 0.005


class Poller(ABC):
    """Calls the channels' owners when their descriptors are ready, and timers when they are due.

    Everything here runs in the trio thread. `woke` is set by whoever reschedules a task in a
    call-back, and sends the poller back to trio at once, so that the task runs.
    """

    always_armed: bool
    """Whether every channel is watched all the time, with no `arm_*` call needed."""
    loop: EventLoop
    """The run that it belongs to, from the first channel on."""
    max_rounds = MAX_ROUNDS
    """How many rounds may follow each other."""

    def __init__(self) -> None:
        self.woke = False
        # How many channels are `parked`.
        self.parked = 0
        # Counts up, so that two calls of one turn can be told from those of two.
        self.turn = 0
        self._channels = 0
        self._again: list[Channel] = []
        self._soon: deque[Callable[[], object]] = deque()
        self._timers = TimerQueue()
        # Many deadlines that come seldom.
        self.wheel = TimingWheel(self.call_at)
        # None until the task has started, and again after it was told to stop.
        self._ended: trio.Event | None = None
        self._stopping = False
        self._asleep = False
        # What wakes the task when the next timer is due, while it runs.
        self._alarm: trio.CancelScope | None = None

    # -- for channels

    def register(self, channel: Channel) -> None:
        """Begin to watch *channel*. The first one starts the poller's task."""
        if self._ended is None:
            self.loop = EventLoop.current()
            self._open()
            self._ended = trio.Event()
            trio.lowlevel.spawn_system_task(self._run, name=f"trioreactor.{type(self).__name__}")
        self._channels += 1
        try:
            self._watch(channel)
        except BaseException:
            self._leave()
            raise

    def unregister(self, channel: Channel) -> None:
        """Stop watching *channel*. The last one stops the poller's task."""
        self._unwatch(channel)
        self._leave()

    def _leave(self) -> None:
        self._channels -= 1
        if not self._channels:
            self._stop()

    @abstractmethod
    def _open(self) -> None:
        """Make the poller's own descriptors: the first channel comes."""

    @abstractmethod
    def _watch(self, channel: Channel) -> None: ...

    @abstractmethod
    def _unwatch(self, channel: Channel) -> None: ...

    @abstractmethod
    def arm_read(self, channel: Channel) -> None:
        """Watch for input once. Never called for a poller that is `always_armed`."""

    @abstractmethod
    def arm_write(self, channel: Channel) -> None:
        """Watch for room for output once. Never called for a poller that is `always_armed`."""

    def add_again(self, channel: Channel) -> None:
        """Call *channel*'s `on_readable` in the next round."""
        self._again.append(channel)
        self._wake()

    # -- for everybody in the loop

    def call_soon(self, fn: Callable[[], object]) -> None:
        """Call *fn* from the poller's task, after what it is doing now. Never called at once."""
        self._soon.append(fn)
        self._wake()

    def call_at(self, deadline: float, fn: Callable[[], object]) -> Timer:
        """Call *fn* from the poller's task at *deadline*, by trio's clock, unless cancelled.

        Timers run while there is a channel: whoever sets one owns a channel.
        """
        # Later than the earliest, or cancelled since, it comes for nothing and is set anew.
        if self._alarm is not None and deadline < self._alarm.deadline:
            self._alarm.deadline = deadline
        return self._timers.add(deadline, fn)

    async def wait_stopped(self) -> None:
        """If the poller is stopping, wait (shielded) until its task has ended; else a checkpoint.

        Leaving a server or a connection waits here, so that the count of tasks is exact.
        """
        if self._stopping and self._ended is not None:
            with trio.CancelScope(shield=True):
                await self._ended.wait()
        await trio.lowlevel.cancel_shielded_checkpoint()

    # -- the task

    @abstractmethod
    def _wake(self) -> None:
        """End the task's sleep, if it sleeps."""

    @abstractmethod
    async def _sleep(self) -> None:
        """Wait for events, for `_wake` or for the poller to be stopped."""

    @abstractmethod
    def _poll(self) -> bool:
        """Hand out the events that are there. False if there were none."""

    @abstractmethod
    def _close(self) -> None:
        """Give up the poller's own descriptors and end its task's sleep."""

    def _stop(self) -> None:
        if not self._stopping:
            self._stopping = True
            # It refers to a method of ours: a circle.
            del self.wheel
            # Nobody is to be woken by descriptors that are closed.
            self._asleep = False
            # Outside its run (a garbage-collected connection) nobody can ask for it any more.
            with suppress(RuntimeError):
                if current.get() is self:
                    current.set(None)
            self._close()

    async def _run(self) -> None:  # noqa: ASYNC910 a task of its own
        try:
            while not self._stopping:
                deadline = self._timers.next_deadline()
                # One for many sleeps: to make and enter one costs as much as to serve a request.
                with trio.CancelScope(deadline=math.inf if deadline is None else deadline) as scope:
                    self._alarm = scope
                    await self._work_and_sleep()
                # The timer that it was set for, or one that was cancelled since, is due.
                self._alarm = None
                self._work()
        finally:
            self._alarm = None
            self._stop()
            assert self._ended is not None
            self._ended.set()

    async def _work_and_sleep(self) -> None:  # noqa: ASYNC910 a part of the task
        """Until the alarm."""
        while not self._stopping:
            # Work that is left over must not wait, but other tasks have their turn first.
            if self._again or self._soon:
                await trio.lowlevel.checkpoint()
            else:
                self._asleep = True
                try:
                    await self._sleep()
                finally:
                    self._asleep = False
            self._work()

    def _work(self) -> None:
        """Rounds of: events, what was left over, calls, timers. Never raises, never blocks."""
        self.woke = False
        self.turn += 1
        begun = perf_counter()
        for _ in range(self.max_rounds):
            if self._stopping:
                return
            busy = self._poll()
            if self._again:
                busy = True
                again, self._again = self._again, []
                for channel in again:
                    channel.again = False
                    if channel.fd >= 0:
                        self._contain(channel.on_readable)
            if self._soon:
                busy = True
                # Those that are added meanwhile wait for the next round.
                for _ in range(len(self._soon)):
                    self._contain(self._soon.popleft())
            if len(self._timers):
                for fn in self._timers.pop_due(trio.current_time()):
                    self._contain(fn)
            if self.woke or not busy or perf_counter() - begun > LONG_ROUNDS:
                return

    def _contain(self, fn: Callable[[], object]) -> None:
        try:
            fn()
        except BaseException:  # noqa: ASYNC103 nothing may escape the task
            # Owners contain what users' callbacks raise, so this is a bug of the library; it must
            # not cost the whole trio run.
            logger.exception("a call from the poller raised; it was dropped")


current: trio.lowlevel.RunVar[Poller | None] = trio.lowlevel.RunVar("trioreactor.poller", None)
"""This run's poller, if there is one now."""
