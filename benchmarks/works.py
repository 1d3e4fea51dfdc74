"""The works of the suite: what a server does, what load it gets, and by what it is compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Metric = Literal["cpu_us", "mb_per_s", "memory"]

METRICS: Mapping[Metric, str] = {
    "cpu_us": "server CPU, us a request",
    "mb_per_s": "MB/s",
    "memory": "bytes a connection",
}

MORE_IS_BETTER = {"mb_per_s"}
"""The metrics of which that is so; of the others less is."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """One work."""

    name: str
    title: str
    serve: str
    """What the server program is asked to do."""
    load: Mapping[str, str | int]
    """What the load generator is told; its kind is "kind". On each connection a burst of "pipeline"
    messages is sent, and when all of it is answered the next."""
    metric: Metric = "cpu_us"
    quick: bool = True
    """Whether ``--quick`` has it."""
    group: str | None = None
    """Works of one group, which stand one after another and serve the same, are measured by turns,
    for they are compared with each other."""


def _echo(name: str, title: str, *, quick: bool = True, **load: str | int) -> Work:
    return Work(name=name, title=title, serve="echo", load={"kind": "echo", **load}, quick=quick)


def _growth(conns: int) -> Work:
    return Work(
        name=f"active-{conns}",
        title=f"64-byte echo, 100 active of {conns:,} connections",
        serve="echo",
        load={"kind": "echo", "conns": conns, "active": 100},
        quick=False,
        group="growth",
    )


WORKS = (
    _echo("echo-1", "64-byte echo, 1 connection", conns=1, size=64),
    _echo("echo-50", "64-byte echo, 50 connections", conns=50, size=64),
    _echo("echo-500", "64-byte echo, 500 connections", conns=500, size=64),
    _echo("echo-5000", "64-byte echo, 5,000 connections", conns=5000, size=64, quick=False),
    _echo("echo-16k", "16 KiB echo, 20 connections", conns=20, size=16384),
    _echo(
        "pipelined",
        "64-byte echo, bursts of 50, 20 connections",
        conns=20,
        size=64,
        pipeline=50,
    ),
    Work(
        name="lines",
        title="lines answered by +PONG, bursts of 16, 50 connections",
        serve="lines",
        load={"kind": "redis", "conns": 50, "pipeline": 16},
    ),
    Work(
        name="framed",
        # Those of the others who have no framing of their own do not pay for one.
        title="100-byte messages behind a length, bursts of 32, 20 connections; "
        "plain trio, gevent, the Protocols and the bare loops cut by hand",
        serve="framed",
        load={"kind": "echo", "framing": "length", "conns": 20, "size": 100, "pipeline": 32},
    ),
    Work(
        name="sink",
        title="64 KiB writes to the server, 1 connection",
        serve="sink",
        load={"kind": "sink", "conns": 1},
        metric="mb_per_s",
    ),
    Work(
        name="source",
        title="64 KiB writes of the server, 1 connection",
        serve="source",
        load={"kind": "source", "conns": 1},
        metric="mb_per_s",
    ),
    Work(
        name="connect",
        title="connect, 64 bytes and back, close; 20 at a time",
        serve="echo",
        load={"kind": "connect", "conns": 20, "size": 64},
    ),
    Work(
        name="broadcast",
        title="100 bytes to each of 1,000 connections (a request is one delivery)",
        serve="broadcast",
        load={"kind": "broadcast", "conns": 1000, "size": 100},
    ),
    *(
        Work(name=name, title=title, serve="tls", load={**load, "tls": 1}, quick=False)
        for name, title, load in (
            ("tls-50", "TLS, 64-byte echo, 50 connections", {"kind": "echo", "conns": 50}),
            (
                "tls-16k",
                "TLS, 16 KiB echo, 20 connections",
                {"kind": "echo", "conns": 20, "size": 16384},
            ),
            (
                "tls-connect",
                "TLS, handshake, 64 bytes and back, close; 20 at a time",
                {"kind": "connect", "conns": 20},
            ),
        )
    ),
    _growth(100),
    _growth(1000),
    _growth(5000),
    Work(
        name="memory",
        title="memory of an idle connection, of 5,000",
        serve="echo",
        load={"kind": "hold", "conns": 5000},
        metric="memory",
        quick=False,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Server:
    """One server program and the mode it runs in."""

    name: str
    program: str
    """A file of ``peers``, or the name of the C program."""
    mode: str
    quick: bool = False
    """Whether ``--quick`` has it."""


DISPATCH = "trioreactor dispatch"
SEND = "trioreactor send"
SEND_ALL = "trioreactor send_all"
OURS = (DISPATCH, SEND, SEND_ALL)

SERVERS = (
    Server(name=DISPATCH, program="trioreactor_peer", mode="dispatch", quick=True),
    Server(name=SEND, program="trioreactor_peer", mode="send", quick=True),
    Server(name=SEND_ALL, program="trioreactor_peer", mode="send_all", quick=True),
    Server(name="plain trio", program="trio_peer", mode="streams", quick=True),
    Server(name="anyio on trio", program="anyio_peer", mode="trio"),
    Server(name="anyio on asyncio", program="anyio_peer", mode="asyncio"),
    Server(name="asyncio Protocol", program="asyncio_peer", mode="protocol", quick=True),
    Server(name="asyncio streams", program="asyncio_peer", mode="streams", quick=True),
    Server(name="uvloop Protocol", program="asyncio_peer", mode="uvloop-protocol", quick=True),
    Server(name="uvloop streams", program="asyncio_peer", mode="uvloop-streams", quick=True),
    Server(name="Twisted", program="twisted_peer", mode="protocol"),
    Server(name="Tornado", program="tornado_peer", mode="iostream"),
    Server(name="gevent", program="gevent_peer", mode="greenlets"),
    # On uvloop it is not tried.
    Server(name="EasyNetwork on trio", program="easynetwork_peer", mode="trio"),
    Server(name="EasyNetwork on asyncio", program="easynetwork_peer", mode="asyncio"),
    Server(name="bare epoll, Python", program="bare_epoll_peer", mode="loop"),
    Server(name="bare epoll, C", program="floor", mode="loop", quick=True),
)
