"""TrioPoller: the same reactor on trio's own waits, for platforms without epoll."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import trio

from trioreactor.poller import Poller, logger

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from trioreactor.channel import Channel, Pollable


# Twenty looks a second cost nothing that can be measured.
_LOOK_INTERVAL = 0.05


class TrioPoller(Poller):
    """One short-lived system task for each wait that somebody asked for.

    A descriptor is watched only while it is waited for, so a reset is seen at the next read or
    write and not before, unlike with epoll.
    """

    always_armed = False
    # Events come by tasks of trio's, so a second round would find only what is left over from the
    # first, and go on with that while others have input.
    max_rounds = 1

    def __init__(self) -> None:
        super().__init__()
        self._sleeper: trio.lowlevel.Task | None = None

    def _open(self) -> None:
        """Nothing: it has no descriptors of its own."""

    def _watch(self, channel: Channel) -> None:
        """Nothing, until somebody asks for input or room."""

    def _unwatch(self, channel: Channel) -> None:
        if channel.read_armed or channel.write_armed:
            # Outside trio there are no watchers left.
            with suppress(RuntimeError):
                trio.lowlevel.notify_closing(channel.sock)

    def arm_read(self, channel: Channel) -> None:
        """Start a task that waits for input once."""
        channel.read_armed = True
        trio.lowlevel.spawn_system_task(self._watch_read, channel)

    def arm_write(self, channel: Channel) -> None:
        """Start a task that waits for room for output once."""
        channel.write_armed = True
        trio.lowlevel.spawn_system_task(self._watch_write, channel)

    async def _watch_read(self, channel: Channel) -> None:
        if await self._wait(trio.lowlevel.wait_readable, channel):
            channel.read_armed = False
            channel.readable = True
            self._contain(channel.on_readable)

    async def _watch_write(self, channel: Channel) -> None:
        if await self._wait(trio.lowlevel.wait_writable, channel):
            channel.write_armed = channel.write_wanted = False
            self._contain(channel.on_writable)

    async def _wait(
        self, wait: Callable[[int | Pollable], Awaitable[None]], channel: Channel
    ) -> bool:
        try:
            # The channel can have been closed between the task's spawning and now.
            if channel.fd >= 0:
                await wait(channel.sock)
        except trio.ClosedResourceError:
            return False  # noqa: ASYNC910 the task ends
        except trio.BusyResourceError:
            # Somebody else waits for this very descriptor: look now and then instead.
            await trio.sleep(_LOOK_INTERVAL)
        except OSError:
            # The owner's own call will say what is wrong.
            logger.exception("waiting for descriptor %d failed", channel.fd)
        return channel.fd >= 0  # noqa: ASYNC910 the task ends

    def _wake(self) -> None:
        if self._sleeper is not None:
            sleeper, self._sleeper = self._sleeper, None
            trio.lowlevel.reschedule(sleeper)

    async def _sleep(self) -> None:
        self._sleeper = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            self._sleeper = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def _poll(self) -> bool:
        return False

    def _close(self) -> None:
        self._wake()
