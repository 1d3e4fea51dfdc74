"""ClientWaiters: those who wait for a client to be connected, and what they are told."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import trio

from trioreactor.connector import REMEMBERED
from trioreactor.endpoints import attempts_text
from trioreactor.errors import ConnectError

if TYPE_CHECKING:
    from trioreactor.endpoints import ConnectAttempt


class ClientWaiters:
    """Every change wakes all of them, and each looks for itself."""

    __slots__ = ("_failures", "_forgotten", "_lot", "failed")

    def __init__(self) -> None:
        self._failures: deque[ConnectAttempt] = deque(maxlen=REMEMBERED)
        self._lot = trio.lowlevel.ParkingLot()
        # How many attempts have failed, and how many of them are old news.
        self.failed = 0
        self._forgotten = 0

    async def wait(self) -> None:
        """Wait until something changes."""
        await self._lot.park()

    def changed(self) -> None:
        """A connection was made, or none will come any more."""
        self._lot.unpark_all()

    def connected(self) -> None:
        """A connection was made: the failures before it explain nothing that comes."""
        self._forgotten = self.failed
        self.changed()

    def attempt_failed(self, attempt: ConnectAttempt) -> None:
        """An attempt failed."""
        self.failed += 1
        self._failures.append(attempt)
        self.changed()

    @property
    def reason(self) -> str:
        """Why there is no connection, to be put behind a sentence that says so."""
        return f": {self._failures[-1]}" if self.failed > self._forgotten else ""

    def error(self, name: str, failures: int) -> ConnectError:
        """What to raise after so many failures."""
        attempts = list(self._failures)[-failures:]
        text = f"{name}: no connection after {attempts_text(failures)}: {attempts[-1]}"
        return ConnectError(text, attempts)
