"""Sums of server statistics, and the way from one process to another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from types import MappingProxyType
from typing import Any

from trioreactor.connection_counters import sum_of_totals
from trioreactor.server_statistics import ServerStatistics
from trioreactor.state import CloseReason

NOTHING = ServerStatistics(
    opened=0,
    active=0,
    closed=MappingProxyType({}),
    bytes_received=0,
    bytes_sent=0,
    buffered=0,
    pauses=0,
    resumes=0,
    dropped=0,
    rejected=MappingProxyType({}),
    shed=0,
)


def total(parts: Iterable[ServerStatistics]) -> ServerStatistics:
    """The sum of each counter; of the loops' lags, the longest."""
    parts = list(parts)
    rejected: Counter[str] = Counter()
    for part in parts:
        rejected.update(part.rejected)
    return ServerStatistics(
        rejected=MappingProxyType(dict(rejected)),
        shed=sum(part.shed for part in parts),
        loop_lag=max((part.loop_lag for part in parts if part.loop_lag is not None), default=None),
        loop_holds=sum(part.loop_holds for part in parts),
        **sum_of_totals(parts).as_fields(),
    )


def after_death(last: ServerStatistics) -> ServerStatistics:
    """What became of a server whose process has ended, by what it said *last*.

    The connections that it had then were closed by the system.
    """
    closed = Counter(last.closed)
    if last.active:
        closed[CloseReason.FORCED] += last.active
    return replace(last, active=0, buffered=0, closed=MappingProxyType(dict(closed)))


def as_plain(statistics: ServerStatistics) -> dict[str, Any]:
    """Values that JSON has."""
    plain: dict[str, Any] = {
        field.name: getattr(statistics, field.name) for field in fields(ServerStatistics)
    }
    plain["closed"] = {reason.name: count for reason, count in statistics.closed.items()}
    plain["rejected"] = dict(statistics.rejected)
    return plain


def from_plain(plain: Mapping[str, Any]) -> ServerStatistics:
    """The way back from `as_plain`."""
    values = dict(plain)
    closed = {CloseReason[name]: count for name, count in values["closed"].items()}
    values["closed"] = MappingProxyType(closed)
    values["rejected"] = MappingProxyType(dict(values["rejected"]))
    return ServerStatistics(**values)
