"""ConnectionLimiter: who may come in. It decides at once; waiting is a separate step."""

from __future__ import annotations

import threading
from collections import Counter

import trio

from trioreactor.address import SocketAddress, peer_key
from trioreactor.options import Limits


class ConnectionLimiter:
    """Counts connections against `Limits`, which may be changed at any time.

    A permit is taken before `accept` and given back when the connection ends, so the count is
    exact. Lowering a limit closes nobody; it holds for newcomers. Whom a connection is from may
    turn out in another thread, where it lives: `try_enter` and `reject` may be called there.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._permits = 0
        self._peers: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()
        # For these two counters. It can be taken twice, for a signal handler may ask.
        self._lock = threading.RLock()
        self._lot = trio.lowlevel.ParkingLot()
        # Token bucket of the accept rate: how many may come at once, and when that was reckoned.
        self._tokens = self._burst
        self._reckoned = float("-inf")
        self._closed = False

    @property
    def limits(self) -> Limits:
        """The limits in force. Setting them wakes whoever waits for room."""
        return self._limits

    @limits.setter
    def limits(self, limits: Limits) -> None:
        self._limits = limits
        self._tokens = min(self._tokens, self._burst)
        self._lot.unpark_all()

    @property
    def _burst(self) -> float:
        rate = self._limits.accept_rate
        return max(1.0, rate) if rate is not None else 1.0

    def try_acquire(self) -> str | None:
        """Take a permit. None if it was granted, else which limit is in the way."""
        limits = self._limits
        if limits.connections is not None and self._permits >= limits.connections:
            return "connections"
        if limits.accept_rate is not None:
            if self._seconds_to_token(limits.accept_rate) > 0:
                return "accept_rate"
            self._tokens -= 1
        self._permits += 1
        return None

    def give_back(self) -> None:
        """Return a permit that was not used: nobody was there to accept."""
        if self._limits.accept_rate is not None:
            self._tokens = min(self._burst, self._tokens + 1)
        self.release()

    def try_enter(self, address: SocketAddress) -> bool:
        """Count a connection, which has a permit, against its peer's share. False: no room."""
        key = peer_key(address)
        most = self._limits.per_peer
        if key is not None:
            with self._lock:
                if most is not None and self._peers[key] >= most:
                    return False
                self._peers[key] += 1
        return True

    def reject(self, obstacle: str) -> None:
        """Count one that was turned away by that limit."""
        with self._lock:
            self._rejected[obstacle] += 1

    def rejected(self) -> dict[str, int]:
        """How many were turned away so far, by limit."""
        with self._lock:
            return dict(self._rejected)

    def leave(self, address: SocketAddress) -> None:
        """A connection that had entered has ended: free its place and its permit."""
        key = peer_key(address)
        if key is not None:
            with self._lock:
                self._peers[key] -= 1
                if not self._peers[key]:
                    del self._peers[key]
        self.release()

    def release(self) -> None:
        """Free a permit whose connection did not enter."""
        self._permits -= 1
        if self._lot:
            # All of them: who waits for room need not be the one with somebody to let in.
            self._lot.unpark_all()

    def close(self) -> None:
        """Nobody will be let in any more: end every wait."""
        self._closed = True
        self._lot.unpark_all()

    async def wait_for_room(self) -> None:
        """Wait until there may be room, or waiting is no longer wanted."""
        await trio.lowlevel.checkpoint()
        while not self._closed:
            limits = self._limits
            if limits.when_full == "reject":
                # It was changed meanwhile: those who wait are to be told.
                return
            if limits.connections is not None and self._permits >= limits.connections:
                await self._lot.park()
                continue
            wait = 0.0
            if limits.accept_rate is not None:
                wait = self._seconds_to_token(limits.accept_rate)
            if wait <= 0:
                return
            # New limits end the wait, too.
            with trio.move_on_after(wait):
                await self._lot.park()

    def _seconds_to_token(self, rate: float) -> float:
        now = trio.current_time()
        if self._reckoned > float("-inf"):
            self._tokens = min(self._burst, self._tokens + (now - self._reckoned) * rate)
        self._reckoned = now
        # The clock's grain must not make a whole token look like a little less.
        return (1 - self._tokens) / rate if self._tokens < 1 - 1e-9 else 0.0
