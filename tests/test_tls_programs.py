"""TLS with OpenSSL's own programs at the other end, in both versions of the protocol."""

from __future__ import annotations

import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.conftest import echo, serving, until
from tests.servers import installed, unused_port
from tests.simulated import simulated
from tests.tls import NAME, client_context, server_context, versions, write_pem
from trioreactor import CloseReason, HandshakeFailed, TcpConnection, TcpServer

pytestmark = pytest.mark.program

FLAG = {ssl.TLSVersion.TLSv1_2: "-tls1_2", ssl.TLSVersion.TLSv1_3: "-tls1_3"}


@pytest.fixture
def openssl() -> str:
    return installed("openssl")


@asynccontextmanager
async def program(*command: object) -> AsyncIterator[trio.Process]:
    """Runs in the block, with pipes; killed at its end."""
    process = await trio.lowlevel.open_process(
        [str(part) for part in command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        with trio.fail_after(20):
            yield process
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            for pipe in process.stdin, process.stdout:
                assert pipe is not None
                await pipe.aclose()


class Output:
    """What a program has said."""

    def __init__(self, process: trio.Process) -> None:
        assert process.stdout is not None
        self._stream = process.stdout
        self.text = b""

    async def until(self, text: bytes, count: int = 1) -> bytes:
        """Wait until it has said *text* so often; all that it has said."""
        while self.text.count(text) < count:
            chunk = await self._stream.receive_some()
            assert chunk, self.text
            self.text += chunk
        return self.text


async def say(process: trio.Process, text: bytes) -> None:
    assert process.stdin is not None
    await process.stdin.send_all(text)


@versions
async def test_s_client(openssl: str, tmp_path: Path, version: ssl.TLSVersion) -> None:
    """It verifies us, hears its echo, changes keys where it can, and ends with a clean EOF."""
    _, trusted = write_pem(tmp_path)
    server = TcpServer(echo, 0, host="127.0.0.1", ssl_context=server_context())
    async with serving(server) as (host, port), program(
        openssl, "s_client", FLAG[version], "-connect", f"{host}:{port}",
        "-servername", NAME, "-verify_hostname", NAME, "-verify_return_error",
        "-CAfile", trusted, "-nocommands" if version is ssl.TLSVersion.TLSv1_2 else "-brief",
    ) as client:  # fmt: skip
        output = Output(client)
        await output.until(b"erif")
        await say(client, b"hello\n")
        await output.until(b"hello")
        if version is ssl.TLSVersion.TLSv1_3:
            # Its commands: new keys for its side, and for both sides.
            for command in b"k\n", b"K\n":
                await say(client, command)
                await output.until(b"KEYUPDATE", command.count(b"K") + 1)
                await say(client, b"again" + command)
                await output.until(b"again" + command)
        (conn,) = server.connections.values()
        assert conn.tls is not None
        assert conn.tls.server_hostname == NAME
        assert client.stdin is not None
        await client.stdin.aclose()
        await until(lambda: not server.connections)
    assert server.statistics().closed == {CloseReason.PEER_EOF: 1}


@versions
async def test_s_client_resumes(openssl: str, tmp_path: Path, version: ssl.TLSVersion) -> None:
    """A session that it keeps in a file is resumed by another s_client."""
    _, trusted = write_pem(tmp_path)
    session = tmp_path / "session.pem"
    reused: list[bool] = []

    async def handler(conn: TcpConnection) -> None:
        assert conn.tls is not None
        reused.append(conn.tls.session_reused)
        await echo(conn)

    server = TcpServer(handler, 0, host="127.0.0.1", ssl_context=server_context())
    async with serving(server) as (host, port):
        for option in "-sess_out", "-sess_in":
            async with program(
                openssl, "s_client", FLAG[version], "-connect", f"{host}:{port}",
                "-CAfile", trusted, option, session,
            ) as client:  # fmt: skip
                output = Output(client)
                await say(client, b"hello\n")
                await output.until(b"hello")
                assert client.stdin is not None
                await client.stdin.aclose()
                await client.wait()
    assert reused == [False, True]


async def test_s_client_is_refused(openssl: str) -> None:
    """A version that we do not have, and no certificate where we want one."""
    context = server_context(ssl.TLSVersion.TLSv1_3, verify=True)
    server = TcpServer(echo, 0, host="127.0.0.1", ssl_context=context)
    async with serving(server) as (host, port):
        for flag in "-tls1_2", "-tls1_3":
            async with program(
                openssl, "s_client", flag, "-connect", f"{host}:{port}"
            ) as client:  # fmt: skip
                await Output(client).until(b"alert")
                await client.wait()
        await until(lambda: not server.connections)
    assert server.statistics().closed == {CloseReason.HANDSHAKE_FAILED: 2}


@pytest.fixture
def port() -> Iterator[int]:
    with unused_port() as port:
        yield port


@asynccontextmanager
async def s_server(
    openssl: str, port: int, directory: Path, *options: object
) -> AsyncIterator[tuple[trio.Process, Output]]:
    own, _ = write_pem(directory)
    async with program(
        openssl, "s_server", "-accept", f"127.0.0.1:{port}", "-cert", own, "-key", own, *options
    ) as process:
        output = Output(process)
        await output.until(b"ACCEPT")
        yield process, output


@versions
async def test_s_server(openssl: str, tmp_path: Path, port: int, version: ssl.TLSVersion) -> None:
    """We verify it, talk, resume a session, and hear its close_notify."""
    context = client_context()
    session = None
    async with s_server(openssl, port, tmp_path, FLAG[version], "-rev") as (_, _output):
        for reused in False, True:
            async with TcpConnection(await trio.open_tcp_stream("127.0.0.1", port)) as conn:
                await conn.start_tls(
                    context, server_side=False, server_hostname=NAME, session=session
                )
                await conn.send_all(b"hello\n")
                assert await conn.receive_some() == b"olleh\n"
                assert conn.tls is not None
                assert conn.tls.session_reused is reused
                session = conn.tls.session
                await conn.send_eof()
                assert await conn.receive_some() == b""


async def test_s_server_renegotiates(openssl: str, tmp_path: Path, port: int) -> None:
    """TLS 1.2: it asks for another handshake in the middle, and what we send waits for that."""
    async with (
        s_server(openssl, port, tmp_path, "-tls1_2") as (server, output),
        await trio.open_tcp_stream("127.0.0.1", port) as stream,
        trio.open_nursery() as nursery,
    ):
        # Between the two every byte goes through the test's hands.
        conn, sock = simulated()

        async def forward() -> None:
            await stream.send_all(bytes(sock.output))
            sock.output.clear()

        async def back() -> None:
            sock.peer_sends(await stream.receive_some())
            await trio.testing.wait_all_tasks_blocked()

        nursery.start_soon(
            partial(conn.start_tls, client_context(), server_side=False, server_hostname=NAME)
        )
        await trio.testing.wait_all_tasks_blocked()
        while conn.tls is None:
            await forward()
            await back()
        nursery.start_soon(conn.receive_some)
        # One of its commands.
        await say(server, b"r\n")
        await back()
        # With the next thing that we do it begins, and only with its end that goes on.
        conn.send(b"hello\n" * 20000)
        assert sock.output
        assert conn.buffered == 120_000
        while conn.buffered:
            await forward()
            await back()
        await forward()
        await output.until(b"hello\n", 20000)
        nursery.cancel_scope.cancel()
    conn.force_close()


async def test_s_server_that_is_another(openssl: str, tmp_path: Path, port: int) -> None:
    """Whose certificate is for another name."""
    async with s_server(openssl, port, tmp_path):
        conn = TcpConnection(await trio.open_tcp_stream("127.0.0.1", port))
        with pytest.raises(HandshakeFailed, match=r"(?i)hostname"):
            await conn.start_tls(
                client_context(), server_side=False, server_hostname="other.example"
            )
