"""LoopWatchdog: who holds the loop is named while it is held; nobody is who does not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from tests.conftest import connect, echo, no_leaks, serving, until
from tests.servers import local
from trioreactor import (
    Buffer,
    Callbacks,
    LoopWatchdog,
    TcpConnection,
    TcpServer,
    loop_lookout,
)
from trioreactor.loop_holder import HolderFinder, LoopHolder
from trioreactor.loop_turns import LoopTurns
from trioreactor.loop_watchdog import _current

ROOT = Path(__file__).parents[1]
PROGRAM = Path(__file__).parent / "programs" / "stopped.py"
NAME = "trioreactor.watchdog"

# Short, so that the tests are; twice as long as a thread may have to wait for the interpreter.
THRESHOLD = 0.05


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the watchdog has said so far."""
    return [record.getMessage() for record in caplog.records if record.name == NAME]


def watching_threads() -> int:
    return sum(thread.name == NAME for thread in threading.enumerate())


def sleeping() -> None:
    time.sleep(0.002)


def computing() -> None:
    sum(range(10_000))


def hold_until(condition: Callable[[], object], work: Callable[[], object] = sleeping) -> None:
    """Hold the loop until *condition*, within bounds."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        work()


def hold(seconds: float) -> None:
    time.sleep(seconds)


# -- what holds the loop


@pytest.mark.parametrize("work", [sleeping, computing])
async def test_a_handler_that_holds_the_loop(
    work: Callable[[], object], caplog: pytest.LogCaptureFixture
) -> None:
    """FAULTS 41: it is named, with its stack, while it holds the loop; once, however long; and
    then how long it took.
    """
    while_held: list[str] = []

    async def slow_handler(conn: TcpConnection) -> None:
        await conn.receive_some()
        begun = time.perf_counter()
        hold_until(lambda: said(caplog), work)
        hold_until(lambda: time.perf_counter() > begun + 5 * THRESHOLD, work)
        while_held.extend(said(caplog))
        await conn.send_all(b"done")

    server = local(slow_handler, name="slow", watchdog=THRESHOLD)
    async with no_leaks(), serving(server) as address, connect(address) as client:
        await until(lambda: server.connections)
        (name,) = server.connections
        await client.send_all(b"x")
        assert await client.receive_some() == b"done"
        await until(lambda: len(said(caplog)) == 2)
    (warning,) = while_held
    assert warning.startswith("the loop is held, 0.")
    assert f"by task {name!r}\n" in warning
    assert warning.index("in slow_handler") < warning.index("in hold_until")
    # Cut where trio's own begins, which is the same for all.
    assert "unrolled_run" not in warning
    assert said(caplog)[1].startswith("the loop was held for ")
    # Less what the system did not let run.
    assert float(said(caplog)[1].split()[5]) > 2 * THRESHOLD
    assert {r.levelname for r in caplog.records if r.name == NAME} == {"WARNING"}
    now = server.statistics()
    assert now.loop_lag is not None
    assert now.loop_lag >= 5 * THRESHOLD
    assert now.loop_holds >= 1


async def test_a_callback_that_holds_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    """A callback runs in the poller; the connection that it serves is named all the same."""

    def slow_callback(conn: TcpConnection, buffer: Buffer) -> None:
        hold_until(lambda: said(caplog))
        conn.send(buffer.take())

    server = local(Callbacks(message=slow_callback), name="slow", watchdog=THRESHOLD)
    async with (
        no_leaks(),
        serving(server) as address,
        connect(address),
        connect(address) as client,
    ):
        await until(lambda: len(server.connections) == 2)
        name = list(server.connections)[1]
        await client.send_all(b"x")
        assert await client.receive_some() == b"x"
    assert f"for connection {name!r}" in said(caplog)[0]
    assert "in slow_callback" in said(caplog)[0]


async def test_a_connection_that_is_being_made() -> None:
    """It has no name yet, which is no reason to find nobody."""
    finder = HolderFinder(threading.get_ident())
    found: list[LoopHolder | None] = []

    def make(conn: TcpConnection) -> None:
        thread = threading.Thread(target=lambda: found.append(finder.find()))
        thread.start()
        thread.join()

    make(TcpConnection.__new__(TcpConnection))
    (holder,) = found
    assert holder is not None
    assert holder.connection is None
    assert holder.task == trio.lowlevel.current_task().name


async def test_the_first_step(caplog: pytest.LogCaptureFixture) -> None:
    """What holds the loop from the very beginning is seen, too, without a turn of its own."""
    with trio.testing.assert_checkpoints():
        async with LoopWatchdog(THRESHOLD) as watchdog:
            hold_until(lambda: said(caplog))
    assert "in test_the_first_step" in said(caplog)[0]
    assert watchdog.holds >= 0


async def test_after_an_idle_time(caplog: pytest.LogCaptureFixture) -> None:
    """A thread that sleeps because the loop does, is awake when that is held."""
    async with LoopWatchdog(THRESHOLD):
        await parked()
        hold_until(lambda: said(caplog))
        await trio.lowlevel.checkpoint()
        await until(lambda: len(said(caplog)) == 2)
    assert "in test_after_an_idle_time" in said(caplog)[0]


async def parked() -> None:
    """Until the thread sleeps for as long as the loop does."""
    watch = _current.get()
    assert watch is not None
    # Seen from beside the loop, in which every look would be a turn.
    await trio.to_thread.run_sync(hold_until, lambda: watch.turns.parked)


async def test_a_call_that_lets_no_thread_run(caplog: pytest.LogCaptureFixture) -> None:
    """A call into C that keeps the interpreter to itself is warned of at its end."""
    begun = time.thread_time()
    sum(range(1_000_000))
    size = int(1_000_000 * 6 * THRESHOLD / (time.thread_time() - begun))
    async with LoopWatchdog(THRESHOLD):
        with trio.fail_after(20):
            # Once more if a busy machine let it wait in the middle, which is no fault of the call.
            while not said(caplog):
                await trio.sleep(2 * THRESHOLD)
                sum(range(size))
                await trio.sleep(THRESHOLD / 2)
    assert "held" in said(caplog)[0]


async def test_many_steps(caplog: pytest.LogCaptureFixture) -> None:
    """Where no single step is long, but all of a turn together, that is what it says."""

    async def short_step() -> None:
        hold(THRESHOLD / 5)

    async with LoopWatchdog(THRESHOLD):
        await trio.sleep(0)
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(short_step)
        await until(lambda: len(said(caplog)) == 2)
    assert said(caplog)[0].startswith("many steps in a row hold the loop, 0.")
    assert "in short_step" in said(caplog)[0]


async def test_at_most_one_warning_a_second(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those in between are counted, and their count is told with the next one."""
    monkeypatch.setattr(loop_lookout, "LOG_INTERVAL", 1e6)
    async with LoopWatchdog(THRESHOLD) as watchdog:
        for number in range(4):
            await trio.sleep(0)
            hold(2 * THRESHOLD)
            await until(lambda number=number: watchdog.holds == number + 1)
        watch = _current.get()
        assert watch is not None
        await until(lambda: watch.turns.events.empty())
        # The first one, and how long it took.
        assert len(said(caplog)) == 2
        monkeypatch.setattr(loop_lookout.time, "perf_counter", Ahead())
        hold(2 * THRESHOLD)
        monkeypatch.undo()
        await until(lambda: len(said(caplog)) > 2)
    assert "(and 3 times since the last such line)" in said(caplog)[2]


