"""TcpConnection is a `trio.abc.HalfCloseableStream`, by trio's own checker; over TLS, too."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable
from functools import partial

import trio.testing

from tests.conftest import Pair, fill, unix_pair
from tests.tls import tls_pair, versions
from trioreactor import TcpConnection


async def check(make_pair: Callable[[], Awaitable[Pair]]) -> None:
    """trio's checker passes, with a maker of pairs that are clogged both ways."""

    async def clog(conn: TcpConnection) -> None:
        # A kernel that has taken a part may soon have room for the rest.
        while not conn.congested:
            await fill(conn)
            await trio.testing.wait_all_tasks_blocked(0.001)

    async def clogged() -> Pair:
        left, right = await make_pair()
        await clog(left)
        await clog(right)
        return left, right

    await trio.testing.check_half_closeable_stream(make_pair, clogged)


async def test_half_closeable_stream(make_pair: Callable[..., Awaitable[Pair]]) -> None:
    """In the open, over TCP and over Unix sockets."""
    await check(make_pair)


@versions
async def test_half_closeable_stream_over_tls(version: ssl.TLSVersion) -> None:
    """TLS has no half-close of its own: close_notify, and the socket's EOF behind it, are one."""
    await check(partial(tls_pair, version, unix_pair))
