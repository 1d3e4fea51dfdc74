"""ConnectionCallbacks: called from the reactor, one at a time, and what they raise has one way."""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Callable

import pytest
import trio
import trio.testing

from tests.simulated import SimulatedSocket, simulated
from trioreactor import CloseReason, TcpConnection, Watermarks
from trioreactor.buffer import Buffer

settled = trio.testing.wait_all_tasks_blocked
MARKS = Watermarks(high=1000, low=100)


def cause(which: str, conn: TcpConnection, sock: SimulatedSocket) -> None:
    """Make the callback *which* due."""
    if which == "write_complete":
        conn.send(b"x")
    else:
        sock.room = 0
        conn.send(bytes(2000))
        if which == "low_water_mark":
            sock.peer_takes(1950)


def set_callback(conn: TcpConnection, which: str, fn: Callable[..., object] | None) -> None:
    """Set the callback *which*."""
    setattr(conn, f"{which}_callback", fn)


WHICH = ["write_complete", "high_water_mark", "low_water_mark"]


@pytest.mark.parametrize("which", WHICH)
async def test_called_from_the_reactor(which: str) -> None:
    """Each is called with the connection, later, and not by the task that sent."""
    conn, sock = simulated(watermarks=MARKS)
    calls: list[tuple[object, ...]] = []
    tasks: list[trio.lowlevel.Task] = []

    def callback(*args: object) -> None:
        calls.append(args)
        tasks.append(trio.lowlevel.current_task())

    set_callback(conn, which, callback)
    cause(which, conn, sock)
    assert calls == []
    await settled()
    sizes = {"write_complete": (), "high_water_mark": (2000,), "low_water_mark": (50,)}
    assert calls == [(conn, *sizes[which])]
    assert tasks[0] is not trio.lowlevel.current_task()
    conn.force_close()


@pytest.mark.parametrize("which", WHICH)
async def test_set_and_unset(which: str) -> None:
    """They read back as they were set, and one that was taken away is not called."""
    conn, sock = simulated(watermarks=MARKS)
    assert getattr(conn, f"{which}_callback") is None

    def callback(*_: object) -> None:
        pytest.fail("it was taken away")

    set_callback(conn, which, callback)
    assert getattr(conn, f"{which}_callback") is callback
    set_callback(conn, which, None)
    assert getattr(conn, f"{which}_callback") is None
    cause(which, conn, sock)
    await settled()
    assert conn.close_reason is None
    conn.force_close()


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
async def test_errors_come_out_of_dispatch(which: str, error: type[BaseException]) -> None:
    """What one raises comes out of the dispatch that runs; the connection is left as it is."""
    conn, sock = simulated(watermarks=MARKS)

    def callback(*_: object) -> None:
        raise error("on purpose")

    set_callback(conn, which, callback)
    cause(which, conn, sock)
    with pytest.raises(error, match="on purpose"):
        await conn.dispatch(lambda conn, buffer: None)
    assert conn.close_reason is None
    conn.force_close()


@pytest.mark.parametrize("which", WHICH)
async def test_errors_without_dispatch(which: str, caplog: pytest.LogCaptureFixture) -> None:
    """Where no dispatch runs, the error is logged once and closes that connection."""
    conn, sock = simulated(watermarks=MARKS, name="the one")
    other, _ = simulated()

    def callback(*_: object) -> None:
        raise ValueError("on purpose")

    set_callback(conn, which, callback)
    cause(which, conn, sock)
    await settled()
    assert conn.close_reason is CloseReason.HANDLER_ERROR
    assert other.close_reason is None
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("trioreactor.server", logging.ERROR)
    assert "the one" in record.getMessage()
    other.force_close()


@pytest.mark.parametrize("which", WHICH)
async def test_not_after_the_close(which: str) -> None:
    """A call that was on its way when the connection closed is not made."""
    conn, sock = simulated(watermarks=MARKS)
    witness, _ = simulated()
    calls: list[tuple[object, ...]] = []
    # Told by a list: what it raised would be contained.
    set_callback(conn, which, lambda *args: calls.append(args))
    cause(which, conn, sock)
    if which == "low_water_mark":
        conn._write.on_writable()
    conn.force_close()
    await settled()
    assert calls == []
    witness.force_close()


async def test_write_complete_is_one_for_many_sends() -> None:
    """Several sends that end before the call are one call; the next ones are another."""
    conn, sock = simulated()
    calls = 0

    def complete(conn: TcpConnection) -> None:
        nonlocal calls
        calls += 1

    conn.write_complete_callback = complete
    for turn in (1, 2):
        for _ in range(3):
            conn.send(b"x")
        await settled()
        assert calls == turn
    sock.room = 0
    conn.send(b"abc")
    sock.peer_takes(2)
    await settled()
    assert calls == 2
    sock.peer_takes(1)
    await settled()
    assert calls == 3
    conn.force_close()


async def test_they_run_in_the_dispatching_tasks_context() -> None:
    """While a dispatch runs, they see its task's context variables."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="nobody's")
    conn, sock = simulated()
    seen: list[str] = []
    conn.write_complete_callback = lambda conn: seen.append(variable.get())

    def on_message(conn: TcpConnection, buffer: Buffer) -> None:
        conn.send(buffer.take())

    async def dispatch() -> None:
        variable.set("the task's")
        await conn.dispatch(on_message)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(dispatch)
        await settled()
        sock.peer_sends(b"x")
        await settled()
        conn.force_close()
    assert seen == ["the task's"]


async def test_dispatch_takes_them_too() -> None:
    """What `dispatch` is given takes the place of what was set, and stays."""
    conn, sock = simulated(watermarks=MARKS)
    told: list[str] = []
    conn.write_complete_callback = lambda conn: told.append("old")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            lambda: conn.dispatch(
                lambda conn, buffer: None,
                write_complete=lambda conn: told.append("complete"),
                high_water_mark=lambda conn, size: told.append("high"),
                low_water_mark=lambda conn, size: told.append("low"),
            )
        )
        await settled()
        sock.room = 0
        conn.send(bytes(2000))
        await settled()
        sock.peer_takes(10_000)
        await settled()
        nursery.cancel_scope.cancel()
    conn.send(b"x")
    await settled()
    assert told == ["high", "low", "complete", "complete"]
    conn.force_close()
