"""Options: frozen dataclasses, keyword-only, checked when they are made. None means off.

Every default says where it comes from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

# What fits into the kernel's int, where it has no narrower bound of its own.
_INT_MAX = 2**31 - 1

# Linux's bounds for TCP keepalive: MAX_TCP_KEEPIDLE, MAX_TCP_KEEPINTVL and MAX_TCP_KEEPCNT.
_KEEPALIVE_SECONDS_MAX = 32767
_KEEPALIVE_COUNT_MAX = 127


def check_count(
    owner: str, name: str, value: object, *, least: int, unit: str, most: int | None = None
) -> None:
    """Raise unless *value* is None or a whole number from *least* to *most*."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}({name}={value!r}): pass a whole number of {unit}")
    if value < least:
        raise ValueError(f"{owner}({name}={value!r}): pass at least {least} {unit}")
    if most is not None and value > most:
        raise ValueError(f"{owner}({name}={value!r}): pass at most {most} {unit}")


def check_seconds(
    owner: str, name: str, value: object, *, zero: bool = False, off: bool = True
) -> None:
    """Raise unless *value* is a finite, positive number, or zero or None where those are one."""
    if value is None and off:
        return
    none = ", or None for off" if off else ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{owner}({name}={value!r}): pass a number of seconds{none}")
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        bound = "at least 0" if zero else "more than 0"
        raise ValueError(f"{owner}({name}={value!r}): pass {bound} seconds{none}")


def check_kinds(owner: str, **values: object) -> None:
    """Raise for an option that is no `Watermarks`, `Timeouts`, ... as its name says."""
    for name, value in values.items():
        kind = _KINDS[name]
        if not isinstance(value, kind):
            raise TypeError(f"{owner}({name}={value!r}): pass {kind.__name__}(...)")


def check_present(owner: str, **values: object) -> None:
    """Raise for a None where there is nothing to turn off."""
    for name, value in values.items():
        if value is None:
            raise TypeError(f"{owner}({name}=None): this one cannot be turned off, pass a number")


