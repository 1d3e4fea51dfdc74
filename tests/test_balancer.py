"""The balancer: clients are spread evenly over those backends that are there at the time."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import ModuleType
from typing import Any

import pytest
import trio
import trio.testing

from tests.conftest import no_leaks, serving, until
from tests.servers import clients, local, rest_of, unused_port
from tests.test_examples import ROOT, load, read_exactly, running
from trioreactor import TcpConnection, TcpServer


@pytest.fixture
def balancer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example. It imports another, as a program from its directory does."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    return load("balancer")


def backend(port: int) -> TcpServer:
    """A server that tells each client its port and then echoes."""

    async def handler(conn: TcpConnection) -> None:
        await conn.send_all(b"%5d" % port)
        async for data in conn:
            await conn.send_all(data)

    return TcpServer(handler, port, host="127.0.0.1")


async def backend_of(client: trio.SocketStream) -> int:
    """The port of the backend that a new client has been given."""
    return int(await read_exactly(client, 5))


async def spread(streams: list[trio.SocketStream]) -> Counter[int]:
    """How many of these new clients each backend has."""
    return Counter([await backend_of(stream) for stream in streams])


@asynccontextmanager
async def balancing(
    example: ModuleType, *ports: int
) -> AsyncIterator[tuple[TcpServer, Any, Callable[[], list[int]]]]:
    """A server with the example's handler for backends at these ports of loopback, its address, and
    what tells how many clients it thinks that each backend has.
    """
    handler = example.Balancer([("127.0.0.1", port) for port in ports])
    server = local(handler)

    def counts() -> list[int]:
        return [handler.clients["127.0.0.1", port] for port in ports]

    async with no_leaks(), serving(server) as address:
        yield server, address, counts
    assert counts() == [0] * len(ports)


async def test_even_spread(balancer: ModuleType) -> None:
    """Clients that come at once are spread evenly; newcomers go where some have left."""
    with unused_port() as one, unused_port() as other:
        async with (
            balancing(balancer, one, other) as (_, address, counts),
            serving(backend(one)),
            serving(backend(other)),
        ):
            async with clients(address, 40) as first:
                ports = [await backend_of(client) for client in first]
                assert Counter(ports) == {one: 20, other: 20}
                assert counts() == [20, 20]
                leaving = [c for c, port in zip(first, ports, strict=True) if port == other][:10]
                for client in leaving:
                    await client.aclose()
                await until(lambda: counts() == [20, 10])
                async with clients(address, 10) as second:
                    assert await spread(second) == {other: 10}
                    # Bytes come through, to each its own.
                    for number, client in enumerate(second):
                        await client.send_all(b"%d" % number)
                    for number, client in enumerate(second):
                        assert await read_exactly(client, 1) == b"%d" % number
            await until(lambda: counts() == [0, 0])


async def test_one_dies(balancer: ModuleType) -> None:
    """With one backend dead all clients go to the other, and those that it had are let go; while it
    rests nobody tries it.
    """
    with unused_port() as one, unused_port() as other:
        async with (
            balancing(balancer, one, other) as (_, address, counts),
            serving(backend(other)),
            clients(address, 4) as first,
        ):
            async with serving(backend(one)):
                ports = [await backend_of(client) for client in first]
                assert Counter(ports) == {one: 2, other: 2}
            for client, port in zip(first, ports, strict=True):
                if port == one:
                    assert await rest_of(client) == b""
                    await client.aclose()
            await until(lambda: counts() == [0, 2])

            balancer.REST_SECONDS = 1000
            async with clients(address, 3) as second:
                assert await spread(second) == {other: 3}
                assert counts() == [0, 5]
                # It rests, so nobody tries it, though it has the fewest.
                async with serving(backend(one)), clients(address, 1) as third:
                    assert await spread(third) == {other: 1}
            await until(lambda: counts() == [0, 2])


async def test_rest(balancer: ModuleType, mock_clock: trio.testing.MockClock) -> None:
    """A backend that has failed is tried again when its seconds are over, not before."""
    with unused_port() as one, unused_port() as other:
        async with (
            balancing(balancer, one, other) as (_, address, counts),
            serving(backend(other)),
        ):
            async with clients(address, 1) as first:
                assert await spread(first) == {other: 1}
            async with serving(backend(one)):
                for seconds, port in ((balancer.REST_SECONDS - 1, other), (1, one)):
                    mock_clock.jump(seconds)
                    async with clients(address, 1) as next_one:
                        assert await spread(next_one) == {port: 1}
                    while any(counts()):
                        await trio.lowlevel.checkpoint()


async def test_both_dead(balancer: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    """With no backend alive clients are closed, and the balancer stays; the last resort is one that
    rests.
    """
    with unused_port() as one, unused_port() as other:
        async with balancing(balancer, one, other) as (server, address, counts):
            async with clients(address, 5) as lost:
                for client in lost:
                    assert await rest_of(client) == b""
            await until(lambda: not server.connections)
            assert counts() == [0, 0]
            async with serving(backend(other)), clients(address, 3) as served:
                assert await spread(served) == {other: 3}
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_statistics(balancer: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """At its end the program tells how many clients each backend had, none left out."""
    with unused_port() as one, unused_port() as other, unused_port() as dead:
        names = [f"127.0.0.1:{port}" for port in (one, other, dead)]
        async with (
            running("balancer", *names) as to,
            serving(backend(one)),
            serving(backend(other)),
        ):
            streams = [await to() for _ in range(6)]
            assert await spread(streams) == {one: 3, other: 3}
            for stream in streams:
                await stream.aclose()
    told = [f"{name} had {n} clients" for name, n in zip(names, (3, 3, 0), strict=True)]
    assert capsys.readouterr().out.splitlines()[1:] == told
