"""States and the moves between them, of connections and connectors; why connections end."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TypeAlias, TypeVar

from trioreactor.errors import IllegalStateTransition


class ConnectionState(enum.Enum):
    """Where a connection stands."""

    # Members are looked up for every connection, and an Enum's own hash is a function in Python.
    __hash__ = object.__hash__

    CONNECTING = "connecting"
    """The socket is connected; a handshake (TLS, PROXY protocol) still runs."""
    CONNECTED = "connected"
    """Both ways open for us. The peer may have sent its EOF: we can still send."""
    DISCONNECTING = "disconnecting"
    """No new data may be sent; what is queued still goes out, and input can be read."""
    DISCONNECTED = "disconnected"
    """The descriptor is closed."""


class CloseReason(enum.Enum):
    """Why a connection ended. Every connection has exactly one: the first that applied."""

    __hash__ = object.__hash__

    LOCAL_CLOSE = "local_close"
    """We closed it (`aclose`, or the handler returned) before the peer did."""
    PEER_EOF = "peer_eof"
    """The peer closed its side cleanly, then we closed ours."""
    PEER_RESET = "peer_reset"
    """The peer or the network broke the connection."""
    FORCED = "forced"
    """`force_close` without another reason."""
    CANCELLED = "cancelled"
    """The task that owned it was cancelled."""
    IDLE_TIMEOUT = "idle_timeout"
    """Nothing moved for too long."""
    FIRST_BYTE_TIMEOUT = "first_byte_timeout"
    """The peer said nothing after it had connected."""
    FRAME_TIMEOUT = "frame_timeout"
    """A message was begun and not finished in time."""
    WRITE_STALLED = "write_stalled"
    """The peer took none of what was queued for too long."""
    HEARTBEAT_TIMEOUT = "heartbeat_timeout"
    """The peer did not answer in time."""
    SLOW_CONSUMER = "slow_consumer"
    """The send buffer reached its hard limit."""
    PROTOCOL_ERROR = "protocol_error"
    """The peer sent what the protocol does not allow."""
    HANDSHAKE_FAILED = "handshake_failed"
    """It never became connected."""
    HANDLER_ERROR = "handler_error"
    """The handler, or a callback, raised."""
    DRAIN_TIMEOUT = "drain_timeout"
    """It did not end by itself within a drain's grace."""


TRANSITIONS: Mapping[ConnectionState, frozenset[ConnectionState]] = MappingProxyType(
    {
        ConnectionState.CONNECTING: frozenset(
            {ConnectionState.CONNECTED, ConnectionState.DISCONNECTED}
        ),
        ConnectionState.CONNECTED: frozenset(
            {ConnectionState.DISCONNECTING, ConnectionState.DISCONNECTED}
        ),
        ConnectionState.DISCONNECTING: frozenset({ConnectionState.DISCONNECTED}),
        ConnectionState.DISCONNECTED: frozenset(),
    }
)
"""The one table of a connection's legal moves."""


class ConnectorState(enum.Enum):
    """What a connector is at."""

    IDLE = "idle"
    """Nobody connects by it."""
    CONNECTING = "connecting"
    """An attempt runs."""
    WAITING = "waiting"
    """The backoff's delay before the next attempt."""
    CONNECTED = "connected"
    """The last `connect` succeeded. What became of that connection it does not know."""
    STOPPED = "stopped"
    """`stop` was called."""


CONNECTOR_TRANSITIONS: Mapping[ConnectorState, frozenset[ConnectorState]] = MappingProxyType(
    {
        ConnectorState.IDLE: frozenset(
            {ConnectorState.CONNECTING, ConnectorState.WAITING, ConnectorState.STOPPED}
        ),
        ConnectorState.CONNECTING: frozenset(
            {
                ConnectorState.CONNECTED,
                ConnectorState.WAITING,
                ConnectorState.IDLE,
                ConnectorState.STOPPED,
            }
        ),
        ConnectorState.WAITING: frozenset(
            {ConnectorState.CONNECTING, ConnectorState.IDLE, ConnectorState.STOPPED}
        ),
        ConnectorState.CONNECTED: frozenset({ConnectorState.IDLE, ConnectorState.STOPPED}),
        ConnectorState.STOPPED: frozenset(),
    }
)
"""The one table of a connector's legal moves."""

State = TypeVar("State", ConnectionState, ConnectorState)
Table: TypeAlias = Mapping[State, frozenset[State]]


def check_transition(table: Table[State], old: State, new: State) -> None:
    """Raise `IllegalStateTransition` unless *table* has the move from *old* to *new*."""
    if new not in table[old]:
        legal = ", ".join(sorted(s.name for s in table[old])) or "nothing"
        raise IllegalStateTransition(f"{old.name} can become {legal}, not {new.name}")


def state_diagram(table: Table[State], *, starts: Iterable[State]) -> str:
    """*table* as a Mermaid diagram, for the documentation."""
    lines = ["stateDiagram-v2", *(f"    [*] --> {start.name}" for start in starts)]
    for old, moves in table.items():
        lines += [f"    {old.name} --> {new.name}" for new in table if new in moves]
    lines += [f"    {old.name} --> [*]" for old, moves in table.items() if not moves]
    return "\n".join(lines)
