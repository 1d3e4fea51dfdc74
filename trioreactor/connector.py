"""Connector: makes connections, and tries again with backoff where that can help."""

from __future__ import annotations

import errno
import logging
import math
import os
import ssl
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from types import MappingProxyType
from typing import TypeAlias

import trio

from trioreactor.backoff import Backoff, Delays
from trioreactor.connect_options import OnAttempt, Place, check_on_attempt, local_end, places
from trioreactor.endpoints import Chooser, ConnectAttempt, Endpoint, Rounds, attempts_text
from trioreactor.errors import ConnectError
from trioreactor.exception_groups import members, without_frames
from trioreactor.happy_eyeballs import connect_tcp, connect_unix
from trioreactor.options import SocketOptions, check_count, check_kinds, check_seconds
from trioreactor.sockets import can_pass, peer_of
from trioreactor.state import CONNECTOR_TRANSITIONS, ConnectorState, check_transition
from trioreactor.tcp_connection import TcpConnection

logger = logging.getLogger("trioreactor.connector")

Made: TypeAlias = trio.SocketStream | TcpConnection
Finish: TypeAlias = Callable[[trio.SocketStream, Endpoint], Awaitable[TcpConnection]]

# How many failed attempts a `ConnectError` tells of where their number has no bound.
REMEMBERED = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ConnectorStatistics:
    """A connector's counters at one moment."""

    attempts: int
    """Attempts that have ended, since the connector was made."""
    connected: int
    """Those that made a connection."""
    failures: Mapping[str, int]
    """Those that failed, by their error's name: ``"ECONNREFUSED"``, ``"gaierror"``. An attempt
    that met several counts by the first."""