class Ahead:
    """A clock that is far ahead."""

    def __init__(self) -> None:
        self._real = time.perf_counter

    def __call__(self) -> float:
        return self._real() + 1e7


# -- what does not


async def test_nothing_is_said_of_a_good_loop(caplog: pytest.LogCaptureFixture) -> None:
    """Neither of a busy one whose turns are short, nor of an idle one."""
    async with LoopWatchdog(0.2) as watchdog:
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            await trio.lowlevel.checkpoint()
        await trio.sleep(0.3)
        assert watchdog.holds == 0
        assert 0 < watchdog.longest < 0.2
    assert not said(caplog)


@pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="no clock for a thread")
async def test_an_idle_loop_costs_nothing() -> None:
    """Promise S: while the loop sleeps the thread does, too, and looks at nothing."""
    async with LoopWatchdog(THRESHOLD):
        (thread,) = (t for t in threading.enumerate() if t.name == NAME)
        assert thread.ident is not None
        clock = time.pthread_getcpuclockid(thread.ident)

        def observe() -> tuple[float, float]:
            """From beside the loop, which sleeps meanwhile."""
            time.sleep(4 * THRESHOLD)
            before = time.clock_gettime(clock)
            time.sleep(8 * THRESHOLD)
            return before, time.clock_gettime(clock)

        before, after = await trio.to_thread.run_sync(observe)
    assert before == after