@dataclass(frozen=True, kw_only=True, slots=True)
class Watermarks:
    """Bounds of a connection's buffers, in bytes."""

    high: int = 65536
    """Above this many bytes queued for sending, `send` answers False. (asyncio's default)"""
    low: int = 16384
    """At or below this many, a sender that waits goes on. (asyncio's default: a quarter)"""
    limit: int | None = 67108864
    """The hard limit of the send buffer: a sender that would pass it loses the connection, with
    `SendBufferFull`. (64 MiB, muduo's high-water mark)"""
    receive_limit: int | None = 1048576
    """In dispatch mode, how much input may stay unconsumed. (1 MiB: sixteen frames of the largest
    default size)"""

    def __post_init__(self) -> None:
        check_present("Watermarks", high=self.high, low=self.low)
        check_count("Watermarks", "high", self.high, least=1, unit="bytes")
        check_count("Watermarks", "low", self.low, least=0, unit="bytes")
        check_count("Watermarks", "limit", self.limit, least=1024, unit="bytes")
        check_count("Watermarks", "receive_limit", self.receive_limit, least=1, unit="bytes")
        if self.low >= self.high:
            raise ValueError(
                f"Watermarks(low={self.low}, high={self.high}): pass a low mark below the high "
                f"one; a quarter of it ({self.high // 4}) is usual"
            )
        if self.limit is not None and self.limit < self.high:
            raise ValueError(
                f"Watermarks(high={self.high}, limit={self.limit}): pass a limit of at least the "
                "high mark, or None for no limit"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeouts:
    """Deadlines, in seconds: `idle`, `first_byte`, `frame` and `write_stall` for what a peer may
    take its time for, each with a `CloseReason` of its own, `handshake` for what comes before, and
    `linger` for closing.
    """

    idle: float | None = None
    """Close with `CloseReason.IDLE_TIMEOUT` when nothing was received and nothing sent for this
    long. (off: a quiet connection may be a good one)"""
    first_byte: float | None = None
    """Close with `CloseReason.FIRST_BYTE_TIMEOUT` if the peer has sent nothing this long after the
    connection began. (off: in some protocols the server speaks first)"""
    frame: float | None = None
    """Close with `CloseReason.FRAME_TIMEOUT` when a message is not complete this long after its
    first bytes came, however steadily they drip. Counted where messages are known: with a
    `FramedChannel` and `Codec.on_message`. (off: only the user knows how long messages take)"""
    write_stall: float | None = None
    """Close with `CloseReason.WRITE_STALLED` when data is queued and the kernel has taken none of
    it for this long. (off: only the user knows how patient to be)"""
    handshake: float | None = 10.0
    """Close with `CloseReason.HANDSHAKE_FAILED` when what comes before the first byte of a
    connection's own (TLS, a PROXY protocol header) takes longer than this. (Netty's)"""
    linger: float | None = 2.0
    """How long closing may wait for the peer: at most this long for each quarter of the high-water
    mark's worth of queued data to leave, and at most this long for the peer's own close after ours.
    (2 s: many round trips, few enough to hold a descriptor)"""

    def __post_init__(self) -> None:
        for name in ("idle", "first_byte", "frame", "write_stall", "handshake"):
            check_seconds("Timeouts", name, getattr(self, name))
        check_seconds("Timeouts", "linger", self.linger, zero=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Keepalive:
    """TCP keepalive's timing. Where a platform lacks a field's option, its own default stays."""

    idle: int = 60
    """Seconds of silence before the first probe. (Linux waits two hours, which outlasts every
    NAT's and load balancer's memory of the connection)"""
    interval: int = 10
    """Seconds between probes. (with `count`, a dead peer is found within two minutes)"""
    count: int = 5
    """Unanswered probes that end the connection."""

    def __post_init__(self) -> None:
        check_present("Keepalive", idle=self.idle, interval=self.interval, count=self.count)
        most = _KEEPALIVE_SECONDS_MAX
        check_count("Keepalive", "idle", self.idle, least=1, most=most, unit="seconds")
        check_count("Keepalive", "interval", self.interval, least=1, most=most, unit="seconds")
        most = _KEEPALIVE_COUNT_MAX
        check_count("Keepalive", "count", self.count, least=1, most=most, unit="probes")


@dataclass(frozen=True, kw_only=True, slots=True)
class SocketOptions:
    """Options of the sockets themselves. None leaves the system's own value."""

    no_delay: bool = True
    """TCP_NODELAY. (trio's default; sends are gathered here instead)"""
    keepalive: bool | Keepalive = True
    """SO_KEEPALIVE, with the system's timing (True) or one's own. (muduo's default)"""
    user_timeout: float | None = None
    """TCP_USER_TIMEOUT: seconds that sent data may stay unacknowledged before the kernel ends the
    connection. Linux only, ignored elsewhere."""
    send_buffer: int | None = None
    """SO_SNDBUF in bytes. A peer that does not read can hold about 4 MB in the kernel by default
    and about 110 KB with 32768; set, it turns the kernel's own tuning off."""
    receive_buffer: int | None = None
    """SO_RCVBUF in bytes; set, it turns the kernel's own tuning off."""
    reuse_port: bool = False
    """SO_REUSEPORT on listening sockets: several processes bind the same port."""
    backlog: int | None = None
    """Length of the queue of connections not yet accepted; None is the system's largest."""

    def __post_init__(self) -> None:
        for name in ("no_delay", "reuse_port"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"SocketOptions({name}={getattr(self, name)!r}): pass a bool")
        if not isinstance(self.keepalive, (bool, Keepalive)):
            raise TypeError(
                f"SocketOptions(keepalive={self.keepalive!r}): pass True, False or "
                "Keepalive(idle=..., interval=..., count=...)"
            )
        check_seconds("SocketOptions", "user_timeout", self.user_timeout)
        if self.user_timeout is not None and self.user_timeout * 1000 > _INT_MAX:
            raise ValueError(
                f"SocketOptions(user_timeout={self.user_timeout!r}): pass at most "
                f"{_INT_MAX // 1000} seconds, or None for off"
            )
        for name, unit in (
            ("send_buffer", "bytes"),
            ("receive_buffer", "bytes"),
            ("backlog", "connections"),
        ):
            value = getattr(self, name)
            check_count("SocketOptions", name, value, least=1, most=_INT_MAX, unit=unit)


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How much a server takes on. None is no limit."""

    connections: int | None = None
    """Connections at one time, exactly: the permit is taken before `accept`."""
    per_peer: int | None = None
    """Connections at one time from one address (IPv4) or /64 network (IPv6); more are closed as
    soon as they are accepted, for only then is the address known."""
    accept_rate: float | None = None
    """Accepted connections a second, on average; up to one second's worth may come at once."""
    when_full: Literal["wait", "reject"] = "wait"
    """At `connections` or above `accept_rate`: leave newcomers in the backlog ("wait"), or accept
    and close them, so that they know ("reject")."""

    def __post_init__(self) -> None:
        check_count("Limits", "connections", self.connections, least=1, unit="connections")
        check_count("Limits", "per_peer", self.per_peer, least=1, unit="connections")
        rate = self.accept_rate
        if rate is not None:
            if isinstance(rate, bool) or not isinstance(rate, (int, float)):
                raise TypeError(f"Limits(accept_rate={rate!r}): pass connections a second")
            if not math.isfinite(rate) or rate <= 0:
                raise ValueError(
                    f"Limits(accept_rate={rate!r}): pass more than 0 connections a second"
                )
        if self.when_full not in ("wait", "reject"):
            raise ValueError(f'Limits(when_full={self.when_full!r}): pass "wait" or "reject"')


_KINDS: dict[str, type] = {
    "watermarks": Watermarks,
    "timeouts": Timeouts,
    "socket_options": SocketOptions,
    "limits": Limits,
}
