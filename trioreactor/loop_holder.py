"""LoopHolder: what a loop is doing, as another thread can see it."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FrameType

import trio

from trioreactor.tcp_connection import TcpConnection

# The tasks are read while the loop may go on, and a set that changes meanwhile cannot be: how often
# to begin anew.
_TRIES = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopHolder:
    """What was running in the loop at one moment."""

    task: str | None
    """The name of the task whose step it was, if it could be found."""
    connection: str | None
    """The name of the connection that was being served, if there is one."""
    calls: traceback.StackSummary
    """The stack of that step, the innermost call last. Source files are read only for `stack`."""
    step: int
    """Tells the step from others of the same turn."""

    @property
    def stack(self) -> str:
        """`calls`, as tracebacks have them."""
        return "".join(self.calls.format())

    def __str__(self) -> str:
        who = "a task" if self.task is None else f"task {self.task!r}"
        # A server's tasks are called as their connections.
        if self.connection not in (None, self.task):
            who += f", for connection {self.connection!r}"
        return who


class HolderFinder:
    """Made in the loop, in a task; asked in whatever thread."""

    def __init__(self, thread: int) -> None:
        self._thread = thread
        self._root = trio.lowlevel.current_root_task()
        # Who calls a task's steps, where every stack is cut: what is further out is trio's and the
        # same for all.
        outermost = getattr(trio.lowlevel.current_task().coro, "cr_frame", None)
        below = outermost.f_back if isinstance(outermost, FrameType) else None
        self._loop_code: CodeType | None = None if below is None else below.f_code

    def find(self) -> LoopHolder | None:
        """What is running; None if nothing is, or if that cannot be seen."""
        frames: list[FrameType] = []
        # The underscore only warns of it: the name is documented.
        by_thread = sys._current_frames()  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        frame = by_thread.get(self._thread)
        while frame is not None and frame.f_code is not self._loop_code:
            frames.append(frame)
            frame = frame.f_back
        if frame is None or not frames:
            return None
        task = self._task_of(frames[-1])
        connection = next(_connections(frames), None)
        calls = traceback.StackSummary.extract(
            ((frame, frame.f_lineno) for frame in reversed(frames)), lookup_lines=False
        )
        return LoopHolder(
            task=None if task is None else task.name,
            connection=None if connection is None else connection.name,
            calls=calls,
            step=hash((id(frames[-1]), id(connection))),
        )

    def _task_of(self, frame: FrameType) -> trio.lowlevel.Task | None:
        """The task whose outermost call *frame* is."""
        for _ in range(_TRIES):
            try:
                for task in _tasks(self._root):
                    if getattr(task.coro, "cr_frame", None) is frame:
                        return task
            except RuntimeError:
                continue
            break
        return None


def _tasks(root: trio.lowlevel.Task | None) -> Iterator[trio.lowlevel.Task]:
    waiting = [] if root is None else [root]
    while waiting:
        task = waiting.pop()
        yield task
        for nursery in task.child_nurseries:
            waiting.extend(nursery.child_tasks)


def _connections(frames: list[FrameType]) -> Iterator[TcpConnection]:
    """The connections that these calls know of, the innermost call's first.

    A callback runs in the poller's task or in one that it was not named for, and is called with its
    connection.
    """
    for frame in frames:
        for value in frame.f_locals.values():
            # One that is only just being made has no name yet.
            if isinstance(value, TcpConnection) and hasattr(value, "name"):
                yield value
