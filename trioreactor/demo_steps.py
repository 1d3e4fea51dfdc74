"""The demo's steps. Each makes the real thing happen and reports what it saw."""

from __future__ import annotations

import hashlib
import socket
import struct
import time
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial

import trio

from trioreactor.classic import SERVICES
from trioreactor.connection_callbacks import Handler
from trioreactor.demo_exhaustion import exhaustion
from trioreactor.demo_load import CONNECTIONS, MESSAGE_SIZE, make_load
from trioreactor.demo_reconnect import reconnect
from trioreactor.demo_report import Report, Step, count, resident_memory
from trioreactor.options import SocketOptions, Watermarks
from trioreactor.state import CloseReason
from trioreactor.tcp_connection import TcpConnection
from trioreactor.tcp_server import TcpServer

_HOST = "127.0.0.1"
_MIB = 2**20

# What is kept small here is the kernel's part of each connection: its own tuning can give one
# many megabytes, and then nothing would be queued in ours for long.
_SMALL_BUFFERS = SocketOptions(send_buffer=65536, receive_buffer=65536)


@asynccontextmanager
async def _serving(
    handler: Handler, socket_options: SocketOptions = SocketOptions()
) -> AsyncGenerator[tuple[TcpServer, int]]:
    """A server and its port; closed at the end."""
    server = TcpServer(handler, 0, host=_HOST, socket_options=socket_options)
    async with trio.open_nursery() as nursery:
        (acceptor,) = await nursery.start(server.serve)
        yield server, acceptor.address[1]
        server.close()


@asynccontextmanager
async def _serving_plain_trio() -> AsyncGenerator[int]:
    """The same with what trio has, whose end is the end of the block; gives the port."""

    async def handler(stream: trio.SocketStream) -> None:
        async for data in stream:
            await stream.send_all(data)

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, handler, 0, host=_HOST))
        yield listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def _connect(port: int) -> TcpConnection:
    return TcpConnection(await trio.open_tcp_stream(_HOST, port))


# -- 1


async def _echo(report: Report) -> None:
    for mode in ("coroutine", "dispatch"):
        async with _serving(SERVICES["echo"].handlers[mode]) as (_, port):
            await _measure_echo(report, f"{mode} mode", port)
    async with _serving_plain_trio() as port:
        await _measure_echo(report, "plain trio.serve_tcp", port)


async def _measure_echo(report: Report, label: str, port: int) -> None:
    cpu = time.process_time()
    result = await make_load(port, 0.8)
    cpu = time.process_time() - cpu
    trips = result["round_trips"]
    report.check(
        label,
        f"{cpu / max(1, trips) * 1e6:4.1f} us of server CPU a round trip, "
        f"{trips / result['seconds']:,.0f} round trips/s, {result['wrong']} wrong",
        holds=trips > 0 and not result["wrong"],
    )


# -- 2

_CHUNK = 65536
_CHUNKS = 256
_STOPS = 3
_READ_BETWEEN = 4 * _MIB
# Resident memory moves a little by itself: the allocator's arenas, the interpreter's caches.
_FLAT = 4 * _MIB