class Connector:
    """Makes one connection at a time, by as many attempts as it takes.

    Where to: *host* and *port*, or *path*, a Unix socket; or *endpoints*, several of both, each
    ``(host, port)`` or a path. A host with several addresses is tried by Happy Eyeballs. Endpoints
    are tried in rounds: each once, one after the other, then *backoff*'s delay. *chooser* says
    which is next, of those that the round has not tried: ``"in_order"``, so that the first is
    preferred, ``"random"``, or a function that gets them and returns one.

    *connect_timeout* bounds each attempt, the resolver included, in seconds; None is no bound.
    (10 s: by then Linux has sent four SYNs, and alone would go on for two minutes.) *max_attempts*
    bounds the attempts of one `connect`. *local_address* is our end's IP address, or that and a
    port. *on_attempt* is called with every attempt's `ConnectAttempt`, in the loop; what it raises
    leaves `connect`.

    What can pass is retried: refused, unreachable, timed out, an unknown name, no port or
    descriptor free. What cannot, such as a missing permission or address family, gives the
    endpoint up.
    """

    def __init__(
        self,
        host: str | None = None,
        port: int | None = None,
        *,
        path: str | os.PathLike[str] | None = None,
        endpoints: Iterable[Place] | None = None,
        chooser: Chooser = "in_order",
        backoff: Backoff | Iterable[float] = Backoff(),
        connect_timeout: float | None = 10.0,
        max_attempts: int | None = None,
        retry: bool = True,
        local_address: str | tuple[str, int] | None = None,
        socket_options: SocketOptions = SocketOptions(),
        on_attempt: OnAttempt | None = None,
        name: str = "connector",
    ) -> None:
        check_kinds("Connector", socket_options=socket_options)
        check_seconds("Connector", "connect_timeout", connect_timeout)
        check_count("Connector", "max_attempts", max_attempts, least=1, unit="attempts")
        check_on_attempt(on_attempt)
        self.name = name
        """For the log."""
        self._rounds = Rounds(places(host, port, path, endpoints), chooser)
        self._delays = Delays(backoff)
        self._connect_timeout = connect_timeout
        self._max_attempts = max_attempts
        self._local_address = local_end(local_address)
        self._socket_options = socket_options
        self._on_attempt = on_attempt
        self._state = ConnectorState.IDLE
        # Of the connect that runs.
        self._scope: trio.CancelScope | None = None
        # When the last one succeeded, until the next begins.
        self._connected_at: float | None = None
        # How many connections in a row were lost before `reset_after`.
        self._soon_lost = 0
        # `reset_backoff` was called since it succeeded.
        self._proven = False
        self._retry = retry
        # Who waits for the delay's end: at most one.
        self._waiting = trio.lowlevel.ParkingLot()
        self._connected = 0
        self._failures: Counter[str] = Counter()

    @property
    def state(self) -> ConnectorState:
        """What it is at."""
        return self._state

    def _become(self, state: ConnectorState) -> None:
        """The only setter of the state."""
        if state is not self._state:
            check_transition(CONNECTOR_TRANSITIONS, self._state, state)
            logger.debug("%s: %s -> %s", self.name, self._state.name, state.name)
            self._state = state

    @property
    def attempts(self) -> int:
        """How many attempts have ended, since it was made."""
        return self._connected + self.failed

    @property
    def failed(self) -> int:
        """How many of them failed."""
        return self._failures.total()

    @property
    def retry(self) -> bool:
        """Whether a round that failed is followed by another. Turned off while `connect` waits
        for the next, it raises `ConnectError` at once.
        """
        return self._retry

    @retry.setter
    def retry(self, retry: bool) -> None:
        self._retry = retry
        if not retry:
            self._waiting.unpark_all()

    def reset_backoff(self) -> None:
        """Begin the delays anew, and end the one that is being waited for.

        For those who know better than `Backoff.reset_after`: the login succeeded, so the server
        works; or the network is back, so now is the time. From anywhere in the loop.
        """
        self._proven = True
        self._delays.restart()
        self._waiting.unpark_all()

    def forget(self) -> None:
        """The last connection ended on purpose: the next `connect` begins anew, at once."""
        self._connected_at = None

    def statistics(self) -> ConnectorStatistics:
        """The counters as they are now."""
        return ConnectorStatistics(
            attempts=self.attempts,
            connected=self._connected,
            failures=MappingProxyType(dict(self._failures)),
        )

    def stop(self) -> None:
        """End a `connect` that runs, and all to come, with `trio.ClosedResourceError`. From
        anywhere in the loop. Idempotent, and final.
        """
        self._become(ConnectorState.STOPPED)
        if self._scope is not None:
            self._scope.cancel()

    async def connect(self) -> trio.SocketStream:
        """Connect, and give the stream, ready for a `TcpConnection`.

        After an earlier connection it waits the backoff's next delay first, for a server that was
        lost was lost by others, too; the delays begin anew if `Backoff.reset_after` seconds have
        passed since.

        Raises `ConnectError`, which is an `OSError`, when no attempt is left: every endpoint has an
        error that cannot pass, `max_attempts` have failed, the backoff has ended, or `retry` is
        off. `trio.ClosedResourceError` after `stop`, `trio.BusyResourceError` if another task is
        at it. Cancelled, it leaves no socket open.
        """
        made = await self._run(None)
        assert isinstance(made, trio.SocketStream)
        return made

    async def establish(self, finish: Finish) -> TcpConnection:
        """`connect`, and *finish* as a part of each attempt: it is given the stream and its
        endpoint, and makes a connection. The attempt fails if the connection breaks in it:
        `HandshakeFailed` is such an error.
        """
        made = await self._run(finish)
        assert isinstance(made, TcpConnection)
        return made

    async def _run(self, finish: Finish | None) -> Made:
        if self._scope is not None:
            raise trio.BusyResourceError("another task is connecting by this connector")
        if self._state is ConnectorState.CONNECTED:
            self._become(ConnectorState.IDLE)
        try:
            with trio.CancelScope() as self._scope:
                return await self._connect(finish)
            raise trio.ClosedResourceError("this connector has been stopped")
        finally:
            self._scope = None
            if self._state not in (ConnectorState.STOPPED, ConnectorState.CONNECTED):
                self._become(ConnectorState.IDLE)

    async def _connect(self, finish: Finish | None) -> Made:
        await trio.lowlevel.checkpoint()
        self._check_not_stopped()
        failed: deque[ConnectAttempt] = deque(maxlen=self._max_attempts or REMEMBERED)
        await self._pause_after_connection()
        for number in count(1):
            self._become(ConnectorState.CONNECTING)
            endpoint = self._rounds.next()
            begun = trio.current_time()
            result = await self._open(endpoint)
            if finish is not None and isinstance(result, trio.SocketStream):
                result = await _finished(finish, result, endpoint)
            duration = trio.current_time() - begun
            if not isinstance(result, Exception):
                self._succeed(number, endpoint, duration, result)
                return result
            attempt = self._fail(number, endpoint, duration, result)
            failed.append(attempt)
            if attempt.delay is None:
                break
            await self._wait(attempt.delay)
            if self._rounds.complete and not self.retry:
                break
        last = failed[-1]
        raise ConnectError(f"no connection after {attempts_text(last.number)}: {last}", failed)

    async def _pause_after_connection(self) -> None:  # noqa: ASYNC910 connect has checkpoints
        """What a connection that was lost asks for before the next attempt."""
        since, proven = self._connected_at, self._proven
        if since is None or proven or trio.current_time() - since >= self._delays.reset_after:
            self._delays.restart()
            self._rounds.restart()
        if since is not None and self._rounds.complete and self.retry:
            try:
                delay = self._delays.next()
                if delay is None:
                    raise ConnectError("no connection: the backoff has no further delay", ())
                self._log_loss(trio.current_time() - since, delay)
                await self._wait(delay)
                if not self.retry:
                    raise ConnectError("no connection: retry was turned off", ())
            except Exception:
                # It ends this connect. The next one begins anew.
                self._connected_at = None
                raise
        self._connected_at = None

    def _log_loss(self, lived: float, delay: float) -> None:
        # A server that accepts and closes at once looks well to everybody else.
        well = self._proven or lived >= self._delays.reset_after
        self._soon_lost = 0 if well else self._soon_lost + 1
        level = logging.WARNING if self._soon_lost > 1 else logging.INFO
        text = "%s: the connection made %.1f s ago is over; next attempt in %.1f s"
        logger.log(level, text, self.name, lived, delay)

    async def _wait(self, delay: float) -> None:  # noqa: ASYNC910 connect has checkpoints
        if delay and self.retry:
            self._become(ConnectorState.WAITING)
            with trio.move_on_after(delay):
                await self._waiting.park()
            # Woken, it does not hear of a cancellation in the same turn.
            self._check_not_stopped()

    async def _open(self, endpoint: Endpoint) -> Made | Exception:
        """The stream, or what the attempt failed by."""
        timeout = self._connect_timeout or math.inf
        options = self._socket_options
        try:
            with trio.move_on_after(timeout):
                if isinstance(endpoint, str):
                    return await connect_unix(endpoint, socket_options=options)
                host, port = endpoint
                return await connect_tcp(
                    host, port, local_address=self._local_address, socket_options=options
                )
            return TimeoutError(errno.ETIMEDOUT, f"no connection within {timeout:g} s")
        except (OSError, UnicodeError) as error:
            # UnicodeError: a name that DNS has no spelling for.
            return without_frames(error)  # noqa: ASYNC910 connect has checkpoints
        except ExceptionGroup as group:
            if group.split(OSError)[1] is not None:
                raise
            return without_frames(group)  # noqa: ASYNC910 connect has checkpoints

    def _succeed(self, number: int, endpoint: Endpoint, duration: float, made: Made) -> None:
        self._connected += 1
        self._connected_at = trio.current_time()
        self._proven = False
        try:
            self._tell(
                ConnectAttempt(
                    number=number,
                    endpoint=endpoint,
                    address=peer_of(made.socket),
                    duration=duration,
                    error=None,
                    delay=None,
                )
            )
        except BaseException:
            discard(made)
            raise
        self._become(ConnectorState.CONNECTED)

    def _fail(
        self, number: int, endpoint: Endpoint, duration: float, error: Exception
    ) -> ConnectAttempt:
        self._failures[_name_of(error)] += 1
        if not can_pass(error):
            self._rounds.give_up(endpoint)
        attempt = ConnectAttempt(
            number=number,
            endpoint=endpoint,
            address=None,
            duration=duration,
            error=error,
            delay=self._delay_after(number),
        )
        self._tell(attempt)
        return attempt

    def _delay_after(self, number: int) -> float | None:
        """How long to wait after failed attempt *number*; None if none follows."""
        if self._rounds.exhausted or number == self._max_attempts:
            return None
        if not self._rounds.complete:
            return 0.0
        return self._delays.next() if self.retry else None

    def _tell(self, attempt: ConnectAttempt) -> None:
        if attempt.error is None:
            logger.info("%s: %s", self.name, attempt)
        elif attempt.delay is None:
            # `connect` raises it.
            logger.debug("%s: %s; no further attempt", self.name, attempt)
        else:
            logger.warning("%s: %s; next attempt in %.1f s", self.name, attempt, attempt.delay)
        if self._on_attempt is not None:
            self._on_attempt(attempt)
        # By that function, or in the very turn that ended the attempt.
        self._check_not_stopped()

    def _check_not_stopped(self) -> None:
        if self._state is ConnectorState.STOPPED:
            raise trio.ClosedResourceError("this connector has been stopped")


def discard(made: Made) -> None:
    """Close it, for nobody will use it."""
    if isinstance(made, TcpConnection):
        made.force_close()
    else:
        made.socket.close()


async def _finished(  # noqa: ASYNC910 connect has checkpoints
    finish: Finish, stream: trio.SocketStream, endpoint: Endpoint
) -> Made | Exception:
    """What *finish* makes, or what the attempt failed by."""
    try:
        return await finish(stream, endpoint)
    except trio.BrokenResourceError as broken:
        # The handshake failed, or the connection broke in front of it: by what ssl or the system
        # says.
        error: Exception = broken
        while isinstance(error.__cause__, Exception):
            error = error.__cause__
    except OSError as short:
        # Of what a connection needs beside its socket, and that can pass.
        error = short
    return without_frames(error)  # noqa: ASYNC910 as above


def _name_of(error: BaseException) -> str:
    """What a failure is counted by."""
    if (inner := members(error)) is not None:
        return _name_of(inner[0])
    if isinstance(error, ssl.SSLError):
        # Its numbers are OpenSSL's own.
        return type(error).__name__
    number = error.errno if isinstance(error, OSError) else None
    return errno.errorcode.get(number or 0, type(error).__name__)
