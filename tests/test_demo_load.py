"""The demo's load client: it measures what a server really does."""

from __future__ import annotations

import pytest
import trio

from tests.conftest import echo, no_leaks, serving
from trioreactor import TcpConnection, TcpServer
from trioreactor.demo_load import CONNECTIONS, MESSAGE_SIZE, make_load

pytestmark = [pytest.mark.program, pytest.mark.shown]


async def test_load() -> None:
    """Every round trip that it reports went through the server, on all its connections."""
    server = TcpServer(echo, 0, host="127.0.0.1")
    async with no_leaks(), serving(server) as (_, port):
        with trio.fail_after(20):
            result = await make_load(port, 0.1)
        while server.connections:
            await trio.sleep(0.001)
        statistics = server.statistics()
    assert statistics.opened == CONNECTIONS
    assert result["wrong"] == 0
    assert result["seconds"] >= 0.1
    assert result["round_trips"] > 0
    assert statistics.bytes_received == result["round_trips"] * MESSAGE_SIZE


async def test_wrong_answers() -> None:
    """A server that answers something else is found out, message by message."""

    async def liar(conn: TcpConnection) -> None:
        async for data in conn:
            await conn.send_all(bytes(byte ^ 1 for byte in data))

    async with no_leaks(), serving(TcpServer(liar, 0, host="127.0.0.1")) as (_, port):
        with trio.fail_after(20):
            result = await make_load(port, 0.1)
    assert result["wrong"] == result["round_trips"] > 0