@pytest.mark.program
def test_a_process_that_was_stopped() -> None:
    """FAULTS 57: a process that is stopped, in the middle of a step or while it is idle, holds no
    loop, though it is held when it is not stopped.
    """
    process = subprocess.Popen(
        [sys.executable, str(PROGRAM)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        for stop in range(3):
            if stop == 2:
                assert process.stdout.readline() == "stop me\n"
                process.send_signal(signal.SIGSTOP)
            _, status = os.waitpid(process.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status)
            time.sleep(0.4)
            process.send_signal(signal.SIGCONT)
        before, after = json.loads(process.communicate("\n", timeout=20)[0])
        assert before == []
        assert len(after) == 2
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


async def test_a_mock_clock(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """It is real time that counts, and nobody waits for it: an hour passes at once."""
    begun = time.monotonic()
    async with LoopWatchdog():
        await trio.sleep(3600)
    assert trio.current_time() >= 3600
    assert time.monotonic() - begun < 10
    assert not said(caplog)


# -- its life


async def test_the_thread_ends() -> None:
    """With the block, also if that is cancelled or raises, and with the server."""
    async with no_leaks():
        async with LoopWatchdog():
            assert watching_threads() == 1
        assert watching_threads() == 0
        with trio.move_on_after(0.01):
            async with LoopWatchdog():
                await trio.sleep_forever()
        assert watching_threads() == 0
        with pytest.raises(KeyError):
            async with LoopWatchdog():
                raise KeyError
        assert watching_threads() == 0
        async with serving(local(Callbacks(message=lambda conn, buffer: None))):
            assert watching_threads() == 1
        assert watching_threads() == 0


async def test_one_thread_for_a_run(caplog: pytest.LogCaptureFixture) -> None:
    """However many there are, one thread watches, with the smallest threshold."""
    async with LoopWatchdog(60) as patient, serving(local(echo, watchdog=30)):
        assert watching_threads() == 1
        async with LoopWatchdog(THRESHOLD):
            assert watching_threads() == 1
            hold_until(lambda: said(caplog))
            await trio.sleep(0)
        holds = patient.holds
        hold(2 * THRESHOLD)
        await trio.sleep(0.01)
        assert patient.holds == holds
        assert watching_threads() == 1
        assert patient.longest >= 2 * THRESHOLD
    assert watching_threads() == 0


async def test_no_watchdog() -> None:
    """watchdog=None: no thread, no lag, and no hooks in the loop."""
    server = local(Callbacks(message=lambda conn, buffer: None), watchdog=None)
    async with serving(server):
        assert watching_threads() == 0
        assert _current.get() is None
    assert (server.statistics().loop_lag, server.statistics().loop_holds) == (None, 0)


async def test_starting_and_stopping() -> None:
    """Stopping is idempotent; one that runs cannot be started again, one that has ended can."""
    watchdog = LoopWatchdog()
    assert (watchdog.longest, watchdog.holds) == (0, 0)
    watchdog.stop()
    for _ in range(2):
        watchdog.start()
        with pytest.raises(RuntimeError, match="watches already"):
            watchdog.start()
        assert watching_threads() == 1
        await trio.sleep(0)
        watchdog.stop()
        watchdog.stop()
        assert watching_threads() == 0
    assert watchdog.longest > 0


async def test_no_thread_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server does not serve, and nothing of it is left: no socket, no hook in the loop."""
    hooked: list[object] = []
    monkeypatch.setattr(LoopTurns, "before_io_wait", lambda *args: hooked.append(args))

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    server = local(echo)
    async with no_leaks():
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(RuntimeError, match="can't start new thread"):
                await server.serve()
        await trio.sleep(0.01)
    assert hooked == []
    assert _current.get() is None


@pytest.mark.program
def test_a_process_ends_all_the_same() -> None:
    """A watchdog that nobody has stopped keeps no process from ending."""
    program = """
import trio
from trioreactor import LoopWatchdog
async def main():
    LoopWatchdog(0.01).start()
    await trio.sleep(0.1)
trio.run(main)
print("ended")
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert (done.returncode, done.stdout) == (0, "ended\n")


@pytest.mark.pure
@pytest.mark.parametrize(
    ("value", "error", "hint"),
    [
        (0, ValueError, "more than 0 seconds"),
        (-1, ValueError, "more than 0 seconds"),
        (float("nan"), ValueError, "more than 0 seconds"),
        (0.001, ValueError, "at least 0.01 seconds"),
        ("1", TypeError, "a number of seconds"),
        (True, TypeError, "a number of seconds"),
    ],
)
def test_thresholds(value: Any, error: type[Exception], hint: str) -> None:
    """One that cannot be watched for is refused, with what to pass."""
    with pytest.raises(error, match=rf"LoopWatchdog\(threshold={value!r}\): pass {hint}"):
        LoopWatchdog(value)
    with pytest.raises(error, match=rf"TcpServer\(watchdog={value!r}\): pass {hint}"):
        TcpServer(echo, 0, watchdog=value)
    with pytest.raises(TypeError, match=r"pass a number of seconds$"):
        LoopWatchdog(None)  # type: ignore[arg-type]
