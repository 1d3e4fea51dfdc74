"""Channel: one descriptor's place in the reactor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from trioreactor.poller import Poller


class Pollable(Protocol):
    """Anything with a descriptor."""

    def fileno(self) -> int:
        """The descriptor."""
        ...


class Channel:
    """Binds one descriptor to the poller: registered once, for everything, edge-triggered.

    `readable` is a belief, not a promise: True until a read finds nothing more. The owner clears
    it after a short read, unless `hangup` is set: then an EOF or an error waits behind the data
    and no further edge will come for it. A read that would block always clears it.
    """

    __slots__ = (
        "again",
        "failed",
        "fd",
        "hangup",
        "on_readable",
        "on_writable",
        "parked",
        "poller",
        "read_armed",
        "readable",
        "sock",
        "write_armed",
        "write_wanted",
    )

    def __init__(
        self,
        poller: Poller,
        sock: Pollable,
        *,
        on_readable: Callable[[], None],
        on_writable: Callable[[], None],
    ) -> None:
        self.poller = poller
        self.sock = sock
        self.fd = sock.fileno()
        # There is input, an EOF or an error to be read. Neither of the two may block or raise.
        self.on_readable = on_readable
        # The kernel takes data again, or there is an error.
        self.on_writable = on_writable
        self.readable = False
        # The peer has sent its EOF, or the connection has failed.
        self.hangup = False
        # The kernel has an error for us. Only an EpollPoller sees that without a read.
        self.failed = False
        # On the poller's again-list.
        self.again = False
        # Between `park` and `unpark`.
        self.parked = False
        # Something waits to be written. The poller calls `on_writable` only then, for room for
        # output is reported with every input.
        self.write_wanted = False
        # With an EpollPoller always; with a TrioPoller while a task of its own waits.
        self.read_armed = poller.always_armed
        self.write_armed = poller.always_armed
        poller.register(self)

    @property
    def closed(self) -> bool:
        """Whether `close` has been called."""
        return self.fd < 0

    def park(self) -> None:
        """From now on `on_readable` wakes a task, and does nothing else."""
        self.parked = True
        self.poller.parked += 1

    def unpark(self) -> None:
        """No more. Idempotent."""
        if self.parked:
            self.parked = False
            self.poller.parked -= 1

    def want_read(self) -> None:
        """Ask for `on_readable` at the next input. Not needed while `read_armed`."""
        if not self.read_armed:
            self.poller.arm_read(self)

    def want_write(self) -> None:
        """Ask for `on_writable`, once, at the next room for output."""
        self.write_wanted = True
        if not self.write_armed:
            self.poller.arm_write(self)

    def read_again(self) -> None:
        """Have `on_readable` called in the poller's next round, with no event needed.

        For a reader that stopped before the input was exhausted: everybody else has their turn
        first.
        """
        if not self.again:
            self.again = True
            self.poller.add_again(self)

    def close(self) -> None:
        """Leave the poller. Must come before the descriptor is closed. Idempotent."""
        if self.fd >= 0:
            self.poller.unregister(self)
            self.fd = -1
            # The owner's methods, which refer to the owner, which refers to this.
            self.on_readable = self.on_writable = _closed


def _closed() -> None:
    """What a closed channel calls."""
