"""Heartbeat: asks a quiet peer whether it is there, and ends the connection if it is not."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import trio

from trioreactor.default_poller import current_poller
from trioreactor.handler_errors import close_and_log
from trioreactor.options import check_seconds
from trioreactor.state import CloseReason, ConnectionState
from trioreactor.tcp_connection import TcpConnection
from trioreactor.timing_wheel import tick_of, was_away

if TYPE_CHECKING:
    from trioreactor.timing_wheel import Entry

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Heartbeat(Generic[T]):
    """When to ask, how, and how to tell asking and answering from other messages.

    T is the type of the codec's messages. Pass it to `FramedChannel` or `dispatch_messages`;
    the messages that it knows for its own are not given to the user.
    """

    ping: T | Callable[[], T]
    """What to send when nothing was sent for `interval`, or, with `is_pong`, nothing has arrived: a
    message, or a function for it."""
    interval: float = 30.0
    """Seconds. (half of what the most impatient NATs and load balancers allow a connection)"""
    timeout: float = 90.0
    """Close with `CloseReason.HEARTBEAT_TIMEOUT` when nothing has arrived for this long, seconds.
    (three times the interval: two pings may get lost in a bad moment of the network)"""
    is_pong: Callable[[T], bool] | None = None
    """Whether a message is only the answer to a ping of ours. None: the peer does not answer, but
    has a heartbeat of its own."""
    is_ping: Callable[[T], bool] | None = None
    """Whether a message is the peer's ping, to be answered with `pong`."""
    pong: T | Callable[[T], T] | None = None
    """The answer: a message, or a function that makes it from the ping. None: there is none. A peer
    that asks and asks and takes no answers is given none while the connection is congested."""

    def __post_init__(self) -> None:
        for name in ("interval", "timeout"):
            check_seconds("Heartbeat", name, getattr(self, name), off=False)
        for name in ("is_ping", "is_pong"):
            check = getattr(self, name)
            if check is not None and not callable(check):
                hint = f"pass a function, such as lambda message: message == {check!r}"
                raise TypeError(f"Heartbeat({name}={check!r}): {hint}")
        if self.pong is not None and self.is_ping is None:
            raise TypeError("Heartbeat(pong=...): pass is_ping, too, or no ping would be known")
        if self.timeout <= self.interval:
            raise ValueError(
                f"Heartbeat(interval={self.interval!r}, timeout={self.timeout!r}): pass a timeout "
                "of more than the interval, or no answer could come in time"
            )

    def make_ping(self) -> T:
        """The message to ask with."""
        made: T = _made(self.ping)
        return made

    def make_pong(self, ping: T) -> T | None:
        """The answer to *ping*, or None."""
        made: T | None = _made(self.pong, ping)
        return made


def check_heartbeat(owner: str, heartbeat: object) -> None:
    """Raise unless *heartbeat* is one."""
    if not isinstance(heartbeat, Heartbeat):
        raise TypeError(f"{owner}(heartbeat={heartbeat!r}): pass a Heartbeat(ping=...)")


def _made(message: Any, *args: object) -> Any:
    # Nobody's messages can be called: they are bytes, text, or plain data.
    return message(*args) if callable(message) else message


class HeartbeatWatch(Generic[T]):
    """One connection's heartbeat, from now until it closes.

    It has no task: two entries in the poller's timing wheel, which look and are set anew.
    """

    __slots__ = ("_answer", "_ask", "_asked", "_begun", "_conn", "_heartbeat", "_send", "_wheel")

    def __init__(
        self, conn: TcpConnection, heartbeat: Heartbeat[T], send: Callable[[T], object]
    ) -> None:
        self._conn = conn
        self._heartbeat = heartbeat
        # Sends a message, framed; never blocks. None once it is over, for it would be a cycle.
        self._send: Callable[[T], object] | None = send
        self._wheel = current_poller().wheel
        conn.note_times()
        # What was before does not count: nobody has asked.
        self._begun = trio.current_time()
        # When the peer was asked first, of the times since it was last heard.
        self._asked = -math.inf
        self._ask = self._add(self._begun + heartbeat.interval, heartbeat.interval, self._look_out)
        self._answer = self._add(self._begun + heartbeat.timeout, heartbeat.timeout, self._look_in)
        conn.stop_at_close(self)

    def stop(self) -> None:
        """Ask no more, and answer no more. Idempotent."""
        self._ask.cancel()
        self._answer.cancel()
        self._send = None

    def takes(self, message: T) -> bool:
        """Whether *message* is the heartbeat's own. A ping is answered."""
        heartbeat = self._heartbeat
        if heartbeat.is_pong is not None and heartbeat.is_pong(message):
            return True
        if heartbeat.is_ping is None or not heartbeat.is_ping(message):
            return False
        pong = heartbeat.make_pong(message)
        # A congested peer has enough to take, and one that only asks must not fill the memory.
        if pong is not None and not self._conn.congested:
            self._send_quietly(pong)
        return True

    def _send_quietly(self, message: T) -> None:
        # Whoever uses the connection hears of what is wrong with it.
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError):
            if self._send is not None:
                self._send(message)

    def _add(self, deadline: float, seconds: float, look: Callable[[], None]) -> Entry:
        return self._wheel.add(deadline, tick_of(seconds), look)

    def _last_sign(self) -> float:
        """When the peer was last heard."""
        return max(self._conn.last_received, self._begun)

    def _look_out(self) -> None:
        """Ask, if it has been quiet for long enough."""
        conn, interval = self._conn, self._heartbeat.interval
        quiet_since = max(conn.last_sent, self._begun)
        if self._heartbeat.is_pong is not None:
            # One that answers is to be heard while we send, too.
            quiet_since = min(quiet_since, self._last_sign())
        now = trio.current_time()
        if now >= quiet_since + interval:
            quiet_since = now
            # While something is queued the peer has enough to take, and asking is of no use.
            # One that has half-closed cannot answer.
            if conn.state is ConnectionState.CONNECTED and not conn.buffered and not conn.at_eof:
                if self._asked <= self._last_sign():
                    self._asked = now
                try:
                    self._send_quietly(self._heartbeat.make_ping())
                except BaseException as error:  # noqa: ASYNC103 it is logged
                    close_and_log(conn, error)
        if conn.state is not ConnectionState.DISCONNECTED:
            self._ask = self._add(quiet_since + interval, interval, self._look_out)

    def _look_in(self) -> None:
        """End the connection, if nothing has arrived for too long."""
        timeout, now = self._heartbeat.timeout, trio.current_time()
        due = max(self._last_sign() + timeout, self._asked_late())
        if self._conn.at_eof:
            # It has said all it will say. That it takes what we send is its sign of life.
            due = max(due, self._conn.last_sent + timeout)
        if now >= due and self._conn.has_unread():
            # It is we who do not read: the peer may be as well as ever.
            due = now + timeout
        if now >= due:
            self._conn.force_close(CloseReason.HEARTBEAT_TIMEOUT)
        else:
            self._answer = self._add(due, timeout, self._look_in)

    def _asked_late(self) -> float:
        """Until when one may answer that was asked late, for the loop was away: a stopped process,
        or a machine that slept.
        """
        interval, timeout = self._heartbeat.interval, self._heartbeat.timeout
        late = self._asked - (self._last_sign() + interval)
        if was_away(late, interval) and self._heartbeat.is_pong is not None:
            return self._asked + timeout - interval
        return -math.inf
