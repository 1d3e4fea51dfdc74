"""The classic services: their formats, and what they do with awkward clients."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import pytest
import trio

from tests.conftest import connect, no_leaks, reset, serving, until
from trioreactor import CloseReason, TcpServer
from trioreactor.classic import (
    CHARGEN_LINES,
    SERVICES,
    daytime_line,
    echo,
    time_word,
    until_drained,
)

each_mode = pytest.mark.parametrize("mode", ["coroutine", "dispatch"])
each_service = pytest.mark.parametrize("name", list(SERVICES))


@asynccontextmanager
async def service(name: str, mode: str) -> AsyncIterator[tuple[TcpServer, trio.SocketStream]]:
    """The service as the command line runs it, and a client of it."""
    handler = until_drained(SERVICES[name].handlers[mode])
    server = TcpServer(handler, 0, host="127.0.0.1")
    async with no_leaks(), serving(server) as address:
        with trio.fail_after(20):
            async with connect(address) as client:
                await until(lambda: server.statistics().opened)
                yield server, client


async def read_to_eof(stream: trio.SocketStream) -> bytes:
    return b"".join([data async for data in stream])


def test_daytime_line() -> None:
    """RFC 867's own form of a moment."""
    moment = datetime(1982, 2, 22, 17, 37, 43, tzinfo=UTC)
    assert daytime_line(moment) == b"Monday, February 22, 1982 17:37:43-UTC\r\n"


@pytest.mark.parametrize(
    ("unix_seconds", "word"),
    [
        # RFC 868's own examples: 1970, 1976, 1980, and 1983.
        (0, 2_208_988_800),
        (189_302_400, 2_398_291_200),
        (315_532_800, 2_524_521_600),
        (420_595_200, 2_629_584_000),
        # The last second of the 32 bits, with a fraction, and the first one after.
        (2_085_978_495.9, 4_294_967_295),
        (2_085_978_496, 0),
    ],
)
def test_time_word(unix_seconds: float, word: int) -> None:
    """RFC 868's seconds, which begin anew in 2036."""
    assert time_word(unix_seconds) == word.to_bytes(4, "big")


def test_chargen_lines() -> None:
    """Every printable character in every column, and the end fits the beginning."""
    lines = CHARGEN_LINES.split(b"\r\n")
    assert lines.pop() == b""
    assert len(lines) == 95
    assert {len(line) for line in lines} == {72}
    for line, following in zip(lines, [*lines[1:], lines[0]], strict=True):
        assert line[1:] == following[:-1]
    assert {bytes([line[0]]) for line in lines} == {bytes([c]) for c in range(32, 127)}


@each_mode
async def test_echo_loses_nothing_in_a_drain(mode: str) -> None:
    """What the server has received when the drain begins comes back, before the EOF."""
    sent = os.urandom(30_000)
    async with service("echo", mode) as (server, client):
        await client.send_all(sent)
        await until(lambda: server.statistics().bytes_received == len(sent))
        report = await server.drain(20)
        assert await read_to_eof(client) == sent
        assert (report.finished, report.forced) == (1, ())


async def test_echo_cancelled_with_data_in_its_hands() -> None:
    """What it has received it sends, though it is cancelled in that very moment."""

    class Conn:
        sent = b""

        def __aiter__(self) -> Conn:
            return self

        async def __anext__(self) -> bytes:
            await trio.lowlevel.checkpoint()
            scope.cancel()
            return b"hello"

        def send(self, data: bytes) -> bool:
            self.sent += data
            return False

        async def wait_send_all_might_not_block(self) -> None:
            await trio.lowlevel.checkpoint()

        async def send_all(self, data: bytes) -> None:
            await trio.lowlevel.checkpoint()
            self.sent += data

    conn = Conn()
    with trio.CancelScope() as scope:
        await echo(conn)  # type: ignore[arg-type]
    assert scope.cancelled_caught
    assert conn.sent == b"hello"


@each_mode
async def test_echo_keeps_its_memory(mode: str) -> None:
    """From a client that sends and does not read, no more is read than is queued."""
    async with service("echo", mode) as (server, client):
        (conn,) = server.connections.values()
        with trio.move_on_after(0.5):
            while True:
                await client.send_all(bytes(65536))
        assert conn.statistics().pauses == 1
        assert conn.statistics().buffered <= 65536 * 2
        received = conn.statistics().bytes_received
        # As it reads again, all of that comes, and more is read.
        taken = 0
        while taken < received:
            taken += len(await client.receive_some())
        await until(lambda: conn.statistics().bytes_received > received)


@each_mode
async def test_chargen_after_a_half_close(mode: str) -> None:
    """A client that has said all it had to say is served on, until it is gone."""
    async with service("chargen", mode) as (server, client):
        await client.send_all(b"what a client says is thrown away")
        await client.send_eof()
        await until(lambda: server.statistics().bytes_received)
        size = 0
        while size < 10_000_000:
            data = await client.receive_some()
            assert data
            size += len(data)
        await client.aclose()
        await until(lambda: not server.connections)
        assert server.statistics().closed == {CloseReason.PEER_RESET: 1}


@each_mode
async def test_chargen_throws_input_away(mode: str) -> None:
    """A client that sends much and reads nothing is not made to wait for that."""
    async with service("chargen", mode) as (server, client):
        await client.send_all(bytes(20_000_000))
        await until(lambda: server.statistics().bytes_received == 20_000_000)


async def test_dispatch_waits_for_the_client_to_close() -> None:
    """In dispatch mode daytime half-closes: the TIME_WAIT stays with the client."""
    async with service("daytime", "dispatch") as (server, client):
        assert (await read_to_eof(client)).endswith(b"-UTC\r\n")
        assert len(server.connections) == 1
        await client.aclose()
        await until(lambda: not server.connections)
        assert server.statistics().closed == {CloseReason.PEER_EOF: 1}


@each_service
@each_mode
async def test_a_reset_is_no_error(name: str, mode: str, caplog: pytest.LogCaptureFixture) -> None:
    """A client that resets, at once or with data under way, ends its connection and no more."""
    async with service(name, mode) as (server, client):
        reset(client.socket)
        for more in range(20):
            other = socket.create_connection(server.addresses[0])
            if more % 2:
                other.sendall(bytes(100_000 if more % 4 == 1 else 1))
            reset(other)
        await until(lambda: server.statistics().opened == 21 and not server.connections)
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


@each_service
@each_mode
async def test_a_drain_finishes(name: str, mode: str, caplog: pytest.LogCaptureFixture) -> None:
    """Every service ends a client that only reads, in no time and without an error."""
    async with service(name, mode) as (server, client), trio.open_nursery() as nursery:
        nursery.start_soon(read_to_eof, client)
        report = await server.drain(20)
        assert (report.forced, report.stuck) == ((), ())
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
