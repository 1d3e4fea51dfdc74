"""EventLoopThreadPool: threads that run trio, whose beginning, work and end belong to one block."""

from __future__ import annotations

import contextvars
import signal
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import pytest
import trio

from tests.conftest import cancelled_after, no_leaks
from trioreactor import EventLoop, EventLoopThreadPool

PEER = ("127.0.0.1", 5000)


async def thread_name() -> str:
    """Where it runs."""
    await trio.lowlevel.checkpoint()
    return threading.current_thread().name


async def fail(error: BaseException) -> NoReturn:
    """An async function that raises."""
    await trio.lowlevel.checkpoint()
    raise error


def over(loop: EventLoop) -> bool:
    """Whether the run has ended."""
    try:
        loop.queue_in_loop(int)
    except trio.RunFinishedError:
        return True
    return False


# -- the block


async def test_threads_run_while_the_block_lasts() -> None:
    """Each loop has its own thread, with its name, until the block is left; then all have ended."""
    async with no_leaks():
        async with EventLoopThreadPool(3, name="work") as pool:
            loops = pool.loops
            assert len(set(loops)) == 3
            assert [await pool.run(loop, thread_name) for loop in loops] == [
                "work-0",
                "work-1",
                "work-2",
            ]
            assert not any(loop.in_loop for loop in loops)
        assert all(map(over, loops))


async def test_it_can_run_again_but_not_twice_at_once() -> None:
    """After its block a pool has no loops, and a new block gives it others."""
    pool = EventLoopThreadPool(1)
    async with no_leaks():
        with pytest.raises(RuntimeError, match="async with"):
            pool.get_next_loop()
        async with pool:
            (first,) = pool.loops
            with pytest.raises(RuntimeError, match="another"):
                async with pool:
                    pass
            assert pool.loops == (first,)
        with pytest.raises(RuntimeError, match="async with"):
            _ = pool.loops
        with pytest.raises(trio.RunFinishedError):
            await pool.run(first, thread_name)
        async with pool:
            assert pool.loops != (first,)


