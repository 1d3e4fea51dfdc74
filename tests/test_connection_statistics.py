"""ConnectionStatistics: the counters are true at every moment, and after the end."""

from __future__ import annotations

import dataclasses

import pytest
import trio
import trio.testing

from tests.simulated import simulated
from trioreactor import TcpConnection, Watermarks
from trioreactor.buffer import Buffer
from trioreactor.connection_statistics import ConnectionStatistics


async def test_the_counters() -> None:
    """Received, sent, queued and the crossings are counted as they happen, and stay readable."""
    conn, sock = simulated(room=5, watermarks=Watermarks(high=10, low=2))
    assert conn.statistics() == ConnectionStatistics(
        bytes_received=0, bytes_sent=0, buffered=0, pauses=0, resumes=0, dropped=0
    )
    sock.peer_sends(b"abc")
    await conn.receive_some(2)
    assert conn.statistics().bytes_received == 2
    await conn.receive_some()
    for _ in range(2):
        conn.send(bytes(20))
        conn.send(bytes(5))
        sock.peer_takes(20)
        await trio.testing.wait_all_tasks_blocked()
        sock.peer_takes(5)
        await trio.testing.wait_all_tasks_blocked()
    conn.send(bytes(11 + sock.room))
    expected = ConnectionStatistics(
        bytes_received=3, bytes_sent=len(sock.output), buffered=11, pauses=3, resumes=2, dropped=0
    )
    assert conn.statistics() == expected
    conn.force_close()
    assert conn.statistics() == dataclasses.replace(expected, buffered=0)


async def test_what_a_callback_has_sent_is_queued() -> None:
    """What is held until the callback returns counts as queued, not as sent."""
    conn, sock = simulated()
    inside: list[ConnectionStatistics] = []

    def on_message(conn: TcpConnection, buffer: Buffer) -> None:
        conn.send(buffer.take())
        inside.append(conn.statistics())
        conn.send(b"more")
        inside.append(conn.statistics())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(conn.dispatch, on_message)
        sock.peer_sends(b"abc")
        await trio.testing.wait_all_tasks_blocked()
        assert [s.buffered for s in inside] == [3, 7]
        assert [s.bytes_sent for s in inside] == [0, 0]
        assert (conn.statistics().bytes_sent, conn.statistics().buffered) == (7, 0)
        conn.force_close()


def test_it_is_a_snapshot() -> None:
    """It is a value that does not change afterwards."""
    statistics = ConnectionStatistics(
        bytes_received=0, bytes_sent=0, buffered=0, pauses=0, resumes=0, dropped=0
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        statistics.buffered = 1  # type: ignore[misc]
