"""What a client can say of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trioreactor.connection_counters import ConnectionTotals


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientStatistics(ConnectionTotals):
    """A client's counters at one moment. ``opened - sum(closed.values()) == active``, always."""

    attempts: int
    """Attempts to connect that have ended, since the client was made."""
    failures: Mapping[str, int]
    """Those that failed, by their error's name: ``"ECONNREFUSED"``, ``"gaierror"``."""
