"""reset_backoff: who knows better than `reset_after` may say so."""

from __future__ import annotations

import socket
from itertools import pairwise

import pytest
import trio

from tests.conftest import serving
from trioreactor import Backoff, ConnectAttempt, Connector, TcpClient, TcpConnection, TcpServer
from trioreactor.connector import OnAttempt

STEADY = Backoff(initial=1, maximum=8, jitter="none")


def closed_port() -> int:
    """A port on loopback where nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def failing(attempts: list[ConnectAttempt], on_attempt: OnAttempt | None = None) -> Connector:
    def note(attempt: ConnectAttempt) -> None:
        attempts.append(attempt)
        if on_attempt is not None:
            on_attempt(attempt)

    return Connector("127.0.0.1", closed_port(), backoff=STEADY, on_attempt=note)


async def test_it_ends_the_wait_and_begins_the_delays_anew(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The attempt after it comes at once, and the delay after that one is the first again."""
    attempts: list[ConnectAttempt] = []
    connector = failing(attempts)
    begun = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connector.connect)
        await trio.sleep(1 + 2 + 4 - 0.5)
        assert [attempt.delay for attempt in attempts] == [1, 2, 4]
        connector.reset_backoff()
        await trio.testing.wait_all_tasks_blocked(0.005)
        assert [attempt.delay for attempt in attempts] == [1, 2, 4, 1]
        assert trio.current_time() - begun < 7
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("proven", [False, True])
async def test_a_connection_that_proved_itself_makes_the_delays_begin_anew(
    proven: bool, autojump_clock: trio.testing.MockClock
) -> None:
    """However short it lived, the next delay is the first; without the word, they go on."""
    begun: list[float] = []

    async def hang_up(conn: TcpConnection) -> None:
        conn.force_close()

    async def handler(conn: TcpConnection) -> None:
        begun.append(trio.current_time())
        if proven:
            client.reset_backoff()
        await conn.wait_eof()
        if len(begun) == 4:
            client.stop()

    async with serving(TcpServer(hang_up, 0, host="127.0.0.1")) as (host, port):
        client = TcpClient(host, port, handler, backoff=STEADY)
        await client.run()
    gaps = [round(after - before) for before, after in pairwise(begun)]
    assert gaps == ([1, 1, 1] if proven else [1, 2, 4])


async def test_idle_it_changes_nothing_else() -> None:
    """Called while nobody connects, it neither raises nor connects."""
    connector = Connector("127.0.0.1", closed_port())
    connector.reset_backoff()
    assert connector.attempts == 0
