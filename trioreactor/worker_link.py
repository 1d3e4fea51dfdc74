"""What a supervisor and a worker say to each other: one JSON value a line, on a socket pair.

    supervisor                      worker
    Begin(target, listeners, ...)   -> Ready() once it accepts, or Failed(reason)
    Ping()                          -> Pong()
    Count()                         -> Counted(statistics)
    Dump()                          writes its connections and tasks to the log
    Drain(grace, take_waiting)      -> Counted(statistics), then it ends
                                    Leaving(): it was asked to end, and wants to be replaced

The end of either is the end of the pair: a worker whose supervisor is gone drains and ends.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from trioreactor.codec import Codec
from trioreactor.framed import FramedChannel
from trioreactor.line_codecs import JsonLinesCodec
from trioreactor.options import Keepalive, SocketOptions
from trioreactor.tcp_connection import TcpConnection

# A traceback, or the search path of a large installation, fits by far.
_MAX_FRAME = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Begin:
    """Serve this."""

    target: str
    """What to serve: see `server_target`."""
    options: Mapping[str, Any]
    """The fields of `ServeOptions`."""
    listeners: list[int]
    """Descriptors of listening sockets, which the worker has inherited."""
    socket_options: Mapping[str, Any]
    """The fields of `SocketOptions`, where accepted sockets do not have those of the listener."""
    grace: float
    """Seconds for the drain of a worker that ends by itself, because the supervisor is gone."""
    path: list[str]
    """The supervisor's ``sys.path``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ping:
    """Asks whether the worker's loop turns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Count:
    """Asks for the worker's statistics."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dump:
    """Write your connections and tasks to the log."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drain:
    """End, within *grace* seconds."""

    grace: float
    take_waiting: bool
    """Nobody else will accept from your sockets: take those who wait there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready:
    """It accepts."""

    sources: list[str]
    """Directories that the program was imported from, for whoever watches them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """It cannot begin, and ends."""

    reason: str
    """In a line."""
    details: str
    """A traceback, where it is of use; else empty."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pong:
    """Its loop turns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Counted:
    """What its server has counted."""

    statistics: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Leaving:
    """Somebody has asked this process to end."""


Message: TypeAlias = Begin | Ping | Count | Dump | Drain | Ready | Failed | Pong | Counted | Leaving

_KINDS: Mapping[str, type[Message]] = {
    kind.__name__: kind
    for kind in (Begin, Ping, Count, Dump, Drain, Ready, Failed, Pong, Counted, Leaving)
}


def _encode(message: Message) -> Any:
    return [type(message).__name__, asdict(message)]


def _decode(value: Any) -> Message:
    kind, fields = value
    return _KINDS[kind](**fields)


def socket_options_from(plain: Mapping[str, Any]) -> SocketOptions:
    """Those that ``asdict`` made *plain* of."""
    values = dict(plain)
    # True, False, or its fields.
    if not isinstance(values["keepalive"], bool):
        values["keepalive"] = Keepalive(**values["keepalive"])
    return SocketOptions(**values)


LINK_CODEC: Codec[Message] = JsonLinesCodec(max_frame=_MAX_FRAME).map(_encode, _decode)


def open_link(sock: socket.socket, name: str) -> FramedChannel[Message]:
    """The channel on one end of the pair, which it then owns."""
    sock.setblocking(False)
    conn = TcpConnection.from_socket(sock, local_address="", peer_address="", name=name)
    return FramedChannel(conn, LINK_CODEC)
