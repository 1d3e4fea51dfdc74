"""What a server can say of itself: counters, and the report of a drain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trioreactor.connection_counters import ConnectionTotals


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerStatistics(ConnectionTotals):
    """A server's counters at one moment. ``opened - sum(closed.values()) == active``, always."""

    rejected: Mapping[str, int]
    """Newcomers turned away, by the limit that was in the way; never part of `opened`."""
    shed: int
    """Newcomers turned away because no descriptor was free."""
    loop_lag: float | None = None
    """How long a loop of the server was away from the kernel at the most since the watchdog began:
    the longest turn, seconds, whatever the reason was. None without a watchdog."""
    loop_holds: int = 0
    """How many turns took longer than the watchdog's threshold, in all loops."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DrainReport:
    """How a drain went."""

    finished: int
    """Connections that ended within the grace."""
    forced: tuple[str, ...]
    """Names of those that were closed because the grace was over."""
    stuck: tuple[str, ...]
    """Names of those whose handler still ran after that, against its cancellation."""
    seconds: float
    """How long it took."""
