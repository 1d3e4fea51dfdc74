"""What a server can say of itself: counters, and the report of a drain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from trioreactor.connection_statistics import ConnectionStatistics
from trioreactor.state import CloseReason
from trioreactor.tcp_connection import TcpConnection


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerStatistics:
    """A server's counters at one moment. ``opened - sum(closed.values()) == active``, always."""

    opened: int
    """Connections given to the handler since the server was made."""
    active: int
    """Connections now."""
    closed: Mapping[CloseReason, int]
    """Ended ones by reason."""
    rejected: Mapping[str, int]
    """Newcomers turned away, by the limit that was in the way; never part of `opened`."""
    shed: int
    """Newcomers turned away because no descriptor was free."""
    bytes_received: int
    """From all connections, ended ones too."""
    bytes_sent: int
    """To all connections, ended ones too."""
    buffered: int
    """Bytes queued for sending now."""
    pauses: int
    """Times a send buffer rose above its high-water mark."""
    resumes: int
    """Times one sank to its low mark after that."""


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


class ServerCounters:
    """Counts what has ended, and adds what lives when asked."""

    __slots__ = ("closed", "ended", "opened", "rejected")

    def __init__(self) -> None:
        self.opened = 0
        self.closed: Counter[CloseReason] = Counter()
        self.rejected: Counter[str] = Counter()
        # Sums over ended connections, field by field.
        self.ended: Counter[str] = Counter()

    def count_end(self, conn: TcpConnection) -> None:
        """*conn* has ended."""
        assert conn.close_reason is not None
        self.closed[conn.close_reason] += 1
        _add(self.ended, conn.statistics())

    def snapshot(self, living: Iterable[TcpConnection], shed: int) -> ServerStatistics:
        """The counters now, with *living* the connections that have not ended."""
        sums = Counter(self.ended)
        active = 0
        for conn in living:
            active += 1
            _add(sums, conn.statistics())
        return ServerStatistics(
            opened=self.opened,
            active=active,
            closed=MappingProxyType(dict(self.closed)),
            rejected=MappingProxyType(dict(self.rejected)),
            shed=shed,
            bytes_received=sums["bytes_received"],
            bytes_sent=sums["bytes_sent"],
            buffered=sums["buffered"],
            pauses=sums["pauses"],
            resumes=sums["resumes"],
        )


def _add(sums: Counter[str], statistics: ConnectionStatistics) -> None:
    sums["bytes_received"] += statistics.bytes_received
    sums["bytes_sent"] += statistics.bytes_sent
    sums["buffered"] += statistics.buffered
    sums["pauses"] += statistics.pauses
    sums["resumes"] += statistics.resumes
