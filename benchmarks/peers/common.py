"""What the peers share: where they listen, how they are called, and messages cut by hand."""

from __future__ import annotations

import socket
import ssl
import struct
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

BACKLOG = 4096
"""For every listening socket; the kernel cuts it to SOMAXCONN."""

CHUNK = 65536
"""One read, where the program chooses."""

MAX_MESSAGE = 65536
"""Longer lines and frames end their connection."""

BROADCAST_LIMIT = 2**24
"""A client that does not read is closed when so many bytes of broadcasts wait for it."""

BURST = 16
"""Where writing or reading a block may go on without a wait, others have their turn after so many.
Nothing else would give it to them while the client keeps up."""

BLOCK = bytes(65536)
PONG = b"+PONG\r\n"
LENGTH = struct.Struct(">i")


# -- listening


def announce(port: int) -> None:
    """Tell the driver where to connect."""
    print(port, flush=True)


def listening_socket() -> socket.socket:
    """One listening socket on loopback, announced. Accepted ones inherit its TCP_NODELAY."""
    sock = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    announce(sock.getsockname()[1])
    return sock


def tls_context() -> ssl.SSLContext:
    """What those who serve TLS do so with."""
    import trustme

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("localhost").configure_cert(context)
    return context


# -- the command line

Works = Mapping[str, Callable[[], object]]

T = TypeVar("T")


def works(
    serve: Callable[[T], object],
    *,
    echo: T,
    lines: T,
    framed: T,
    sink: T,
    source: T,
    broadcast: T,
) -> Works:
    """Every work, for those that *serve* each by something of one kind."""
    return {
        "echo": partial(serve, echo),
        "lines": partial(serve, lines),
        "framed": partial(serve, framed),
        "sink": partial(serve, sink),
        "source": partial(serve, source),
        "broadcast": partial(serve, broadcast),
    }


def main(modes: Mapping[str, Works]) -> None:
    """Serve as ``python PROGRAM MODE WORK`` says."""
    if len(sys.argv) != 3:
        raise SystemExit(f"usage: python {sys.argv[0]} MODE WORK; modes: {', '.join(modes)}")
    _, mode, work = sys.argv
    if mode not in modes:
        raise SystemExit(f"no mode {mode!r}: pass one of {', '.join(modes)}")
    works = modes[mode]
    if work not in works:
        raise SystemExit(f"no work {work!r}: pass one of {', '.join(works)}")
    works[work]()


# -- messages cut by hand, for those that have no framing of their own


class FramingError(ValueError):
    """The client has broken the protocol."""


Answer = Callable[[bytes], tuple[bytes, bytes]]
"""What is to be sent for the whole messages in the data, joined, and the data left over."""


def check_lines(lines: list[bytes]) -> None:
    """Raise if one of the lines is too long."""
    if max(map(len, lines)) > MAX_MESSAGE:
        raise FramingError("a line that is too long")


def answer_lines(data: bytes) -> tuple[bytes, bytes]:
    """An answer for each line."""
    lines = data.split(b"\r\n")
    if len(data) > MAX_MESSAGE:
        check_lines(lines)
    rest = lines.pop()
    return PONG * len(lines), rest


def answer_frames(data: bytes) -> tuple[bytes, bytes]:
    """Each frame, made anew."""
    answers: list[bytes] = []
    start, end = 0, len(data)
    while end - start >= LENGTH.size:
        (size,) = LENGTH.unpack_from(data, start)
        if not 0 <= size <= MAX_MESSAGE:
            raise FramingError(f"a frame of {size} bytes")
        stop = start + LENGTH.size + size
        if stop > end:
            break
        message = data[start + LENGTH.size : stop]
        answers.append(LENGTH.pack(len(message)) + message)
        start = stop
    return b"".join(answers), data[start:]


def whole_lines(data: bytes) -> tuple[bytes, bytes]:
    r"""The lines themselves, up to the last ``"\n"``: what is to be broadcast."""
    if len(data) > MAX_MESSAGE:
        check_lines(data.split(b"\n"))
    end = data.rfind(b"\n") + 1
    return data[:end], data[end:]
