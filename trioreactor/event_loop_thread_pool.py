"""EventLoopThreadPool: several threads that each run trio, owned by one nursery."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from types import TracebackType
from typing import Literal, Self, TypeAlias, TypeVar, TypeVarTuple

import trio

from trioreactor.address import SocketAddress, peer_key
from trioreactor.event_loop import EventLoop
from trioreactor.event_loop_thread import EventLoopThread, over
from trioreactor.exception_groups import unwrapped
from trioreactor.options import check_count, check_present

T = TypeVar("T")
Args = TypeVarTuple("Args")

LoopChoice: TypeAlias = Literal["round_robin", "least_connections", "peer_hash"]
"""Which loop gets a server's next connection: each in turn; the one that has the fewest; or always
the same for one peer, as `Limits.per_peer` counts peers (a Unix socket's have no address, and take
turns). Behind a proxy that is the proxy, for the header is read in the loop."""


class EventLoopThreadPool:
    """Threads with a trio run each, *size* of them, while its block lasts.

    For a server: ``async with EventLoopThreadPool(2) as pool:`` and in it
    ``await TcpServer(handler, 8080, loops=pool).serve()``.

    Python runs one thread at a time, so this pays where handlers spend their time in code that lets
    the others run: compression, hashing, encryption, and what else releases the GIL. Where they do
    not, one loop serves more.

    *thread_init* is called as ``thread_init(loop)``, in each thread before all else. What it raises
    leaves the ``async with``, and so does, later, whatever ends a loop: all the others end, too. A
    handler's `SystemExit` or `KeyboardInterrupt` comes out of `TcpServer.serve`. Ctrl-C is told to
    the main thread alone. Cancelling the block, or leaving it, cancels everything in every loop,
    and waits until the threads have ended.

    *choose* is a `LoopChoice`. The threads are named ``{name}-{number}``, from 0.

    The pool belongs to the loop in which the block is; from others, use its `loops`, and `run`.
    """

    def __init__(
        self,
        size: int,
        *,
        thread_init: Callable[[EventLoop], object] | None = None,
        name: str = "loop",
        choose: LoopChoice = "round_robin",
    ) -> None:
        owner = "EventLoopThreadPool"
        check_present(owner, size=size)
        check_count(owner, "size", size, least=1, unit="threads")
        if thread_init is not None and (
            not callable(thread_init) or inspect.iscoroutinefunction(thread_init)
        ):
            raise TypeError(f"{owner}(thread_init={thread_init!r}): pass a plain function")
        if choose not in ("round_robin", "least_connections", "peer_hash"):
            raise ValueError(
                f'{owner}(choose={choose!r}): pass "round_robin", "least_connections" or '
                '"peer_hash"'
            )
        self._size = size
        self._thread_init = thread_init
        self._name = name
        self._choose: LoopChoice = choose
        # Whoever holds the threads, while they run.
        self._block: AbstractAsyncContextManager[None] | None = None
        self._threads: dict[EventLoop, EventLoopThread] = {}
        self._loops: tuple[EventLoop, ...] = ()
        # How many connections each loop has.
        self._loads: dict[EventLoop, int] = {}
        # Whose turn it is.
        self._next = 0

    def __repr__(self) -> str:
        return f"<EventLoopThreadPool {self._name}, {len(self._loops)} of {self._size} threads>"

    async def __aenter__(self) -> Self:
        """Start the threads, and wait until every loop runs."""
        if self._block is not None:
            raise RuntimeError("this pool runs already: make another EventLoopThreadPool")
        self._block = self._hold()
        try:
            await self._block.__aenter__()
        except BaseException:
            self._block = None
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        assert self._block is not None
        try:
            return await self._block.__aexit__(kind, error, traceback)  # noqa: ASYNC102 a nursery's
        finally:
            self._block = None

    @asynccontextmanager
    async def _hold(self) -> AsyncGenerator[None]:
        # One token for each: the threads are there for long, and take none of anybody else's.
        limiter = trio.CapacityLimiter(self._size)
        try:
            with unwrapped(), _causes_alone():
                async with trio.open_nursery() as nursery:
                    threads: list[EventLoopThread] = []
                    for number in range(self._size):
                        thread = EventLoopThread(f"{self._name}-{number}", self._thread_init)
                        await nursery.start(thread.serve, limiter)
                        threads.append(thread)
                    self._threads = {thread.loop: thread for thread in threads}
                    self._loops = tuple(self._threads)
                    self._loads = dict.fromkeys(self._loops, 0)
                    yield
                    nursery.cancel_scope.cancel()
        finally:
            self._threads, self._loops, self._loads = {}, (), {}

    @property
    def loops(self) -> tuple[EventLoop, ...]:
        """The loops, in the order of their threads. `RuntimeError` outside the block."""
        if not self._loops:
            raise RuntimeError("no loop runs: use the pool inside `async with pool:`")
        return self._loops

    # -- which loop

    def get_next_loop(self) -> EventLoop:
        """The loop whose turn it is; with ``choose="least_connections"``, the one that has the
        fewest of servers' connections, in turn where they have the same number.
        """
        loops = self.loops
        turn = self._next
        self._next = (turn + 1) % len(loops)
        if self._choose != "least_connections":
            return loops[turn]
        return min(loops[turn:] + loops[:turn], key=self._loads.__getitem__)

    def get_loop_for_hash(self, key: int | str | bytes) -> EventLoop:
        """The same loop for the same *key*, in every pool of this size and in every program."""
        loops = self.loops
        if isinstance(key, str):
            key = key.encode("utf-8", "surrogatepass")
        # Python's own hash of a text is another one in each program.
        number = zlib.crc32(key) if isinstance(key, bytes) else key
        return loops[number % len(loops)]

    def take_loop(self, peer: SocketAddress) -> EventLoop:
        """The loop for a connection from *peer*, as *choose* says; counted until `give_back`."""
        key = peer_key(peer) if self._choose == "peer_hash" else None
        loop = self.get_next_loop() if key is None else self.get_loop_for_hash(key)
        self._loads[loop] += 1
        return loop

    def give_back(self, loop: EventLoop) -> None:
        """A connection for which `take_loop` gave *loop* has ended."""
        if loop in self._loads:
            self._loads[loop] -= 1

    # -- work for them

    async def run(self, loop: EventLoop, fn: Callable[[*Args], Awaitable[T]], *args: *Args) -> T:
        """Run an async function as a task of *loop*, which is one of `loops`, in a copy of the
        caller's context; give its result, or raise its error. From any trio run.

        Cancelling this cancels it there, and returns when it has ended; what it then still gives
        or raises is what comes out. `trio.RunFinishedError` if the loop is over, or ends first.
        """
        thread = self._threads.get(loop)
        if thread is None:
            await trio.lowlevel.checkpoint()
            raise over(self._name)
        return await thread.run(fn, *args)


@contextmanager
def _causes_alone() -> Generator[None]:
    """Around the nursery: those who waited for a loop that ended are not told of beside what ended
    it.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        causes = group.split(trio.RunFinishedError)[1]
        if causes is None:
            raise
        context = causes.__context__
        try:
            raise causes
        finally:
            # The group says nothing more.
            causes.__context__ = context