async def _slow_reader(report: Report) -> None:
    marks = Watermarks()
    highs: list[int] = []
    lows: list[int] = []
    sent, received = hashlib.sha256(), hashlib.sha256()
    congested = trio.Event()
    opened: list[TcpConnection] = []

    def on_high(_conn: TcpConnection, size: int) -> None:
        highs.append(size)
        congested.set()

    def on_low(_conn: TcpConnection, size: int) -> None:
        nonlocal congested
        lows.append(size)
        congested = trio.Event()

    async def handler(conn: TcpConnection) -> None:
        conn.high_water_mark_callback = on_high
        conn.low_water_mark_callback = on_low
        opened.append(conn)
        for number in range(_CHUNKS):
            # A new object each time, or queueing would cost no memory.
            chunk = number.to_bytes(8, "big") * (_CHUNK // 8)
            sent.update(chunk)
            await conn.send_all(chunk)
        await conn.wait_drained()

    resident = most = resident_memory()
    size = 0
    async with _serving(handler, _SMALL_BUFFERS) as (server, port):
        # Small on this side, too, which must be said before the handshake.
        sock = trio.socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        await sock.connect((_HOST, port))
        async with TcpConnection(trio.SocketStream(sock)) as client:
            for stop in range(_STOPS):
                # The kernels' buffers are full, and then ours.
                await congested.wait()
                (conn,) = opened
                await trio.sleep(0.1 if stop else 1)
                most = max(most or 0, resident_memory() or 0)
                if not stop:
                    report.check(
                        "it does not read for 1 s",
                        f"high mark ({marks.high:,}) fired {count(len(highs), 'time')}, low "
                        f"{count(len(lows), 'time')}; {conn.statistics().buffered:,} bytes queued",
                        holds=(len(highs), len(lows)) == (1, 0)
                        and marks.low < conn.statistics().buffered <= highs[0],
                    )
                until = size + _READ_BETWEEN
                while size < until:
                    data = await client.receive_some()
                    received.update(data)
                    size += len(data)
            async for data in client:
                received.update(data)
                size += len(data)
        done = server.statistics()
    report.check(
        f"it reads, and stops {_STOPS} times",
        f"high {count(len(highs), 'time')}, low ({marks.low:,}) {count(len(lows), 'time')}; "
        f"at most {max(highs):,} bytes queued",
        holds=len(highs) == len(lows) == done.pauses == done.resumes
        and max(lows) <= marks.low
        and max(highs) <= marks.high + _CHUNK,
    )
    equal = received.digest() == sent.digest()
    report.check(
        "all of it arrived",
        f"{size / _MIB:.0f} MiB, {'equal' if equal else 'NOT equal'} to what was sent",
        holds=equal and size == _CHUNK * _CHUNKS,
    )
    if resident is not None and most is not None:
        report.check(
            "memory, when it was most",
            f"{(most - resident) / _MIB:+.1f} MiB on {resident / _MIB:.1f} MiB",
            holds=most - resident < _FLAT,
        )


# -- 3

_CARRIED_ON = 20
_RESETS = 5


async def _resets(report: Report) -> None:
    trips = Counter[int]()
    wrong = 0
    slowest = 0.0
    enough = trio.Event()

    async def carry_on(number: int, port: int) -> None:
        nonlocal slowest, wrong
        async with await _connect(port) as conn:
            while not enough.is_set():
                message = b"%d/%d" % (number, trips[number])
                begun = trio.current_time()
                conn.send(message)
                wrong += await conn.receive_some() != message
                slowest = max(slowest, trio.current_time() - begun)
                trips[number] += 1

    echo = SERVICES["echo"].handlers["coroutine"]
    async with _serving(echo) as (server, port), trio.open_nursery() as nursery:
        for number in range(_CARRIED_ON):
            nursery.start_soon(carry_on, number, port)
        for _ in range(_RESETS):
            await trio.sleep(0.05)
            await _say_hello_and_reset(port)
        before = [trips[number] for number in range(_CARRIED_ON)]
        await trio.sleep(0.3)
        reset = server.statistics().closed.get(CloseReason.PEER_RESET, 0)
        went_on = sum(trips[number] > before[number] for number in range(_CARRIED_ON))
        enough.set()
    report.check(
        f"{_RESETS} peers reset",
        f"{count(reset, 'connection')} closed, reason {CloseReason.PEER_RESET.name}",
        holds=reset == _RESETS,
    )
    report.check(
        f"{_CARRIED_ON} others",
        f"{went_on} carried on: {trips.total():,} round trips, {wrong} wrong, "
        f"slowest {slowest * 1e3:.1f} ms",
        holds=went_on == _CARRIED_ON and not wrong,
    )
    outcome = "one such reset, and it still serves"
    try:
        async with _serving_plain_trio() as port:
            await _say_hello_and_reset(port)
            await trio.sleep(0.3)
    except* trio.BrokenResourceError:
        outcome = "one such reset ended all of it, with BrokenResourceError"
    report.line("plain trio.serve_tcp", outcome)


async def _say_hello_and_reset(port: int) -> None:
    """What a load balancer's health check does: connect, exchange a little, close with RST."""
    stream = await trio.open_tcp_stream(_HOST, port)
    await stream.send_all(b"hello")
    await stream.receive_some()
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    await stream.aclose()


# -- 5


async def _force_close(report: Report) -> None:
    await _force_close_blocked(report, "force_close()", reset=False)
    await _force_close_blocked(report, "force_close(reset=True)", reset=True)


async def _force_close_blocked(report: Report, label: str, *, reset: bool) -> None:
    blocked, ended = trio.Event(), trio.Event()
    opened: list[TcpConnection] = []

    def on_high(_conn: TcpConnection, _size: int) -> None:
        blocked.set()

    async def handler(conn: TcpConnection) -> None:
        opened.append(conn)
        conn.high_water_mark_callback = on_high
        try:
            await conn.send_all(bytes(32 * _MIB))
        finally:
            ended.set()

    async with _serving(handler) as (server, port), await _connect(port) as client:
        await blocked.wait()
        (conn,) = opened
        begun = trio.current_time()
        conn.force_close(reset=reset)
        await ended.wait()
        waited = trio.current_time() - begun
        seen = "EOF"
        try:
            async for _ in client:
                pass
        except trio.BrokenResourceError:
            seen = "a reset"
        left = len(server.connections)
    reason = conn.close_reason.name if conn.close_reason else None
    report.check(
        label,
        f"handler ended after {waited * 1e3:.1f} ms, reason {reason}, peer saw {seen}",
        holds=conn.close_reason is CloseReason.FORCED
        and not left
        and seen == ("a reset" if reset else "EOF"),
    )


# -- 6

_IDLE = 8
_GRACE = 0.6


async def _drain(report: Report) -> None:
    roles = [b"idle"] * _IDLE + [b"busy", b"stubborn"]
    ready = 0
    all_ready = trio.Event()
    answers: list[bytes] = []

    async def handler(conn: TcpConnection) -> None:
        nonlocal ready
        role = await conn.receive_some()
        ready += 1
        if ready == len(roles):
            all_ready.set()
        if role == b"stubborn":
            await trio.sleep_forever()
        await conn.draining.wait()
        if role == b"busy":
            await trio.sleep(_GRACE / 3)
            await conn.send_all(b"done")

    async def be_client(role: bytes, port: int) -> None:
        async with await _connect(port) as conn:
            conn.send(role)
            answers.append(b"".join([data async for data in conn]))

    server = TcpServer(handler, 0, host=_HOST)
    async with trio.open_nursery() as nursery:
        (acceptor,) = await nursery.start(server.serve)
        port = acceptor.address[1]
        for role in roles:
            nursery.start_soon(be_client, role, port)
        await all_ready.wait()
        report.line(
            count(ready, "connection"),
            f"{_IDLE} idle, 1 at work, 1 that never ends; drain({_GRACE})",
        )
        drained = await server.drain(_GRACE)
    report.check(
        "its report",
        f"{drained.finished} finished, {len(drained.forced)} forced, {len(drained.stuck)} stuck, "
        f"after {drained.seconds:.2f} s",
        holds=(drained.finished, len(drained.forced), drained.stuck) == (_IDLE + 1, 1, ()),
    )
    done = answers.count(b"done")
    report.check(
        "the one at work",
        "finished, and its client has the answer" if done else "its client got no answer",
        holds=done == 1,
    )
    try:
        await (await trio.open_tcp_stream(_HOST, port)).aclose()
        refused = False
    except OSError:
        refused = True
    report.check("a newcomer", "is refused" if refused else "was accepted", holds=refused)


STEPS = (
    Step(f"Echo: {CONNECTIONS} connections, {MESSAGE_SIZE} bytes there and back", _echo),
    Step("A reader that stops reading", _slow_reader),
    Step("Peers that reset while others carry on", _resets),
    Step("Out of descriptors, in a process of its own", exhaustion),
    Step("force_close() of a handler that waits to send", _force_close),
    Step("drain()", _drain),
    Step("A client that loses its server, and returns", reconnect),
)
"""All of them, in order."""
