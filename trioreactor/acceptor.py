"""Acceptor: takes connections off one listening socket, and survives having too many of them."""

from __future__ import annotations

import errno
import logging
import os
import socket as stdlib_socket
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType

import trio

from trioreactor.address import SocketAddress, format_address
from trioreactor.channel import Channel
from trioreactor.default_poller import current_poller
from trioreactor.options import SocketOptions
from trioreactor.sockets import (
    ACCEPT_DESCRIPTOR_ERRNOS,
    ACCEPT_MEMORY_ERRNOS,
    ACCEPT_PEER_ERRNOS,
    ACCEPTED_SOCKETS_INHERIT,
    apply_to_connection,
    is_tcp,
    stdlib_twin,
    stream_around,
)

logger = logging.getLogger("trioreactor.acceptor")

# Connections taken at one wake-up before the rest of the program has its turn. (scripts/bench
# --accept, a crowd of 2,000: three times the rate of one at a time, and those who are there wait
# no longer; all at once gains little more and makes them wait for the whole crowd)
DEFAULT_BATCH = 64

# How many connections that died while they waited are skipped before others have their turn.
_DEAD_IN_A_ROW = 16

# How long to leave the listening socket alone when the system is short of something: as long as
# trio does. At ten attempts a second it cannot spin, and service is back within this time.
_PAUSE = 0.1

# Connections shed with the reserve descriptor at one time, so that most of a crowd is told.
_SHED_BATCH = 16

# At most one line a second in the log, however many connections are shed.
_LOG_INTERVAL = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class AcceptorStatistics:
    """An acceptor's counters at one moment."""

    accepted: int
    """Connections handed out."""
    shed: int
    """Connections accepted with the reserve descriptor and closed, for want of others."""
    errors: Mapping[str, int]
    """Failed accepts by errno name."""


