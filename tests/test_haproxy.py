"""The story of the health check: what ends a server on plain trio is nothing here.

haproxy closes the connections of its health checks with a reset (SO_LINGER 0), so that they leave
no TIME_WAIT behind. A bare ``check``, which only connects, is not seen by a server at all: haproxy
withholds the last ACK of the handshake, too, so its reset comes before there is anything to
accept. But as soon as the check says something (``option tcp-check`` with ``tcp-check send``), the
server has a connection, its handler's next read raises, and under `trio.serve_tcp` that is the end
of the whole server: with the most ordinary echo handler, at the first check, every time.

The same is shown first with a client of our own, for machines without haproxy.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

import trioreactor
from tests.conftest import connect, no_leaks, reset, until
from tests.servers import assert_echoes, serving_tcp

CHECK = b"PING\r\n"

CONFIG = r"""
global
    maxconn 100

defaults
    mode tcp
    timeout connect 5s
    timeout client 60s
    timeout server 60s

frontend front
    bind fd@{front}
    default_backend back

backend back
    option tcp-check
    tcp-check connect
    tcp-check send PING\r\n
    tcp-check expect string PING
    server only 127.0.0.1:{back} check inter 50ms
"""


class Echo:
    """An ordinary echo handler, for either library, that counts the checks that it has answered."""

    def __init__(self) -> None:
        self.checks = 0

    async def __call__(self, stream: Any) -> None:
        async for chunk in stream:
            await stream.send_all(chunk)
            self.checks += chunk == CHECK


async def check(address: Any) -> None:
    """One health check: say something, hear the answer, reset."""
    client = connect(address)
    await client.send_all(CHECK)
    assert await client.receive_some() == CHECK
    reset(client.socket)


@pytest.fixture
def haproxy_path() -> str:
    """Where haproxy is. Where it is not, the test is skipped, or fails if it is required."""
    path = shutil.which("haproxy", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if path is None:
        if os.environ.get("TRIOREACTOR_REQUIRE_SERVERS") == "1":
            pytest.fail("haproxy is not installed, and TRIOREACTOR_REQUIRE_SERVERS=1 wants it")
        pytest.skip("haproxy is not installed")
    return path


@asynccontextmanager
async def haproxy(path: str, server: Any, directory: Path) -> AsyncIterator[Any]:
    """haproxy before the server at that address, with a check every 50 ms; gives its address."""
    with socket.create_server(("127.0.0.1", 0)) as front:
        config = directory / "haproxy.cfg"
        config.write_text(CONFIG.format(front=front.fileno(), back=server[1]))
        process = await trio.lowlevel.open_process(
            [path, "-db", "-f", str(config)],
            pass_fds=[front.fileno()],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield front.getsockname()
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()


async def until_the_server_is_dead(scenario: Callable[[], Awaitable[None]]) -> None:
    """The scenario ends with what the handler raised: the peer's reset."""
    with trio.fail_after(30), pytest.raises(ExceptionGroup) as caught:
        await scenario()
    errors: list[BaseException] = [caught.value]
    while isinstance(errors[0], BaseExceptionGroup):
        errors = list(errors[0].exceptions)
        assert len(errors) == 1
    assert type(errors[0]) is trio.BrokenResourceError
    assert isinstance(errors[0].__cause__, ConnectionResetError)


async def test_a_check_ends_a_server_on_plain_trio() -> None:
    """Under trio.serve_tcp the reset comes out of the handler and ends everything."""

    async def scenario() -> None:
        async with serving_tcp(trio.serve_tcp, Echo()) as address, connect(address) as client:
            await assert_echoes(client)
            await check(address)
            await trio.sleep_forever()

    async with no_leaks():
        await until_the_server_is_dead(scenario)


async def test_a_check_is_nothing_here(caplog: pytest.LogCaptureFixture) -> None:
    """Under trioreactor.serve_tcp, with the same handler, nobody notices, nor does the log."""
    handler = Echo()
    async with (
        no_leaks(),
        serving_tcp(trioreactor.serve_tcp, handler) as address,
        connect(address) as client,
    ):
        for _ in range(20):
            await check(address)
            await assert_echoes(client)
        assert handler.checks == 20
    assert not caplog.records


async def test_haproxy_ends_a_server_on_plain_trio(haproxy_path: str, tmp_path: Path) -> None:
    """haproxy's first check ends trio.serve_tcp."""
    handler = Echo()

    async def scenario() -> None:
        async with (
            serving_tcp(trio.serve_tcp, handler) as address,
            haproxy(haproxy_path, address, tmp_path),
        ):
            await trio.sleep_forever()

    await until_the_server_is_dead(scenario)
    assert handler.checks == 1


async def test_haproxy_is_served(
    haproxy_path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Real traffic goes through haproxy all the while that it checks trioreactor.serve_tcp."""
    handler = Echo()

    async with (
        no_leaks(),
        serving_tcp(trioreactor.serve_tcp, handler) as address,
        haproxy(haproxy_path, address, tmp_path) as front,
        connect(front) as one,
        connect(front) as another,
    ):
        with trio.fail_after(30):
            while handler.checks < 10:
                await assert_echoes(one, b"real")
                await assert_echoes(another, b"traffic")
                async with connect(front) as newcomer:
                    await assert_echoes(newcomer, b"and more")
                await trio.sleep(0.01)
        checks = handler.checks
        await until(lambda: handler.checks > checks)
    assert not caplog.records
