"""TcpConnection is a `trio.abc.HalfCloseableStream`, by trio's own checker."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio.testing

from tests.conftest import Pair, fill


async def test_half_closeable_stream(make_pair: Callable[..., Awaitable[Pair]]) -> None:
    """trio's checker passes, with a maker of pairs that are clogged both ways."""

    async def clogged() -> Pair:
        left, right = await make_pair()
        await fill(left)
        await fill(right)
        return left, right

    await trio.testing.check_half_closeable_stream(make_pair, clogged)
