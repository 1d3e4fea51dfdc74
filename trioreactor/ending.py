"""Ending: how a connection ended, for those who still use it."""

from __future__ import annotations

import trio

from trioreactor.state import CloseReason


class Ending:
    """How a connection ended, or began to, and so what its users are told."""

    __slots__ = ("broken", "closed_here", "fault", "name", "reason")

    def __init__(self, name: str) -> None:
        self.name = name
        self.reason: CloseReason | None = None
        # What the peer or the network did; `closed_here` then says whether we closed since.
        self.broken: Exception | None = None
        self.closed_here = False
        # What a close by us will have for its reason, where an error led to it.
        self.fault: CloseReason | None = None

    def error(self) -> Exception:
        """What to raise to somebody who uses a connection that no longer serves them."""
        if self.broken is None or self.closed_here:
            reason = self.reason.value if self.reason else "closing"
            return trio.ClosedResourceError(f"{self.name}: we closed this connection ({reason})")
        error = trio.BrokenResourceError(f"{self.name}: {self.broken}")
        error.__cause__ = self.broken
        return error
