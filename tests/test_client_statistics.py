"""ClientStatistics: a client's counters hold together at every moment, whatever it meets."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import FrozenInstanceError, fields
from typing import TYPE_CHECKING

import pytest
import trio

from tests.conftest import no_leaks, refusing, serving
from trioreactor import (
    ClientStatistics,
    CloseReason,
    ConnectError,
    TcpClient,
    TcpConnection,
    TcpServer,
)
from trioreactor.connection_counters import ConnectionTotals

if TYPE_CHECKING:
    from collections.abc import Iterator

AT_ONCE = [0.0] * 100


class EveryStep(trio.abc.Instrument):
    """Asks after every step of every task."""

    def __init__(self, ask: Callable[[], ClientStatistics]) -> None:
        self.ask = ask
        self.seen: list[ClientStatistics] = []

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self.seen.append(self.ask())


@contextmanager
def every_step(client: TcpClient) -> Iterator[list[ClientStatistics]]:
    """The client's statistics at every moment that anybody else could have asked."""
    instrument = EveryStep(client.statistics)
    trio.lowlevel.add_instrument(instrument)
    try:
        yield instrument.seen
    finally:
        trio.lowlevel.remove_instrument(instrument)


async def obey(conn: TcpConnection) -> None:
    """A server's handler: it ends the connection as the client's first byte says."""
    command = await conn.receive_some(1)
    await conn.send_all(b"so be it")
    if command == b"r":
        conn.force_close(reset=True)
    elif command == b"w":
        await conn.receive_some()


async def test_every_moment() -> None:
    """Promise C holds after every step of every task, and no counter ever sinks; in the end each
    connection has its reason, and the bytes of all of them are there.
    """
    endings: list[CloseReason] = []

    async def handler(conn: TcpConnection) -> None:
        number = client.statistics().opened
        if number == 1:
            await conn.send_all(b"f")
            async for _ in conn:
                pass
            endings.append(CloseReason.PEER_EOF)
        elif number == 2:
            await conn.send_all(b"r")
            endings.append(CloseReason.PEER_RESET)
            async for _ in conn:
                pass
        elif number == 3:
            await conn.send_all(b"w")
            await conn.receive_some()
            endings.append(CloseReason.LOCAL_CLOSE)
        elif number == 4:
            endings.append(CloseReason.FORCED)
            conn.force_close()
        else:
            await conn.send_all(b"w")
            await conn.receive_some()
            endings.append(CloseReason.LOCAL_CLOSE)
            client.disconnect()

    async with no_leaks(), serving(TcpServer(obey, 0, host="127.0.0.1")) as address:
        client = TcpClient(*address, backoff=AT_ONCE)
        with every_step(client) as seen:
            await client.run(handler)
    assert len(seen) > 50
    for now in seen:
        assert now.opened - sum(now.closed.values()) == now.active
        # One connection at a time.
        assert now.active in (0, 1)
        assert now.opened <= now.attempts
    for counter in ("opened", "attempts", "bytes_received", "bytes_sent"):
        values = [getattr(now, counter) for now in seen]
        assert values == sorted(values)
    last = client.statistics()
    assert (last.opened, last.active, last.attempts, dict(last.failures)) == (5, 0, 5, {})
    assert dict(last.closed) == {reason: endings.count(reason) for reason in endings}
    assert last.closed[CloseReason.LOCAL_CLOSE] == 2
    assert last.bytes_sent == 4
    # What a reset destroyed is not received.
    assert last.bytes_received in (3 * 8, 4 * 8)
    assert last.buffered == 0


async def test_failures() -> None:
    """Attempts that fail are counted by their error, beside those that do not."""
    async with serving(TcpServer(obey, 0, host="127.0.0.1")) as address:
        with refusing() as nobody:
            client = TcpClient(
                endpoints=[nobody.getsockname(), "/no/such/socket", address], backoff=AT_ONCE
            )

            async def handler(conn: TcpConnection) -> None:
                if client.statistics().opened == 3:
                    client.stop()

            with every_step(client) as seen:
                await client.run(handler)
    for now in seen:
        # A connection is counted as opened in the step that connected it.
        assert now.attempts == now.opened + sum(now.failures.values())
    assert dict(client.statistics().failures) == {"ECONNREFUSED": 3, "ENOENT": 3}
    assert client.statistics().attempts == 9


async def test_it_survives_the_end() -> None:
    """The counters stay when a run has ended, and the next one adds to them."""
    with refusing() as nobody:
        client = TcpClient(*nobody.getsockname(), backoff=AT_ONCE, max_attempts=3)
        for run in (1, 2):
            with pytest.raises(ConnectError):
                await client.run(obey)
            assert dict(client.statistics().failures) == {"ECONNREFUSED": 3 * run}
            assert client.statistics().attempts == 3 * run


async def test_what_was_given_out_does_not_change() -> None:
    """Statistics are neither changed by what comes nor a way to change the counters."""
    with refusing() as nobody:
        client = TcpClient(*nobody.getsockname(), backoff=AT_ONCE, max_attempts=1)
        before = client.statistics()
        with pytest.raises(ConnectError):
            await client.run(obey)
    after = client.statistics()
    assert (before.attempts, dict(before.failures)) == (0, {})
    with pytest.raises(TypeError):
        after.failures["ECONNREFUSED"] = 5  # type: ignore[index]
    with pytest.raises(FrozenInstanceError):
        after.attempts = 5  # type: ignore[misc]
    assert dict(client.statistics().failures) == {"ECONNREFUSED": 1}


def test_it_has_what_a_server_has() -> None:
    """Whoever reads a server's counters reads a client's by the same names."""
    own = {field.name for field in fields(ClientStatistics)}
    shared = {field.name for field in fields(ConnectionTotals)}
    assert own == shared | {"attempts", "failures"}
