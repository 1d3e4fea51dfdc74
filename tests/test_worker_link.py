"""What supervisors and workers say to each other comes out as it went in."""

from __future__ import annotations

import socket
from dataclasses import asdict
from typing import get_args

import pytest

from trioreactor import Keepalive, ProtocolError, ServeOptions, SocketOptions
from trioreactor.statistics_totals import NOTHING, as_plain
from trioreactor.worker_link import (
    Begin,
    Count,
    Counted,
    Drain,
    Dump,
    Failed,
    Leaving,
    Message,
    Ping,
    Pong,
    Ready,
    open_link,
    socket_options_from,
)

OPTIONS = [SocketOptions(), SocketOptions(keepalive=Keepalive(idle=5), backlog=7)]

MESSAGES: list[Message] = [
    Begin(
        target="app:handler",
        options=ServeOptions(max_connections=5).as_plain(),
        listeners=[3, 4],
        socket_options=asdict(OPTIONS[1]),
        grace=2.5,
        path=["", "/a/b"],
    ),
    Ping(),
    Count(),
    Dump(),
    Drain(grace=1.5, take_waiting=True),
    Ready(sources=["/a"]),
    Failed(reason="no", details="line\nline"),
    Pong(),
    Counted(statistics=as_plain(NOTHING)),
    Leaving(),
]


async def test_every_message() -> None:
    """Each kind there is, over a real pair."""
    assert {type(message) for message in MESSAGES} == set(get_args(Message))
    left, right = (open_link(sock, "link") for sock in socket.socketpair())
    async with left, right:
        for message in MESSAGES:
            await left.send(message)
        assert [await right.receive() for _ in MESSAGES] == MESSAGES


async def test_what_is_no_message() -> None:
    """Is a `ProtocolError`, of that link alone."""
    left, right = socket.socketpair()
    with left:
        async with open_link(right, "link") as link:
            left.sendall(b'["Pang",{}]\n')
            with pytest.raises(ProtocolError):
                await link.receive()


@pytest.mark.parametrize("options", OPTIONS)
def test_socket_options(options: SocketOptions) -> None:
    """With keepalive in either form."""
    assert socket_options_from(asdict(options)) == options
