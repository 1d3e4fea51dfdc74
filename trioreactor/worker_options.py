"""WorkerOptions: how worker processes are watched, restarted and ended."""

from __future__ import annotations

from dataclasses import dataclass

from trioreactor.backoff import Backoff
from trioreactor.options import check_present, check_seconds

# What a worker may take beyond its grace, seconds: `Timeouts.linger`, in which handlers that were
# cancelled unwind, and then some for the process to end.
UNWIND = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerOptions:
    """How worker processes are watched, restarted and ended. None means off, where it may be."""

    grace: float = 25.0
    """Seconds that connections may take to end when a worker drains. (shorter than the 30 s that
    Kubernetes waits before it kills)"""
    hang_timeout: float | None = 10.0
    """A worker that has answered no ping for so many seconds is ended: by SIGABRT, which writes
    where it hangs to stderr, then by SIGKILL. (a loop turns many times a second; one that has not
    turned for as long as a client waits for a connection serves nobody)"""
    start_timeout: float = 60.0
    """Seconds that a worker may take from its start until it accepts. (imports from a cold disk
    take seconds, and nothing good takes a minute)"""
    backoff: Backoff = Backoff(initial=0.1, maximum=5.0)
    """Delays before a worker that ended is started again; they begin anew after one that lived
    for `Backoff.reset_after`. (soon, for others serve meanwhile and those who wait in the queue
    are few; and rarely enough that a program which ends at once costs no core)"""
    reuse_port: bool = False
    """A listening socket for each worker, by SO_REUSEPORT, instead of one that all accept from:
    the kernel deals newcomers out evenly, and those dealt to a busy worker wait for it. (one
    for all: who is free takes the next)"""

    def __post_init__(self) -> None:
        check_seconds("WorkerOptions", "grace", self.grace, zero=True, off=False)
        check_seconds("WorkerOptions", "hang_timeout", self.hang_timeout)
        check_seconds("WorkerOptions", "start_timeout", self.start_timeout, off=False)
        check_present("WorkerOptions", grace=self.grace, start_timeout=self.start_timeout)
        if not isinstance(self.backoff, Backoff):
            raise TypeError(f"WorkerOptions(backoff={self.backoff!r}): pass a Backoff(...)")
        if not isinstance(self.reuse_port, bool):
            raise TypeError(f"WorkerOptions(reuse_port={self.reuse_port!r}): pass a bool")
