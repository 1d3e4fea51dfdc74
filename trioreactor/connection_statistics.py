"""What a connection can say of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ConnectionStatistics:
    """A connection's counters at one moment."""

    bytes_received: int
    """Taken from the kernel."""
    bytes_sent: int
    """Given to the kernel."""
    buffered: int
    """Queued for sending."""
    pauses: int
    """Times the send buffer rose above the high-water mark."""
    resumes: int
    """Times it sank to the low one after that."""
    dropped: int
    """Messages that were offered and dropped for want of room: see `TcpConnection.offer`."""
