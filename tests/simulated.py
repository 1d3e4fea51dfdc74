"""A reactor without a kernel: a poller and sockets whose every answer the test decides."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable
from itertools import count
from typing import TYPE_CHECKING, Any

import trio

from trioreactor import TcpConnection
from trioreactor.channel import Channel
from trioreactor.default_poller import install_poller
from trioreactor.poller import Poller, current

if TYPE_CHECKING:
    from trioreactor.sockets import ConnectedSocket

# Numbers that no real descriptor has.
_descriptors = count(1_000_000)


class SimulatedPoller(Poller):
    """Edge-triggered and always armed, as epoll; its events are those that `happen`."""

    always_armed = True

    def __init__(self) -> None:
        super().__init__()
        self.channels: dict[int, Channel] = {}
        self._events: list[tuple[int, bool, bool, bool, bool]] = []
        self._sleeper: trio.lowlevel.Task | None = None

    def happen(
        self,
        fd: int,
        *,
        readable: bool = False,
        writable: bool = False,
        hangup: bool = False,
        failed: bool = False,
    ) -> None:
        """Let an event come; spurious ones are allowed."""
        self._events.append((fd, readable, writable, hangup, failed))
        self._wake()

    def _watch(self, channel: Channel) -> None:
        self.channels[channel.fd] = channel

    def _unwatch(self, channel: Channel) -> None:
        del self.channels[channel.fd]

    def arm_read(self, channel: Channel) -> None:
        raise AssertionError("never called: it is always armed")

    arm_write = arm_read

    def _wake(self) -> None:
        if self._sleeper is not None:
            sleeper, self._sleeper = self._sleeper, None
            trio.lowlevel.reschedule(sleeper)

    async def _sleep(self) -> None:
        if self._events:
            # They came while it was awake.
            await trio.lowlevel.checkpoint()
            return
        self._sleeper = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            self._sleeper = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def _poll(self) -> bool:
        events, self._events = self._events, []
        for fd, readable, writable, hangup, failed in events:
            channel = self.channels.get(fd)
            if channel is None:
                continue
            if readable:
                channel.readable = True
                channel.hangup = channel.hangup or hangup
                channel.failed = channel.failed or failed
                self._contain(channel.on_readable)
            if writable and channel.write_wanted:
                channel.write_wanted = False
                self._contain(channel.on_writable)
        return bool(events)

    def _open(self) -> None:
        pass

    def _close(self) -> None:
        self._wake()


class SimulatedSocket:
    """A connected socket: what its peer does, the test says."""

    def __init__(self, poller: SimulatedPoller, *, room: int = 1 << 30) -> None:
        self._poller = poller
        self._fd = next(_descriptors)
        self.input = bytearray()
        self.eof = False
        # A reset that nobody has been told of yet, and one that somebody has.
        self.error: int | None = None
        self.dead = False
        # What the peer has taken, how much more fits, and each successful call's size.
        self.output = bytearray()
        self.room = room
        self.writes: list[tuple[str, int]] = []
        self._full = False
        self.shut = False
        self.closed = False
        self.receive_calls = 0

    # -- the peer

    def peer_sends(self, data: bytes) -> None:
        """Input comes."""
        if not (self.eof or self.dead):
            self.input += data
            self._poller.happen(self._fd, readable=True)

    def peer_ends(self) -> None:
        """FIN comes."""
        if not (self.eof or self.dead):
            self.eof = True
            self._poller.happen(self._fd, readable=True, hangup=True)

    def peer_resets(self) -> None:
        """RST comes. Input that came before can still be read."""
        if not self.dead:
            self.error = errno.ECONNRESET
            self.dead = True
            self._poller.happen(self._fd, readable=True, writable=True, hangup=True, failed=True)

    def peer_takes(self, size: int) -> None:
        """There is room for *size* bytes more."""
        self.room += size
        if self._full and self.room:
            self._full = False
            self._poller.happen(self._fd, writable=True)

    # -- the calls of the library

    def _check(self) -> None:
        if self.closed:
            raise OSError(errno.EBADF, "used after it was closed")

    def _raise_pending(self) -> None:
        if self.error is not None:
            number, self.error = self.error, None
            raise OSError(number, os.strerror(number))

    def fileno(self) -> int:
        return -1 if self.closed else self._fd

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        self._check()
        assert size > 0, "recv(0) looks like an EOF"
        self.receive_calls += 1
        if self.input:
            data = bytes(self.input[:size])
            if not flags & socket.MSG_PEEK:
                del self.input[:size]
            return data
        self._raise_pending()
        if self.eof or self.dead:
            return b""
        raise BlockingIOError(errno.EAGAIN, "nothing")

    def _write(self, call: str, data: bytes) -> int:
        self._check()
        assert data, "an empty write"
        self._raise_pending()
        if self.dead or self.shut:
            raise BrokenPipeError(errno.EPIPE, "broken pipe")
        taken = min(self.room, len(data))
        self._full = taken < len(data)
        if not taken:
            raise BlockingIOError(errno.EAGAIN, "no room")
        self.room -= taken
        self.output += data[:taken]
        self.writes.append((call, taken))
        return taken

    def send(self, data: bytes | bytearray | memoryview, /) -> int:
        return self._write("send", bytes(data))

    def sendmsg(self, buffers: Iterable[bytes | bytearray | memoryview], /) -> int:
        return self._write("sendmsg", b"".join(buffers))

    def shutdown(self, how: int, /) -> None:
        self._check()
        assert how == socket.SHUT_WR
        if self.dead:
            raise OSError(errno.ENOTCONN, "not connected")
        self.shut = True

    def close(self) -> None:
        assert not self.closed, "closed twice"
        self.closed = True

    def detach(self) -> int:
        self.closed = True
        return self._fd

    def getsockname(self) -> Any:
        return ("127.0.0.1", 1)

    def getsockopt(self, level: int, option: int, buflen: int = 0, /) -> Any:
        assert (level, option) == (socket.SOL_SOCKET, socket.SO_ERROR)
        number, self.error = self.error or 0, None
        return number

    def setsockopt(self, level: int, option: int, value: int | bytes, /) -> None:
        self._check()


def simulated(
    *, poller: SimulatedPoller | None = None, room: int = 1 << 30, **options: Any
) -> tuple[TcpConnection, SimulatedSocket]:
    """A connection on a socket of the test's own. The first one of a run installs the poller."""
    running = current.get()
    if poller is None:
        poller = running if isinstance(running, SimulatedPoller) else SimulatedPoller()
    if running is not poller:
        install_poller(poller)
    sock = SimulatedSocket(poller, room=room)
    fake: ConnectedSocket = sock
    conn = TcpConnection.from_socket(
        fake, local_address=("127.0.0.1", 1), peer_address=("127.0.0.1", 2), **options
    )
    return conn, sock
