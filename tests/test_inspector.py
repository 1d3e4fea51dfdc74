"""The inspector: every connection and every task, in the log."""

from __future__ import annotations

import logging

import pytest
import trio
import trio.testing

from tests.conftest import no_leaks
from trioreactor import EventLoopThreadPool, TcpConnection, TcpServer
from trioreactor.inspector import log_everything


async def wait_for_them(conn: TcpConnection) -> None:
    await conn.receive_some()
    conn.stop_reading()
    await trio.sleep_forever()


async def test_log_everything(caplog: pytest.LogCaptureFixture) -> None:
    """A line for the server, one for each connection with what there is to know of it, and one for
    each task with what it waits in. Others have their turn meanwhile.
    """
    caplog.set_level(logging.INFO, "trioreactor.inspector")
    server = TcpServer(wait_for_them, 0, host="127.0.0.1", name="shop")
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve)
        address = server.addresses[0]
        assert isinstance(address, tuple)
        streams = [await trio.open_tcp_stream(*address[:2]) for _ in range(60)]
        await streams[0].send_all(b"hello")
        turns = 0

        async def count_turns() -> None:
            nonlocal turns
            while True:
                turns += 1
                await trio.lowlevel.checkpoint()

        while len(server.connections) < 60 or not any(
            not conn.reading for conn in server.connections.values()
        ):
            await trio.sleep(0.01)
        await trio.testing.wait_all_tasks_blocked()
        next(iter(server.connections.values())).start_draining()
        nursery.start_soon(count_turns)
        await log_everything([server])
        for stream in streams:
            await stream.aclose()
        nursery.cancel_scope.cancel()
    lines = [record.getMessage() for record in caplog.records]
    (line,) = [line for line in lines if line.startswith("server ")]
    assert "<TcpServer shop on 127.0.0.1" in line
    assert "60 opened, 60 active; closed: none; 5 bytes received, 0 sent, 0 queued" in line
    found = [line for line in lines if line.startswith("connection shop-")]
    assert len(found) == 60
    assert sum("; CONNECTED; 5 bytes received" in line for line in found) == 1
    assert sum("; reading is stopped" in line for line in found) == 1
    assert sum("; draining" in line for line in found) == 1
    tasks = [line for line in lines if line.startswith("task ")]
    here = [line for line in tasks if "wait_for_them (test_inspector.py:" in line]
    assert len(here) == 60
    # Where it waits is first; trio's own functions tell nothing.
    assert sum(": receive_some (read_half.py:" in line for line in here) == 59
    assert not any("wait_task_rescheduled" in line for line in here)
    assert len(tasks) > 62
    assert turns > 2


async def test_loops_that_end_meanwhile(caplog: pytest.LogCaptureFixture) -> None:
    """It goes on without them; nor does it fail when they have ended before."""
    caplog.set_level(logging.INFO, "trioreactor.inspector")
    begun = trio.Event()

    def notice(_record: logging.LogRecord) -> bool:
        begun.set()
        return True

    caplog.handler.addFilter(notice)
    async with no_leaks(), trio.open_nursery() as nursery:
        async with EventLoopThreadPool(2) as pool:
            server = TcpServer(wait_for_them, 0, loops=pool)
            nursery.start_soon(log_everything, [server])
            await begun.wait()
        caplog.handler.removeFilter(notice)
        await log_everything([server])
    lines = [record.getMessage() for record in caplog.records]
    assert sum(line.startswith("server ") for line in lines) == 2