@pytest.mark.pure
@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ([0], {}, ValueError, "at least 1 threads"),
        ([None], {}, TypeError, "pass a number"),
        ([1.5], {}, TypeError, "whole number"),
        ([1], {"choose": "best"}, ValueError, "least_connections"),
        ([1], {"thread_init": 3}, TypeError, "plain function"),
        ([1], {"thread_init": thread_name}, TypeError, "plain function"),
    ],
)
def test_what_it_refuses(
    arguments: list[Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    """What cannot be meant is said at once, with what to pass."""
    with pytest.raises(error, match=message):
        EventLoopThreadPool(*arguments, **options)


async def test_thread_init_comes_first() -> None:
    """It is called in each thread, with its loop, before anything else is."""
    local = threading.local()

    def init(loop: EventLoop) -> None:
        assert loop.in_loop
        local.loop = loop

    async def initialised() -> EventLoop:
        await trio.lowlevel.checkpoint()
        loop: EventLoop = local.loop
        return loop

    async with EventLoopThreadPool(2, thread_init=init) as pool:
        assert [await pool.run(loop, initialised) for loop in pool.loops] == list(pool.loops)


async def test_thread_init_fails_in_the_second_thread() -> None:
    """The error itself comes out of the start, and the first thread has ended by then."""
    loops: list[EventLoop] = []

    def init(loop: EventLoop) -> None:
        loops.append(loop)
        if len(loops) == 2:
            raise ValueError("on purpose")

    async with no_leaks():
        pool = EventLoopThreadPool(3, thread_init=init)
        with pytest.raises(ValueError, match="on purpose") as caught:
            async with pool:
                pytest.fail("it did not start")
        assert "init" in [entry.name for entry in caught.traceback]
        assert len(loops) == 2
        assert all(map(over, loops))
        with pytest.raises(RuntimeError, match="async with"):
            _ = pool.loops


async def test_cancelling_the_owner_cancels_every_loop() -> None:
    """What runs in the loops is cancelled, and has ended when the block has."""
    ended: list[str] = []

    async def work() -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.lowlevel.checkpoint()
            ended.append(threading.current_thread().name)

    async with no_leaks():
        with trio.CancelScope() as scope:
            async with EventLoopThreadPool(2) as pool, trio.open_nursery() as nursery:
                for loop in pool.loops:
                    nursery.start_soon(pool.run, loop, work)
                    await pool.run(loop, thread_name)
                scope.cancel()
        assert scope.cancelled_caught
        assert sorted(ended) == ["loop-0", "loop-1"]


async def test_cancelled_at_every_checkpoint() -> None:
    """However early the owner is cancelled, nothing is left of the threads."""

    async def use() -> None:
        async with EventLoopThreadPool(2) as pool:
            await pool.run(pool.loops[1], thread_name)

    async with no_leaks():
        turns = 0
        while await cancelled_after(turns, use):
            # It takes many turns until a thread has started.
            turns += 1 + turns // 4
        assert turns > 3


@pytest.mark.parametrize("error", [SystemExit, ValueError])
async def test_what_leaves_the_block(error: type[BaseException]) -> None:
    """An error of the block ends the loops, and comes out alone."""
    async with no_leaks():
        with pytest.raises(error):
            async with EventLoopThreadPool(2) as pool:
                loops = pool.loops
                raise error
        assert all(map(over, loops))


def crash() -> NoReturn:
    """Called in a loop, it ends that: trio lets all else of it end before."""
    raise SystemExit("on purpose")


async def test_a_loop_that_crashes() -> None:
    """What crashes one loop's run comes out of the block, alone; the others end."""
    async with no_leaks():
        with pytest.raises(trio.TrioInternalError) as caught, trio.fail_after(20):
            async with EventLoopThreadPool(2) as pool, trio.open_nursery() as nursery:
                loops = pool.loops
                for loop in loops:
                    nursery.start_soon(pool.run, loop, trio.sleep_forever)
                    await pool.run(loop, thread_name)
                loops[1].queue_in_loop(crash)
                await trio.sleep_forever()
        assert "crash" in traceback_names(caught.value)
        assert all(map(over, loops))


CRASH_AT_ONCE = """
import gc, sys, trio
from trioreactor import EventLoopThreadPool

async def crash():
    def abort(_):
        raise SystemExit("on purpose")
    with trio.move_on_after(0):
        await trio.lowlevel.wait_task_rescheduled(abort)

async def main():
    with trio.fail_after(20):
        async with EventLoopThreadPool(2) as pool, trio.open_nursery() as nursery:
            for loop in pool.loops:
                nursery.start_soon(pool.run, loop, trio.sleep_forever)
            await pool.run(pool.loops[1], crash)

try:
    trio.run(main)
except trio.TrioInternalError:
    print("crashed", flush=True)
"""


# In a program of its own: the tasks of a run that crashed are left to the garbage collector.
@pytest.mark.program
def test_whoever_waits_for_a_crashed_loop() -> None:
    """A run that crashes ends none of its tasks; those who wait for them hear of it."""
    result = subprocess.run(
        [sys.executable, "-c", CRASH_AT_ONCE], capture_output=True, text=True, timeout=60
    )
    assert result.stdout == "crashed\n", result.stderr


def traceback_names(error: BaseException) -> list[str]:
    """The functions in an error's tracebacks, and those of what it was raised for or within."""
    names: list[str] = []
    traceback = error.__traceback__
    while traceback is not None:
        names.append(traceback.tb_frame.f_code.co_name)
        traceback = traceback.tb_next
    inner: list[BaseException | None] = [error.__cause__, error.__context__]
    if isinstance(error, BaseExceptionGroup):
        inner += error.exceptions
    return names + [name for one in inner if one is not None for name in traceback_names(one)]


def test_ctrl_c_is_the_main_threads() -> None:
    """KeyboardInterrupt comes to the main thread, and ends the loops with it."""
    loops: list[EventLoop] = []

    async def main() -> None:
        async with EventLoopThreadPool(2) as pool:
            loops.extend(pool.loops)
            # Sent to the process by another thread.
            loops[0].queue_in_loop(signal.pthread_kill, threading.get_ident(), signal.SIGINT)
            with trio.fail_after(20):
                await pool.run(loops[1], trio.sleep_forever)

    with pytest.raises(KeyboardInterrupt):
        trio.run(main)
    assert all(map(over, loops))


# -- which loop


async def test_round_robin() -> None:
    """Each in turn, and then from the first."""
    async with EventLoopThreadPool(3) as pool:
        assert [pool.get_next_loop() for _ in range(6)] == [*pool.loops, *pool.loops]
        assert [pool.take_loop(PEER) for _ in range(3)] == list(pool.loops)


async def test_least_connections() -> None:
    """The one with the fewest, in turn where they have the same number."""
    async with EventLoopThreadPool(3, choose="least_connections") as pool:
        first, second, third = pool.loops
        taken = [pool.take_loop(PEER) for _ in range(6)]
        assert sorted(map(pool.loops.index, taken)) == [0, 0, 1, 1, 2, 2]
        pool.give_back(second)
        assert pool.get_next_loop() is pool.get_next_loop() is pool.take_loop(PEER) is second
        pool.give_back(first)
        pool.give_back(first)
        pool.give_back(third)
        assert pool.take_loop(PEER) is first


async def test_a_hash_is_stable() -> None:
    """A key's loop is the same in every program: it does not depend on Python's own hash."""
    keys = ["alpha", b"beta", 7, -1, "\ud800", *map(str, range(100))]
    async with EventLoopThreadPool(3) as pool:
        chosen = [pool.loops.index(pool.get_loop_for_hash(key)) for key in keys]
        assert chosen == [pool.loops.index(pool.get_loop_for_hash(key)) for key in keys]
        assert chosen[:4] == [zlib.crc32(b"alpha") % 3, zlib.crc32(b"beta") % 3, 1, 2]
        assert set(chosen) == {0, 1, 2}


async def test_a_peers_loop() -> None:
    """By hash a peer's connections have one loop, whatever their ports; Unix sockets take turns."""
    async with EventLoopThreadPool(2, choose="peer_hash") as pool:
        hosts = [f"127.0.0.{number}" for number in range(1, 30)]
        loops = {
            host: {pool.take_loop((host, port)) for port in range(5000, 5010)} for host in hosts
        }
        assert all(len(chosen) == 1 for chosen in loops.values())
        assert set.union(*loops.values()) == set(pool.loops)
        # The same machine, by a socket that takes both families.
        assert {pool.take_loop(("::ffff:127.0.0.1", 1, 0, 0))} == loops["127.0.0.1"]
        assert {pool.take_loop("") for _ in range(2)} == set(pool.loops)


# -- calls


async def test_a_result_and_an_error_come_back() -> None:
    """What an async function gives in a loop, or raises there, its caller has: the very object,
    with the traceback of where it was raised.
    """
    async with EventLoopThreadPool(1) as pool:
        (loop,) = pool.loops
        assert await pool.run(loop, partial(thread_name)) == "loop-0"
        for error in (ValueError("one"), SystemExit(3), ExceptionGroup("two", [KeyError()])):
            with pytest.raises(type(error)) as caught:
                await pool.run(loop, fail, error)
            assert caught.value is error
            assert "fail" in traceback_names(error)
        # The loop goes on.
        assert await pool.run(loop, thread_name) == "loop-0"


async def test_a_call_has_its_callers_context() -> None:
    """A copy of it, as a task that the caller starts."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")

    async def look() -> str:
        await trio.lowlevel.checkpoint()
        seen = variable.get()
        variable.set("changed")
        return seen

    async with EventLoopThreadPool(1) as pool:
        for value in ("one", "two"):
            variable.set(value)
            assert await pool.run(pool.loops[0], look) == value
            assert variable.get() == value


async def test_from_one_loop_to_another() -> None:
    """Any trio run may have things done in any loop, its own included."""
    async with EventLoopThreadPool(2) as pool:
        first, second = pool.loops

        async def ask() -> list[str]:
            return [await pool.run(loop, thread_name) for loop in (first, second)]

        assert await pool.run(first, ask) == ["loop-0", "loop-1"]


async def test_many_calls_at_once() -> None:
    """Calls in flight do not take each other's results."""
    async with EventLoopThreadPool(2) as pool:
        results: dict[int, int] = {}

        async def square(number: int) -> int:
            for _ in range(number % 7):
                await trio.lowlevel.checkpoint()
            return number * number

        async def ask(number: int) -> None:
            results[number] = await pool.run(pool.loops[number % 2], square, number)

        async with trio.open_nursery() as nursery:
            for number in range(300):
                nursery.start_soon(ask, number)
        assert results == {number: number * number for number in range(300)}


@pytest.mark.parametrize("ending", ["cancelled", "result", "error"])
async def test_cancellation_is_carried(ending: str) -> None:
    """A caller that is cancelled cancels its call and waits for its end; what that gives or raises
    nevertheless is not lost.
    """
    begun = trio.Event()
    unwound: list[bool] = []
    results: list[str] = []
    home = EventLoop.current()

    async def work() -> str:
        home.queue_in_loop(begun.set)
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            with trio.CancelScope(shield=True):
                await trio.lowlevel.checkpoint()
            unwound.append(True)
            if ending == "result":
                return "nevertheless"
            if ending == "error":
                raise ValueError("nevertheless") from None
            raise

    async def cancel(scope: trio.CancelScope) -> None:
        await begun.wait()
        scope.cancel()

    async def main() -> None:
        with trio.fail_after(20), trio.CancelScope() as scope:
            nursery.start_soon(cancel, scope)
            results.append(await pool.run(pool.loops[0], work))
        assert scope.cancelled_caught == (ending == "cancelled")

    async with EventLoopThreadPool(1) as pool, trio.open_nursery() as nursery:
        if ending == "error":
            with pytest.raises(ValueError, match="nevertheless"):
                await main()
        else:
            await main()
        assert unwound == [True]
        assert results == (["nevertheless"] if ending == "result" else [])


@pytest.mark.parametrize("deep", [False, True])
async def test_a_call_cancelled_at_every_checkpoint(deep: bool) -> None:
    """It ends by its cancellation or not at all, and its task does, too."""

    async def work() -> None:
        if deep:
            async with trio.open_nursery() as nursery:
                for _ in range(2):
                    nursery.start_soon(thread_name)
        await thread_name()

    async def tasks() -> int:
        await trio.lowlevel.checkpoint()
        return trio.lowlevel.current_statistics().tasks_living

    async with EventLoopThreadPool(1) as pool:
        (loop,) = pool.loops
        before = await pool.run(loop, tasks)
        turns = 0
        while await cancelled_after(turns, partial(pool.run, loop, work)):
            turns += 1
            assert await pool.run(loop, tasks) == before
        assert turns


async def test_the_end_of_a_loop_ends_calls() -> None:
    """Whoever waits outside the block for something in it hears that the loop is over."""
    pool = EventLoopThreadPool(1)
    outcomes: list[BaseException] = []

    async def ask(loop: EventLoop, fn: Callable[[], Any]) -> None:
        try:
            await pool.run(loop, fn)
        except trio.RunFinishedError as error:
            outcomes.append(error)

    async with no_leaks(), trio.open_nursery() as nursery:
        async with pool:
            (loop,) = pool.loops
            nursery.start_soon(ask, loop, trio.sleep_forever)
            await pool.run(loop, thread_name)
        await trio.testing.wait_all_tasks_blocked()
        assert len(outcomes) == 1


async def test_queued_at_the_end() -> None:
    """While a loop ends, a call is made or refused; none waits for ever."""
    results: list[str] = []

    async def ask(pool: EventLoopThreadPool, loop: EventLoop) -> None:
        try:
            results.append(await pool.run(loop, thread_name))
        except trio.RunFinishedError:
            results.append("refused")

    with trio.fail_after(20):
        for _ in range(20):
            async with trio.open_nursery() as nursery:
                pool = EventLoopThreadPool(1)
                async with pool:
                    (loop,) = pool.loops
                    for _ in range(5):
                        nursery.start_soon(ask, pool, loop)
                    await trio.lowlevel.checkpoint()
    assert len(results) == 100
    assert set(results) <= {"loop-0", "refused"}
