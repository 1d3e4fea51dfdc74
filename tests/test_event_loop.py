"""EventLoop: one handle for a run, from which any thread can have things done in the loop."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Callable

import pytest
import trio

from trioreactor import EventLoop


def records(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What the loop has logged."""
    return [r for r in caplog.records if r.name == "trioreactor.event_loop"]


def fail() -> None:
    """A function that raises."""
    raise ValueError("on purpose")


async def test_current_is_one_object() -> None:
    """However often and wherever in a run it is asked for, it is the same loop."""
    loop = EventLoop.current()
    seen: list[EventLoop] = []

    async def child() -> None:
        seen.append(EventLoop.current())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(child)
    loop.run_in_loop(lambda: seen.append(EventLoop.current()))
    seen.append(await trio.to_thread.run_sync(lambda: trio.from_thread.run_sync(EventLoop.current)))
    assert [other is loop for other in seen] == [True] * 3


def test_each_run_has_its_own() -> None:
    """Two runs have two loops, and a loop does not outlive its run."""

    async def main() -> EventLoop:
        return EventLoop.current()

    first, second = trio.run(main), trio.run(main)
    assert first is not second
    gone = [weakref.ref(first), weakref.ref(second)]
    del first, second
    gc.collect()
    assert [loop() for loop in gone] == [None, None]


def test_outside_trio() -> None:
    """Where no loop runs there is no current one, and nobody is in one that ended."""
    with pytest.raises(RuntimeError):
        EventLoop.current()

    async def main() -> EventLoop:
        return EventLoop.current()

    loop = trio.run(main)
    assert not loop.in_loop
    with pytest.raises(trio.RunFinishedError):
        loop.queue_in_loop(fail)
    with pytest.raises(trio.RunFinishedError):
        loop.run_in_loop(fail)


async def test_in_loop() -> None:
    """A task is in its loop; another thread is not, not even with a loop of its own."""
    loop = EventLoop.current()
    assert loop.in_loop
    assert not await trio.to_thread.run_sync(lambda: loop.in_loop)

    async def elsewhere() -> tuple[bool, bool]:
        return loop.in_loop, EventLoop.current().in_loop

    assert await trio.to_thread.run_sync(lambda: trio.run(elsewhere)) == (False, True)


async def test_run_in_loop_at_once() -> None:
    """In the loop the function has been called when the call returns, with its arguments."""
    called: list[tuple[int, str]] = []

    def note(number: int, text: str) -> None:
        called.append((number, text))

    EventLoop.current().run_in_loop(note, 1, "one")
    assert called == [(1, "one")]


async def test_queue_in_loop_is_never_at_once() -> None:
    """A queued function is called later also when the caller is in the loop, and in order."""
    called: list[int] = []
    done = trio.Event()
    loop = EventLoop.current()
    for number in range(100):
        loop.queue_in_loop(called.append, number)
    loop.queue_in_loop(done.set)
    assert not called
    with trio.fail_after(20):
        await done.wait()
    assert called == list(range(100))


@pytest.mark.parametrize("method", [EventLoop.run_in_loop, EventLoop.queue_in_loop])
async def test_from_another_thread(method: Callable[..., None]) -> None:
    """From a thread, functions are called in the loop's thread, in the order of the calls."""
    loop = EventLoop.current()
    called: list[tuple[int, bool]] = []
    done = trio.Event()

    def work() -> None:
        for number in range(1000):
            method(loop, lambda number=number: called.append((number, loop.in_loop)))
        method(loop, done.set)

    with trio.fail_after(20):
        await trio.to_thread.run_sync(work)
        await done.wait()
    assert called == [(number, True) for number in range(1000)]


async def test_what_is_queued_together_wakes_the_loop_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Trio is asked once for a burst, and again for what comes after it."""
    asked: list[object] = []
    real = trio.lowlevel.TrioToken.run_sync_soon

    def run_sync_soon(self: trio.lowlevel.TrioToken, fn: Callable[[], object]) -> None:
        asked.append(fn)
        real(self, fn)

    monkeypatch.setattr(trio.lowlevel.TrioToken, "run_sync_soon", run_sync_soon)
    loop = EventLoop.current()
    for turn in range(1, 4):
        done = trio.Event()
        for _ in range(100):
            loop.queue_in_loop(int)
        loop.queue_in_loop(done.set)
        await done.wait()
        assert len(asked) == turn


async def test_it_wakes_a_loop_that_sleeps() -> None:
    """A call from a thread is made also when the loop has nothing else to do."""
    loop = EventLoop.current()
    done = trio.Event()
    thread = threading.Timer(0.02, loop.queue_in_loop, [done.set])
    thread.start()
    with trio.fail_after(20):
        await done.wait()
    thread.join()


@pytest.mark.parametrize("where", ["at once", "queued", "from a thread"])
async def test_what_raises_is_logged(where: str, caplog: pytest.LogCaptureFixture) -> None:
    """A function that raises costs one line with its traceback, and the run and the rest go on."""
    loop = EventLoop.current()
    done = trio.Event()
    if where == "at once":
        loop.run_in_loop(fail)
        loop.run_in_loop(done.set)
        assert done.is_set()
    elif where == "queued":
        loop.queue_in_loop(fail)
        loop.queue_in_loop(done.set)
    else:
        await trio.to_thread.run_sync(loop.run_in_loop, fail)
        await trio.to_thread.run_sync(loop.run_in_loop, done.set)
    with trio.fail_after(20):
        await done.wait()
    (record,) = records(caplog)
    assert record.levelno == logging.ERROR
    assert "fail" in record.getMessage()
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ValueError)


async def test_what_succeeds_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is logged about functions that do not raise."""
    caplog.set_level(logging.DEBUG)
    EventLoop.current().run_in_loop(lambda: None)
    assert not records(caplog)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
async def test_interrupts_pass(error: type[BaseException]) -> None:
    """What is meant to end the program is not swallowed."""

    def interrupt() -> None:
        raise error

    with pytest.raises(error):
        EventLoop.current().run_in_loop(interrupt)
