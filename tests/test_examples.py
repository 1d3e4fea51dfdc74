"""The examples, each against real clients, and each run as a program."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import trio
import trio.testing

import trioreactor
from tests.conftest import no_leaks, reset, until

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# These listen nowhere; test_client_examples.py and test_message_examples.py run them.
CLIENTS = {"chat_client", "chat_load", "outbox", "resubscribe", "time_client"}

each_example = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)


def load(name: str) -> ModuleType:
    """An example as a module, whatever its name means elsewhere."""
    spec = importlib.util.spec_from_file_location(
        f"examples_{name}", ROOT / "examples" / f"{name}.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@asynccontextmanager
async def running(
    name: str, *arguments: object, **options: object
) -> AsyncIterator[Callable[[], Awaitable[trio.SocketStream]]]:
    """The example's `main` on port 0, from start to cancel; gives what connects to it."""
    async with no_leaks(), trio.open_nursery() as nursery:
        (acceptor,) = await nursery.start(partial(load(name).main, 0, *arguments, **options))
        with trio.fail_after(30):
            yield partial(trio.open_tcp_stream, *acceptor.address)
        nursery.cancel_scope.cancel()


async def read_exactly(stream: trio.SocketStream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = await stream.receive_some(size - len(data))
        assert more, f"EOF after {len(data)} of {size} bytes"
        data += more
    return data


async def read_to_eof(stream: trio.SocketStream) -> bytes:
    return b"".join([data async for data in stream])


async def ask(stream: trio.SocketStream, question: bytes = b"hello") -> bytes:
    """Send and read as much again; EOF or a reset is an empty answer."""
    try:
        await stream.send_all(question)
        return await stream.receive_some(len(question))
    except trio.BrokenResourceError:
        return b""


# -- echo


@pytest.mark.parametrize("mode", ["coroutine", "dispatch"])
async def test_echo(mode: str) -> None:
    """Both modes send back every byte, after the client's half-close, too."""
    sent = os.urandom(1_000_000)
    async with running("echo", mode) as connect:
        client = await connect()
        async with client, trio.open_nursery() as nursery:

            async def send() -> None:
                await client.send_all(sent)
                await client.send_eof()

            nursery.start_soon(send)
            assert await read_to_eof(client) == sent


@pytest.mark.parametrize("mode", ["coroutine", "dispatch"])
async def test_echo_stops_reading_from_one_who_does_not_read(mode: str) -> None:
    """A client may send more than the send buffer's hard limit first, and read it all later."""
    chunk = bytes(1_000_000)
    chunks = 90
    progress = 0
    async with running("echo", mode) as connect:
        client = await connect()

        async def send() -> None:
            nonlocal progress
            for _ in range(chunks):
                await client.send_all(chunk)
                progress += 1

        async with client, trio.open_nursery() as nursery:
            nursery.start_soon(send)
            before = -1
            while progress != before:
                before = progress
                await trio.sleep(0.2)
            # It was made to wait: unread, its bytes are in the kernels.
            assert 0 < progress < chunks
            received = 0
            while received < chunks * len(chunk):
                received += len(await client.receive_some(len(chunk)))


# -- discard


async def test_discard(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing comes back, everything is counted, and the count is printed."""
    async with running("discard") as connect:
        async with await connect() as client:
            await client.send_all(bytes(1_234_567))
            await client.send_eof()
            assert await read_to_eof(client) == b""
        printed = ""

        def counted() -> bool:
            nonlocal printed
            printed += capsys.readouterr().out
            return ", 1234567 bytes in all" in printed

        await until(counted)


# -- daytime, time


async def test_daytime() -> None:
    """One line with the time, then EOF."""
    async with running("daytime") as connect, await connect() as client:
        line = (await read_to_eof(client)).decode("ascii")
    told = datetime.strptime(line, "%A, %B %d, %Y %H:%M:%S-%Z\r\n").replace(tzinfo=UTC)
    assert abs((datetime.now(UTC) - told).total_seconds()) < 60


async def test_time_server() -> None:
    """Four bytes: seconds since 1900; then a half-close, and the client closes first."""
    async with running("time_server") as connect, await connect() as client:
        word = await read_to_eof(client)
        # Only half-closed: what we send is no error.
        await client.send_all(b"thanks")
        await trio.testing.wait_all_tasks_blocked(0.01)
        await client.send_all(b"again")
    assert len(word) == 4
    assert abs(struct.unpack("!I", word)[0] - time.time() - 2_208_988_800) < 60


# -- chargen


def assert_rotating(lines: list[bytes]) -> None:
    """Lines of 72 printable characters, each begun one character later in the ring of 95."""
    for number, line in enumerate(lines):
        assert line == bytes(0x20 + (number + column) % 95 for column in range(72))


async def test_chargen() -> None:
    """The characters rotate on and on, at whatever pace the client reads."""
    async with running("chargen") as connect, await connect() as client:
        # More than both kernels hold: write_complete has to come again and again.
        data = await read_exactly(client, 74 * 100_000)
        await trio.testing.wait_all_tasks_blocked(0.01)
        data += await read_exactly(client, 74 * 100_000)
    block, times = data[: 74 * 95], len(data) // (74 * 95)
    assert_rotating(block.split(b"\r\n")[:-1])
    assert data.startswith(block * times)
    assert block.startswith(data[len(block) * times :])


async def test_chargen_client_leaves(caplog: pytest.LogCaptureFixture) -> None:
    """A client that resets, or closes with much unread, is no error, and others are served."""
    async with running("chargen") as connect:
        one, other = await connect(), await connect()
        await read_exactly(one, 100)
        await read_exactly(other, 100)
        reset(one.socket)
        await other.aclose()
        async with await connect() as client:
            assert len(await read_exactly(client, 740_000)) == 740_000
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


# -- compressor


@pytest.mark.parametrize("threads", [0, 2])
async def test_compressor(threads: int) -> None:
    """Each message comes back compressed, in order, from one loop or several."""
    texts = [bytes([65 + number]) * (10_000 + number) for number in range(20)]
    async with running("compressor", threads) as connect:
        for client in [await connect() for _ in range(3)]:
            async with client:
                for text in texts:
                    await client.send_all(struct.pack("!I", len(text)) + text)
                for text in texts:
                    (size,) = struct.unpack("!I", await read_exactly(client, 4))
                    assert zlib.decompress(await read_exactly(client, size)) == text


# -- all five


async def test_all_in_one() -> None:
    """Five services on five ports of one loop, the endless one beside the others."""
    async with no_leaks(), trio.open_nursery() as nursery:
        addresses = await nursery.start(load("all_in_one").main, 0)
        clients = {
            name: await trio.open_tcp_stream(*address) for name, address in addresses.items()
        }
        with trio.fail_after(30):
            lines = (await read_exactly(clients["chargen"], 74 * 100)).split(b"\r\n")
            assert_rotating(lines[:-1])
            assert await ask(clients["echo"]) == b"hello"
            await clients["discard"].send_all(b"hello")
            await clients["discard"].send_eof()
            assert await read_to_eof(clients["discard"]) == b""
            assert str(datetime.now(UTC).year).encode() in await read_to_eof(clients["daytime"])
            (seconds,) = struct.unpack("!I", await read_to_eof(clients["time_since_1900"]))
            assert abs(seconds - time.time() - 2_208_988_800) < 60
        for client in clients.values():
            await client.aclose()
        nursery.cancel_scope.cancel()


async def test_all_in_one_ports() -> None:
    """The services' ports are those of their RFCs above --port."""
    assert list(load("all_in_one").SERVICES) == [7, 9, 13, 19, 37]


# -- limits


async def test_maxconnection_reject() -> None:
    """The third of two is closed at once; when one leaves, the next is served."""
    async with running("maxconnection", 2, "reject") as connect:
        first, second, third = await connect(), await connect(), await connect()
        assert await ask(first) == await ask(second) == b"hello"
        assert await ask(third) == b""
        await first.aclose()
        answer = b""
        while not answer:
            async with await connect() as fourth:
                answer = await ask(fourth)
        for client in (second, third):
            await client.aclose()


async def test_maxconnection_wait() -> None:
    """The third of two waits without an answer, and has it as soon as one leaves."""
    async with running("maxconnection", 2, "wait") as connect:
        first, second, third = await connect(), await connect(), await connect()
        assert await ask(first) == await ask(second) == b"hello"
        await third.send_all(b"hello")
        with trio.move_on_after(0.2) as patience:
            await third.receive_some()
        assert patience.cancelled_caught
        await first.aclose()
        assert await third.receive_some() == b"hello"
        for client in (second, third):
            await client.aclose()


# -- download

each_way = pytest.mark.parametrize("way", ["whole", "chunks", "coroutine"])


@each_way
@pytest.mark.parametrize("size", [0, 1, 65536, 5_000_000])
async def test_download(way: str, size: int, tmp_path: Path) -> None:
    """The client gets the file, whatever its size, and EOF; though it half-closed at once."""
    path = tmp_path / "file"
    content = os.urandom(size)
    path.write_bytes(content)
    async with running("download", way, str(path)) as connect, await connect() as client:
        await client.send_all(b"GET it, please\n")
        await client.send_eof()
        assert await read_to_eof(client) == content


def position(path: Path) -> int | None:
    """How far this process has read the file, which it may have open; None if it has not."""
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if entry.readlink() == path:
                info = Path(f"/proc/self/fdinfo/{entry.name}").read_text()
                return int(info.split()[1])
        except FileNotFoundError:
            pass
    return None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")
@pytest.mark.parametrize("way", ["chunks", "coroutine"])
async def test_download_reads_no_further_than_the_client(way: str, tmp_path: Path) -> None:
    """With a client that does not read, reading the file stops after a few buffers; with one
    that resets then, the file is closed and others are served.
    """
    path = tmp_path / "file"
    size = 200_000_000
    with path.open("wb") as file:
        # Sparse: it takes no disk.
        file.truncate(size)
    async with running("download", way, str(path)) as connect:
        client = await connect()
        await client.send_all(b"unread input must not hide the reset")
        await read_exactly(client, 1)
        before = None
        while before != (before := position(path)):
            await trio.sleep(0.2)
        assert before is not None
        # The kernels' part of it is the rest of what a connection can hold.
        assert before < size // 2
        reset(client.socket)
        await until(lambda: position(path) is None)
        async with await connect() as other:
            await read_exactly(other, 1_000_000)


# -- as programs


@pytest.mark.program
@pytest.mark.shown
def test_examples_run_by_hand(tmp_path: Path) -> None:
    """Each server runs as a program, says where it listens, takes a client, ends on Ctrl-C."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    programs: dict[str, subprocess.Popen[str]] = {}
    try:
        for path in EXAMPLES:
            if path.stem in CLIENTS:
                continue
            more = {"download": [str(path)], "inbox": [str(tmp_path / "inbox")]}.get(path.stem, [])
            programs[path.stem] = subprocess.Popen(
                [sys.executable, str(path), "--port", "0", *more],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        for name, program in programs.items():
            assert program.stdout is not None
            line = program.stdout.readline()
            found = re.search(r"127\.0\.0\.1:(\d+)", line)
            assert found, f"{name} said {line!r}"
            # A balancer whose backends are not there resets, which connect itself can be told of.
            with suppress(ConnectionResetError):
                socket.create_connection(("127.0.0.1", int(found[1])), timeout=20).close()
            program.send_signal(signal.SIGINT)
            _, errors = program.communicate(timeout=20)
            assert (program.returncode, errors) == (0, ""), name
    finally:
        for program in programs.values():
            program.kill()
            program.communicate()


@each_example
def test_only_the_public_interface(path: Path) -> None:
    """Examples take what they need from `trioreactor` itself, and nothing from inside it."""
    tree = ast.parse(path.read_text())
    taken: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            taken.setdefault(node.module or "", set()).update(alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("trioreactor") for alias in node.names)
    ours: Any = {name: names for name, names in taken.items() if name.startswith("trioreactor")}
    assert set(ours) == {"trioreactor"}
    assert ours["trioreactor"] <= set(trioreactor.__all__)


@each_example
def test_told_as_stories(path: Path) -> None:
    """Each opens with its scenario and the command that runs it, and is short."""
    text = path.read_text()
    story = ast.get_docstring(ast.parse(text))
    assert story is not None
    assert f"python examples/{path.name} --port " in story
    assert len(text.splitlines()) < 120
