"""reset_backoff: who knows better than `reset_after` may say so."""

from __future__ import annotations

from itertools import pairwise

import pytest
import trio

from tests.conftest import serving
from tests.servers import unused_port
from trioreactor import Backoff, ConnectAttempt, Connector, TcpClient, TcpConnection, TcpServer

STEADY = Backoff(initial=1, maximum=8, jitter="none")


async def test_it_ends_the_wait_and_begins_the_delays_anew(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The attempt after it comes at once, and the delay after that one is the first again."""
    attempts: list[ConnectAttempt] = []
    begun = trio.current_time()
    with unused_port() as port:
        connector = Connector("127.0.0.1", port, backoff=STEADY, on_attempt=attempts.append)
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
    connector = Connector("127.0.0.1", 1)
    connector.reset_backoff()
    assert connector.attempts == 0
