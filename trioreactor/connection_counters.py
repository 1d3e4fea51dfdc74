"""What servers and clients count about their connections."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from trioreactor.state import CloseReason, ConnectionState
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


class ConnectionCounters:
    """Counts what has ended, and adds what lives when asked."""

    __slots__ = (
        "_bytes_received",
        "_bytes_sent",
        "_closed",
        "_dropped",
        "_pauses",
        "_resumes",
        "opened",
    )

    def __init__(self) -> None:
        self.opened = 0
        self._closed: Counter[CloseReason] = Counter()
        # Sums over ended connections.
        self._bytes_received = 0
        self._bytes_sent = 0
        self._pauses = 0
        self._resumes = 0
        self._dropped = 0

    def count_end(self, conn: TcpConnection) -> None:
        """*conn* has ended."""
        assert conn.close_reason is not None
        self._closed[conn.close_reason] += 1
        ended = conn.statistics()
        self._bytes_received += ended.bytes_received
        self._bytes_sent += ended.bytes_sent
        self._pauses += ended.pauses
        self._resumes += ended.resumes
        self._dropped += ended.dropped

    def totals(self, living: Iterable[TcpConnection]) -> ConnectionTotals:
        """The counters now, with *living* the connections that have not ended."""
        # The state first, for another thread may ask while one is opened. That forgets what was
        # received before, a PROXY header, and totals never go back.
        parts = [(conn.state, conn.statistics()) for conn in living]
        now = [each for _, each in parts]
        opened = [each for state, each in parts if state is not ConnectionState.CONNECTING]
        return ConnectionTotals(
            opened=self.opened,
            active=len(now),
            closed=MappingProxyType(dict(self._closed)),
            bytes_received=self._bytes_received + sum(each.bytes_received for each in opened),
            bytes_sent=self._bytes_sent + sum(each.bytes_sent for each in now),
            buffered=sum(each.buffered for each in now),
            pauses=self._pauses + sum(each.pauses for each in now),
            resumes=self._resumes + sum(each.resumes for each in now),
            dropped=self._dropped + sum(each.dropped for each in now),
        )


def sum_of_totals(parts: Iterable[ConnectionTotals]) -> ConnectionTotals:
    """The counters over all connections that are counted in *parts*."""
    closed: Counter[CloseReason] = Counter()
    sums = dict.fromkeys(
        (each.name for each in fields(ConnectionTotals) if each.name != "closed"), 0
    )
    for part in parts:
        closed.update(part.closed)
        for name in sums:
            sums[name] += getattr(part, name)
    return ConnectionTotals(closed=MappingProxyType(dict(closed)), **sums)
