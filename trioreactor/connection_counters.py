"""What servers and clients count about their connections."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from trioreactor.state import CloseReason
from trioreactor.tcp_connection import TcpConnection


@dataclass(frozen=True, kw_only=True, slots=True)
class ConnectionTotals:
    """Counters over many connections. ``opened - sum(closed.values()) == active``, always."""

    opened: int
    """Connections given to the handler since the counting began."""
    active: int
    """Connections now."""
    closed: Mapping[CloseReason, int]
    """Ended ones by reason."""
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
    dropped: int
    """Messages that were offered and dropped for want of room."""

    def as_fields(self) -> dict[str, Any]:
        """The fields by name, for a kind of totals that has more."""
        return {field.name: getattr(self, field.name) for field in fields(ConnectionTotals)}


_SUMMED = ("bytes_received", "bytes_sent", "buffered", "pauses", "resumes", "dropped")


class ConnectionCounters:
    """Counts what has ended, and adds what lives when asked."""

    __slots__ = ("_closed", "_ended", "opened")

    def __init__(self) -> None:
        self.opened = 0
        self._closed: Counter[CloseReason] = Counter()
        # Sums over ended connections, field by field.
        self._ended: Counter[str] = Counter()

    def count_end(self, conn: TcpConnection) -> None:
        """*conn* has ended."""
        assert conn.close_reason is not None
        self._closed[conn.close_reason] += 1
        _add(self._ended, conn)

    def totals(self, living: Iterable[TcpConnection]) -> ConnectionTotals:
        """The counters now, with *living* the connections that have not ended."""
        sums = Counter(self._ended)
        active = 0
        for conn in living:
            active += 1
            _add(sums, conn)
        return ConnectionTotals(
            opened=self.opened,
            active=active,
            closed=MappingProxyType(dict(self._closed)),
            **{name: sums[name] for name in _SUMMED},
        )


def _add(sums: Counter[str], conn: TcpConnection) -> None:
    statistics = conn.statistics()
    for name in _SUMMED:
        sums[name] += getattr(statistics, name)
