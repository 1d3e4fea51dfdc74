"""EpollPoller: Linux's epoll, edge-triggered, nested in trio's own."""

from __future__ import annotations

import os
import select
from contextlib import suppress
from typing import TYPE_CHECKING

import trio

from trioreactor.poller import Poller, logger

if TYPE_CHECKING:
    from trioreactor.channel import Channel

HAVE_EPOLL = hasattr(select, "epoll") and hasattr(os, "eventfd")

if TYPE_CHECKING or HAVE_EPOLL:
    from select import EPOLLERR, EPOLLET, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLRDHUP

    _EVERYTHING = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET
    _READ = EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR
    _HANGUP = EPOLLRDHUP | EPOLLHUP | EPOLLERR
    _WRITE = EPOLLOUT | EPOLLHUP | EPOLLERR

# One call's events: enough that a busy server makes few calls, few enough that a round is short.
_MAX_EVENTS = 256


class EpollPoller(Poller, trio.abc.Instrument):
    """Each descriptor is registered once, so neither trio's epoll nor ours is told of any wait.

    An epoll descriptor is itself pollable: the task waits for ours with
    `trio.lowlevel.wait_readable` and then takes what is there without blocking.

    What that task wakes would run a whole turn of trio's loop after it. So tasks that only wait to
    be woken are so before it runs, in `after_io_wait`, which trio calls between waiting and running
    tasks: then both run in the same turn.
    """

    always_armed = True

    def __init__(self) -> None:
        super().__init__()
        self._by_fd: dict[int, Channel] = {}
        # The poller's, while it runs.
        self._task: trio.lowlevel.Task | None = None
        # What `after_io_wait` has found and leaves to the task; None if it has not looked.
        self._found: list[tuple[int, int]] | None = None

    async def _run(self) -> None:
        self._task = trio.lowlevel.current_task()
        trio.lowlevel.add_instrument(self)
        try:
            await super()._run()
        finally:
            self._task = None
            trio.lowlevel.remove_instrument(self)

    def after_io_wait(self, timeout: float) -> None:  # noqa: ARG002 trio's signature
        """Wake the tasks whose input has come, if the poller's own was woken by something."""
        # It sets the mark before it sleeps, and trio takes that away when it reschedules a task.
        if (
            not self.parked
            or self._stopping
            or self._task is None
            or self._task.custom_sleep_data is not None
        ):
            return
        found: list[tuple[int, int]] = []
        for event in self._epoll.poll(0, _MAX_EVENTS):
            channel = self._by_fd.get(event[0])
            if channel is not None and channel.parked:
                self._take(channel, event[1])
            else:
                found.append(event)
        self._found = found

    def _open(self) -> None:
        self._epoll = select.epoll()
        self._fd = self._epoll.fileno()
        # Wakes the task: registered edge-triggered, so that each write is an event and the
        # counter never has to be read.
        try:
            self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError:
            self._epoll.close()
            raise
        self._epoll.register(self._wakeup, EPOLLIN | EPOLLET)

    def _watch(self, channel: Channel) -> None:
        self._epoll.register(channel.fd, _EVERYTHING)
        self._by_fd[channel.fd] = channel
        if self._found:
            # What was found for a former owner of this number is not for this one.
            self._found = [event for event in self._found if event[0] != channel.fd]

    def _unwatch(self, channel: Channel) -> None:
        del self._by_fd[channel.fd]
        # The run may be over, and the epoll object with it; or the descriptor was closed by
        # somebody else, and left the set by that.
        with suppress(OSError, ValueError):
            self._epoll.unregister(channel.fd)

    def arm_read(self, channel: Channel) -> None:
        """Nothing: it is armed."""

    def arm_write(self, channel: Channel) -> None:
        """Nothing: it is armed."""

    def _wake(self) -> None:
        # Awake, it will look by itself before it sleeps again.
        if self._asleep:
            # So that a burst of calls is one write.
            self._asleep = False
            os.eventfd_write(self._wakeup, 1)

    async def _sleep(self) -> None:  # noqa: ASYNC910 returns at once only when the task is to end
        assert self._task is not None
        self._task.custom_sleep_data = self
        try:  # noqa: SIM105 for every sleep: suppress costs more than it saves to read
            await trio.lowlevel.wait_readable(self._fd)
        except trio.ClosedResourceError:
            pass

    def _poll(self) -> bool:
        events, self._found = self._found, None
        if events is None:
            events = self._epoll.poll(0, _MAX_EVENTS)
        by_fd = self._by_fd
        for fd, mask in events:
            channel = by_fd.get(fd)
            if channel is None:
                # The wake-up, or a channel that was closed since the event was found.
                continue
            self._take(channel, mask)
        return bool(events)

    def _take(self, channel: Channel, mask: int) -> None:
        """Tell *channel*'s owner of an event."""
        try:
            if mask & _READ:
                channel.readable = True
                if mask & _HANGUP:
                    channel.hangup = True
                    if mask & EPOLLERR:
                        channel.failed = True
                channel.on_readable()
            if mask & _WRITE and channel.write_wanted:
                channel.write_wanted = False
                channel.on_writable()
        except BaseException:  # noqa: ASYNC103 nothing may escape the task
            logger.exception("a channel's owner raised; the event was dropped")

    def _close(self) -> None:
        # Outside trio (a garbage-collected connection after the run) nobody waits for it.
        with suppress(RuntimeError):
            trio.lowlevel.notify_closing(self._fd)
        self._epoll.close()
        os.close(self._wakeup)
