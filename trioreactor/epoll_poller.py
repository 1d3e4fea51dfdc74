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


class EpollPoller(Poller):
    """Each descriptor is registered once, so neither trio's epoll nor ours is told of any wait.

    An epoll descriptor is itself pollable: the task waits for ours with
    `trio.lowlevel.wait_readable` and then takes what is there without blocking.
    """

    always_armed = True

    def __init__(self) -> None:
        super().__init__()
        self._by_fd: dict[int, Channel] = {}

    def _open(self) -> None:
        self._epoll = select.epoll()
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
        with suppress(trio.ClosedResourceError):
            await trio.lowlevel.wait_readable(self._epoll.fileno())

    def _poll(self) -> bool:
        events = self._epoll.poll(0, _MAX_EVENTS)
        by_fd = self._by_fd
        for fd, mask in events:
            channel = by_fd.get(fd)
            if channel is None:
                # The wake-up, or a channel that an earlier event of this round closed. If its
                # number was taken again at once, the new owner sees a spurious event: a read that
                # finds nothing.
                continue
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
        return bool(events)

    def _close(self) -> None:
        # Outside trio (a garbage-collected connection after the run) nobody waits for it.
        with suppress(RuntimeError):
            trio.lowlevel.notify_closing(self._epoll.fileno())
        self._epoll.close()
        os.close(self._wakeup)
