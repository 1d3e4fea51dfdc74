"""The classic TCP services, each in both modes: echo, discard, chargen, daytime and time.

Small enough to read, and complete: they bound their memory, they throw away what clients send
where the RFC says so, and they serve a client that half-closes until it is done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType

import trio

from trioreactor.buffer import Buffer
from trioreactor.connection_callbacks import Handler
from trioreactor.tcp_connection import TcpConnection

# RFC 864: the 95 printable ASCII characters, in lines of 72, each line begun one character later.
# After 95 lines it is back where it was, so those are the whole stream.
_PRINTABLE = bytes(range(0x20, 0x7F))
CHARGEN_LINES = b"".join(
    (_PRINTABLE * 2)[start : start + 72] + b"\r\n" for start in range(len(_PRINTABLE))
)

# RFC 868 counts from 1900, Unix from 1970.
_SECONDS_1900_TO_1970 = 2_208_988_800


def daytime_line(now: datetime) -> bytes:
    """The moment as RFC 867's first example writes it: one line of ASCII."""
    return now.strftime("%A, %B %d, %Y %H:%M:%S-%Z\r\n").encode("ascii")


def time_word(unix_seconds: float) -> bytes:
    """The moment as RFC 868 has it: seconds since 1900, 32 bits, which begin anew in 2036."""
    return ((int(unix_seconds) + _SECONDS_1900_TO_1970) % 2**32).to_bytes(4, "big")


# -- coroutine mode


async def echo(conn: TcpConnection) -> None:
    """Send back what comes (RFC 862)."""
    async for data in conn:
        # Not send_all: cancelled, it may not have taken the data, which would be lost then.
        if not conn.send(data):
            await conn.wait_send_all_might_not_block()


async def discard(conn: TcpConnection) -> None:
    """Throw away what comes (RFC 863); the server's statistics count it."""
    async for _ in conn:
        pass


async def chargen(conn: TcpConnection) -> None:
    """Send characters as fast as the client reads, until it is gone (RFC 864)."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(discard, conn)
        while True:
            await conn.send_all(CHARGEN_LINES)


async def daytime(conn: TcpConnection) -> None:
    """Send the time as a line of text (RFC 867)."""
    await conn.send_all(daytime_line(datetime.now(UTC)))


async def time_since_1900(conn: TcpConnection) -> None:
    """Send the time as a number (RFC 868)."""
    await conn.send_all(time_word(time.time()))


# -- dispatch mode


async def dispatch_echo(conn: TcpConnection) -> None:
    """`echo`, in callbacks."""
    await conn.dispatch(_send_back, low_water_mark=_read_on)


def _send_back(conn: TcpConnection, buffer: Buffer) -> None:
    if not conn.send(buffer.take()):
        # The client does not read its answers, so its next questions can wait in the kernel.
        conn.stop_reading()


def _read_on(conn: TcpConnection, _size: int) -> None:
    conn.start_reading()


async def dispatch_discard(conn: TcpConnection) -> None:
    """`discard`, in callbacks."""
    await conn.dispatch(_throw_away)


def _throw_away(_conn: TcpConnection, buffer: Buffer) -> None:
    buffer.discard(len(buffer))


async def dispatch_chargen(conn: TcpConnection) -> None:
    """`chargen`, in callbacks: each block is sent when the one before is with the kernel."""
    conn.write_complete_callback = _send_more
    conn.send(CHARGEN_LINES)
    await conn.dispatch(_throw_away)
    # The client will send nothing more, but it may read on.
    await conn.wait_closed()


def _send_more(conn: TcpConnection) -> None:
    conn.send(CHARGEN_LINES)


def _say_once(make: Callable[[], bytes]) -> Handler:
    """A handler that sends one message, half-closes, and leaves the close to the client."""

    async def handler(conn: TcpConnection) -> None:
        conn.send(make())
        conn.shutdown()
        await conn.dispatch(_throw_away)

    return handler


dispatch_daytime = _say_once(lambda: daytime_line(datetime.now(UTC)))
dispatch_time = _say_once(lambda: time_word(time.time()))


# -- all of them


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """One classic service."""

    summary: str
    """What it does, in a line."""
    rfc: int
    """Where it is defined."""
    well_known_port: int
    """The port that the RFC gives it. Ports below 1024 are commonly for root only."""
    try_it: str
    """A shell command that uses it; ``{port}`` stands for the port."""
    handlers: Mapping[str, Handler]
    """The handler of each mode."""


def _modes(coroutine: Handler, dispatch: Handler) -> Mapping[str, Handler]:
    return MappingProxyType({"coroutine": coroutine, "dispatch": dispatch})


SERVICES: Mapping[str, Service] = MappingProxyType(
    {
        "echo": Service(
            summary="send back everything that a client sends",
            rfc=862,
            well_known_port=7,
            try_it="nc 127.0.0.1 {port}      and type something",
            handlers=_modes(echo, dispatch_echo),
        ),
        "discard": Service(
            summary="throw away everything that a client sends, and count it",
            rfc=863,
            well_known_port=9,
            try_it="head -c 100000000 /dev/zero | nc 127.0.0.1 {port}",
            handlers=_modes(discard, dispatch_discard),
        ),
        "chargen": Service(
            summary="send printable characters for as long as a client reads",
            rfc=864,
            well_known_port=19,
            try_it="nc 127.0.0.1 {port} | head -20",
            handlers=_modes(chargen, dispatch_chargen),
        ),
        "daytime": Service(
            summary="tell each client the time as a line of text, then close",
            rfc=867,
            well_known_port=13,
            try_it="nc 127.0.0.1 {port}",
            handlers=_modes(daytime, dispatch_daytime),
        ),
        "time": Service(
            summary="tell each client the seconds since 1900 as 32 bits, then close",
            rfc=868,
            well_known_port=37,
            try_it="nc 127.0.0.1 {port} | od -An -tu4 --endian=big",
            handlers=_modes(time_since_1900, dispatch_time),
        ),
    }
)


def until_drained(handler: Handler) -> Handler:
    """*handler*, cancelled when the server drains; what it has sent by then still leaves.

    Right for handlers that lose nothing by a cancellation, as all of these.
    """

    async def wrapped(conn: TcpConnection) -> None:
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                await conn.draining.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            await handler(conn)
            nursery.cancel_scope.cancel()

    return wrapped