class Acceptor(trio.abc.Listener[trio.SocketStream]):
    """Accepts connections on a listening socket, which it owns.

    A `trio.abc.Listener`, so `trio.serve_listeners` takes it, too.

    *batch* is how many connections a server takes at one wake-up: a number, or None for all that
    wait. *socket_options* are set on accepted sockets where the platform does not copy them from
    the listening one. *on_close* is called once, at the close.

    Out of descriptors (EMFILE, ENFILE) it gives up one that it holds in reserve, accepts and
    closes what waits, so that clients are told instead of left hanging, takes the reserve back,
    and pauses, so that it cannot spin. Out of memory (ENOBUFS, ENOMEM) it pauses. An error of a
    connection that was waiting is skipped. Any other error surfaces.
    """

    def __init__(
        self,
        listening_socket: trio.socket.SocketType | stdlib_socket.socket,
        *,
        batch: int | None = DEFAULT_BATCH,
        socket_options: SocketOptions | None = None,
        on_close: Callable[[], object] | None = None,
    ) -> None:
        if batch is not None and (isinstance(batch, bool) or batch < 1):
            raise ValueError(f"Acceptor(batch={batch!r}): pass at least 1, or None for all")
        self.batch = batch
        if isinstance(listening_socket, stdlib_socket.socket):
            self._sock = listening_socket
            self._trio_sock: trio.socket.SocketType | None = None
            self._is_twin = False
        else:
            self._sock = stdlib_twin(listening_socket)
            self._trio_sock = listening_socket
            self._is_twin = True
        self._sock.setblocking(False)
        self._options = None if ACCEPTED_SOCKETS_INHERIT else socket_options
        self._on_close = on_close
        self.address: SocketAddress = self._sock.getsockname()
        self.name = format_address(self.address)
        """The address as text."""
        self._one_address = not is_tcp(self._sock) or self.address[0] not in ("0.0.0.0", "::")
        # Registered at the first wait, so that an acceptor can be made outside trio.
        self._channel: Channel | None = None
        self._waiter: trio.lowlevel.Task | None = None
        self._paused = False
        self._closed = False
        self._reserve: int | None = None
        self._open_reserve()
        self._accepted = 0
        self._shed = 0
        self._errors: Counter[str] = Counter()
        self._next_log = float("-inf")
        self._unlogged = 0

    def __repr__(self) -> str:
        return f"<Acceptor on {self.name}{' (closed)' if self._closed else ''}>"

    @property
    def socket(self) -> trio.socket.SocketType:
        """The listening socket, as `trio.SocketListener` has it. For looking only."""
        if self._trio_sock is None:
            self._trio_sock = trio.socket.from_stdlib_socket(self._sock)
        return self._trio_sock

    def address_of(self, sock: stdlib_socket.socket) -> SocketAddress:
        """Our end of an accepted connection; the kernel is asked only where answers differ."""
        if self._one_address:
            return self.address
        address: SocketAddress = sock.getsockname()
        return address

    def statistics(self) -> AcceptorStatistics:
        """The counters as they are now."""
        return AcceptorStatistics(
            accepted=self._accepted,
            shed=self._shed,
            errors=MappingProxyType(dict(self._errors)),
        )

    @trio.lowlevel.enable_ki_protection
    async def accept(self) -> trio.SocketStream:
        """Wait for a connection. Cancelling loses none.

        `trio.ClosedResourceError` once the acceptor is closed, `trio.BusyResourceError` while
        another task waits.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            accepted = self.accept_nowait()
            if accepted is not None:
                await trio.lowlevel.cancel_shielded_checkpoint()
                return stream_around(accepted[0])
            await self.wait_acceptable()

    @trio.lowlevel.enable_ki_protection
    async def wait_acceptable(self) -> None:  # noqa: ASYNC910 one of the two waits, always
        """Wait until `accept_nowait` is worth a try. Errors are those of `accept`."""
        if self._waiter is not None:
            raise trio.BusyResourceError("another task already waits to accept here")
        channel = self._registered()
        if channel.readable and not self._paused:
            await trio.lowlevel.checkpoint()
        while not channel.readable or self._paused:
            channel.want_read()
            self._waiter = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._abort)
            if self._closed:
                raise trio.ClosedResourceError("this acceptor was closed")

    @trio.lowlevel.enable_ki_protection
    def accept_nowait(self) -> tuple[stdlib_socket.socket, SocketAddress] | None:
        """A connected non-blocking socket and the peer's address, or None if none can be had now.

        The address is the one that accept returned: a connection that was reset while it waited
        has no other.
        """
        channel = self._registered()
        if self._paused:
            return None
        for _ in range(_DEAD_IN_A_ROW):
            try:
                sock, address = self._sock.accept()
            except BlockingIOError:
                channel.readable = False
                return None
            except OSError as error:
                self._count(error)
                if error.errno in ACCEPT_PEER_ERRNOS:
                    continue
                if error.errno in ACCEPT_DESCRIPTOR_ERRNOS:
                    self._shed_waiting(channel)
                elif error.errno not in ACCEPT_MEMORY_ERRNOS:
                    raise
                self._pause(error)
                return None
            try:
                sock.setblocking(False)
                if self._options is not None:
                    apply_to_connection(sock, self._options)
            except OSError:
                # Where options fail on a connection that is gone already.
                sock.close()
                continue
            self._accepted += 1
            if self._reserve is None:
                # Lost to somebody else in a shortage: they seem to be free again.
                self._open_reserve()
            return sock, address
        return None

    def shed(self, sock: stdlib_socket.socket, error: OSError) -> None:
        """Close *sock*, accepted but of no use because the system is short of something; pause."""
        sock.close()
        self._shed += 1
        self._count(error)
        self._pause(error)

    def close(self) -> None:
        """Stop listening and wake whoever waits, with `trio.ClosedResourceError`. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._wake()
        if self._channel is not None:
            self._channel.close()
        if self._on_close is not None:
            self._on_close()
        if self._is_twin:
            self._sock.detach()
        if self._trio_sock is not None:
            self._trio_sock.close()
        else:
            self._sock.close()
        if self._reserve is not None:
            os.close(self._reserve)
            self._reserve = None

    async def aclose(self) -> None:
        """`close`, then a checkpoint."""
        self.close()
        if self._channel is not None:
            await self._channel.poller.wait_stopped()
        await trio.lowlevel.checkpoint()

    # -- inside

    def _registered(self) -> Channel:
        if self._closed:
            raise trio.ClosedResourceError("this acceptor was closed")
        if self._channel is None:
            self._channel = Channel(
                current_poller(), self._sock, on_readable=self._wake, on_writable=_ignore
            )
            # It may have been listening for long.
            self._channel.readable = True
        return self._channel

    def _wake(self) -> None:
        if self._waiter is not None and (self._closed or not self._paused):
            waiter, self._waiter = self._waiter, None
            if self._channel is not None:
                self._channel.poller.woke = True
            trio.lowlevel.reschedule(waiter)

    def _abort(self, _raise_cancel: object) -> trio.lowlevel.Abort:
        self._waiter = None
        return trio.lowlevel.Abort.SUCCEEDED

    def _count(self, error: OSError) -> None:
        number = error.errno or 0
        self._errors[errno.errorcode.get(number, str(number))] += 1

    def _shed_waiting(self, channel: Channel) -> None:
        """Tell waiting clients that there is no room, by means of the reserve descriptor."""
        if self._reserve is not None:
            os.close(self._reserve)
            self._reserve = None
            try:
                for _ in range(_SHED_BATCH):
                    # Another thread may take the descriptor first: then there is none to shed.
                    self._sock.accept()[0].close()
                    self._shed += 1
            except BlockingIOError:
                channel.readable = False
            except OSError:
                pass
        self._open_reserve()

    def _open_reserve(self) -> None:
        # If it cannot be had now, the next shortage tries again.
        with suppress(OSError):
            self._reserve = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def _pause(self, error: OSError) -> None:
        now = trio.current_time()
        self._unlogged += 1
        if now >= self._next_log:
            logger.error(
                "%s: accept failed %d times: %s; %d connections shed so far; pausing %g s",
                self.name,
                self._unlogged,
                error,
                self._shed,
                _PAUSE,
            )
            self._next_log = now + _LOG_INTERVAL
            self._unlogged = 0
        self._paused = True
        assert self._channel is not None
        self._channel.poller.call_at(now + _PAUSE, self._resume)

    def _resume(self) -> None:
        self._paused = False
        if self._channel is not None and self._channel.readable:
            self._wake()


def _ignore() -> None:
    """A listening socket is never written to."""
