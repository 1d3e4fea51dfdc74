"""Sums of server statistics, and the way from one process to another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from types import MappingProxyType
from typing import Any

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
    sums: dict[str, Any] = {}
    for field in fields(ServerStatistics):
        values = [getattr(part, field.name) for part in (NOTHING, *parts)]
        if field.name == "loop_lag":
            sums[field.name] = max((lag for lag in values if lag is not None), default=None)
        elif isinstance(values[0], Mapping):
            counter: Counter[Any] = Counter()
            for value in values:
                counter.update(value)
            sums[field.name] = MappingProxyType(dict(counter))
        else:
            sums[field.name] = sum(values)
    return ServerStatistics(**sums)


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
