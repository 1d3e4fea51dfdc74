"""EventLoopThread: a thread that runs trio, and calls that are made in it from other loops."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Generic, NoReturn, TypeVar, TypeVarTuple

import trio

from trioreactor.event_loop import EventLoop
from trioreactor.exception_groups import lone

T = TypeVar("T")
Args = TypeVarTuple("Args")


class EventLoopThread:
    """One thread, one trio run in it, one task of the owner's that stays until both have ended.

    *thread_init* is called with the loop before anything else runs there.
    """

    def __init__(self, name: str, thread_init: Callable[[EventLoop], object] | None = None) -> None:
        self.name = name
        self._thread_init = thread_init
        # The run in the thread, once it has begun.
        self._loop: EventLoop | None = None
        # Around everything that runs in the loop.
        self._scope = trio.CancelScope()
        # The tasks of the loop.
        self._nursery: trio.Nursery
        # Those who wait for something that they have called in the loop; and whether the loop is
        # over, so that nobody may wait any more. The lock is for these two.
        self._calls: set[_Call[Any]] = set()
        self._over = False
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<EventLoopThread {self.name}>"

    @property
    def loop(self) -> EventLoop:
        """The run in the thread. There from when `serve` reports it."""
        assert self._loop is not None
        return self._loop

    async def serve(
        self,
        limiter: trio.CapacityLimiter,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Run the loop until cancelled. Reports when it runs; raises what ends it.

        *limiter* has a token for the thread, which is kept until the end.
        """
        begun = trio.Event()
        failure: BaseException | None = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._stop_when_cancelled, begun)
                try:
                    await trio.to_thread.run_sync(
                        self._run_thread,
                        EventLoop.current(),
                        begun,
                        task_status,
                        thread_name=self.name,
                        limiter=limiter,
                    )
                except trio.Cancelled:
                    # The thread never was.
                    raise
                except BaseException as error:  # noqa: ASYNC103 raised below
                    # Not in a group with our cancellation, which often is its consequence.
                    failure = error
                finally:
                    # Also if the run never was.
                    begun.set()
                nursery.cancel_scope.cancel()
        finally:
            if failure is not None:
                context = failure.__context__
                try:
                    raise failure
                finally:
                    failure.__context__ = context
                    # Its traceback has this frame now.
                    del failure

    async def _stop_when_cancelled(self, begun: trio.Event) -> NoReturn:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await begun.wait()
            if self._loop is not None:
                with suppress(trio.RunFinishedError):
                    self._loop.queue_in_loop(self._scope.cancel)

    # -- in the thread

    def _run_thread(
        self, home: EventLoop, begun: trio.Event, task_status: trio.TaskStatus[None]
    ) -> None:
        try:
            trio.run(self._main, home, begun, task_status)
        finally:
            # A run that crashes ends no task. Whoever waits for one must not wait for ever.
            with self._lock:
                self._over = True
                left = list(self._calls)
            for call in left:
                call.lost = True
                self._ended(call)

    async def _main(
        self, home: EventLoop, begun: trio.Event, task_status: trio.TaskStatus[None]
    ) -> None:
        self._loop = EventLoop.current()
        home.queue_in_loop(begun.set)
        with self._scope:
            if self._thread_init is not None:
                self._thread_init(self.loop)
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                home.queue_in_loop(task_status.started)
                await trio.sleep_forever()

    # -- calls from other loops

    @trio.lowlevel.enable_ki_protection
    async def run(self, fn: Callable[[*Args], Awaitable[T]], *args: *Args) -> T:
        """Run *fn* as a task of the loop, in the caller's context; give its result or its error.

        Cancelling cancels it there, and returns when it has ended: by what it still has to give or
        to raise, if it has something. `trio.RunFinishedError` if the loop is over or ends first.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        call = _Call(self.loop, fn, args)
        with self._lock:
            if self._over:
                raise over(self.name)
            self._calls.add(call)
        # If the run is just ending it still makes what was queued, and else it refuses.
        try:
            self.loop.queue_in_loop(self._begin, call)
        except trio.RunFinishedError:
            with self._lock:
                self._calls.discard(call)
            raise over(self.name) from None
        await trio.lowlevel.wait_task_rescheduled(call.abort)
        return call.outcome(self.name)

    def _begin(self, call: _Call[Any]) -> None:
        try:
            call.context.run(self._start, call)
        except RuntimeError:
            # The nursery has closed: the loop ends.
            call.lost = True
            self._ended(call)

    def _start(self, call: _Call[Any]) -> None:
        self._nursery.start_soon(self._make, call, name=call.fn)

    async def _make(self, call: _Call[Any]) -> None:  # noqa: ASYNC910 a task of its own
        try:
            await call.make()
        except BaseException:
            # The loop's own end.
            call.lost = True
            raise
        finally:
            self._ended(call)

    def _ended(self, call: _Call[Any]) -> None:
        """Wake whoever waits for *call*, once. From whatever thread."""
        with self._lock:
            waited_for = call in self._calls
            self._calls.discard(call)
        if waited_for:
            # Its run has crashed: nobody is there to be told.
            with suppress(trio.RunFinishedError):
                call.home.queue_in_loop(trio.lowlevel.reschedule, call.task)


class _Call(Generic[T]):
    """What a task of one loop waits for that another loop does."""

    def __init__(self, loop: EventLoop, fn: Callable[..., Awaitable[T]], args: Any) -> None:
        self.loop = loop
        self.fn = fn
        self.args = args
        self.context = contextvars.copy_context()
        # Who waits.
        self.home = EventLoop.current()
        self.task = trio.lowlevel.current_task()
        # Around it, in its loop.
        self.scope = trio.CancelScope()
        # What it has given, or raised.
        self.result: T
        self.error: BaseException | None = None
        # The loop has ended first.
        self.lost = False
        # What raises in the one who waits, if it was cancelled.
        self._raise_cancel: Callable[[], NoReturn] | None = None

    # -- in the loop

    async def make(self) -> None:  # noqa: ASYNC910 a task of its own
        """Make the call. Raises only what is meant for the loop: its own cancellation."""
        try:
            with self.scope:
                self.result = await self.fn(*self.args)
        except trio.Cancelled:
            raise
        except BaseExceptionGroup as group:
            cancelled, rest = group.split(trio.Cancelled)
            if cancelled is None:
                self.error = group
            else:
                self.error = None if rest is None else lone(rest)
                raise cancelled from None
        except BaseException as error:  # noqa: ASYNC103 the one who waits raises it
            self.error = error

    # -- in the loop of the one who waits

    def abort(self, raise_cancel: Callable[[], NoReturn]) -> trio.lowlevel.Abort:
        """Cancel it where it is; it wakes whoever waits when it has ended."""
        self._raise_cancel = raise_cancel
        # It has ended, and the news is on its way.
        with suppress(trio.RunFinishedError):
            self.loop.queue_in_loop(self.scope.cancel)
        return trio.lowlevel.Abort.FAILED

    def outcome(self, name: str) -> T:
        """What it gave in the loop *name*; or raise."""
        if self.error is not None:
            try:
                raise self.error
            finally:
                # Its traceback has this frame now.
                self.error = None
        if self._raise_cancel is not None and (self.lost or self.scope.cancelled_caught):
            self._raise_cancel()
        if self.lost:
            raise over(name)
        return self.result


def over(name: str) -> trio.RunFinishedError:
    """The error of whoever wants something of a loop that is no more."""
    return trio.RunFinishedError(f"the loop {name} has ended")
