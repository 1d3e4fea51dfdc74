"""The examples that exchange messages: the chat, the hub, idle connections, the multiplexer."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import trio

from tests.conftest import address_of, listening, no_leaks, reset, serving, until
from tests.kill_nine import HOST
from tests.test_client_examples import QUICK, Printed, Program, background, port, program, up
from tests.test_examples import ROOT, ask, load, read_exactly, read_to_eof, running
from trioreactor import Heartbeat, LengthHeaderCodec, TcpConnection, TcpServer

__all__ = ["port"]  # a fixture


@pytest.fixture(autouse=True)
def _examples_find_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when they run as programs."""
    monkeypatch.syspath_prepend(ROOT / "examples")


async def rest_of(stream: trio.SocketStream) -> bytes:
    """What comes until EOF or a reset, within bounds."""
    received = b""
    with trio.fail_after(20), suppress(trio.BrokenResourceError):
        while data := await stream.receive_some():
            received += data
    return received


def small_window() -> trio.socket.SocketType:
    """A socket whose owner will not read: the kernel shall take little for it."""
    sock = trio.socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    return sock


async def one_who_does_not_read(address: Any) -> trio.SocketStream:
    sock = small_window()
    await sock.connect(address)
    return trio.SocketStream(sock)


# -- the chat


def frame(message: bytes) -> bytes:
    """muduo's: four bytes of length, big-endian."""
    return struct.pack(">I", len(message)) + message


class Member:
    """Somebody in the room, who reads and writes frames by hand."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream

    async def says(self, message: bytes) -> None:
        await self.stream.send_all(frame(message))

    async def hears(self) -> bytes:
        (size,) = struct.unpack(">I", await read_exactly(self.stream, 4))
        return await read_exactly(self.stream, size)

    async def joins(self) -> Member:
        """The empty message comes back, so the server has this one."""
        await self.says(b"")
        assert await self.hears() == b""
        return self


async def test_chat() -> None:
    """What one sends all get, the sender too, in order and however it is cut into segments; an
    empty message goes back to its sender alone.
    """
    async with running("chat") as connect:
        ann, bob = [await Member(await connect()).joins() for _ in range(2)]
        await bob.says(b"")
        sent = frame(b"hello") + frame(b"\0\xff" * 8192)
        for part in (sent[:2], sent[2:6], sent[6:11], sent[11:]):
            await ann.stream.send_all(part)
            await trio.testing.wait_all_tasks_blocked()
        assert await bob.hears() == b""
        for member in (ann, bob):
            assert await member.hears() == b"hello"
            assert await member.hears() == b"\0\xff" * 8192
        for member in (ann, bob):
            await member.stream.aclose()


@pytest.mark.parametrize(
    "wrong", [struct.pack(">I", 16385), struct.pack(">i", -1), frame(b"cut")[:-1], None]
)
async def test_chat_ends_one_who_is_wrong(wrong: bytes | None) -> None:
    """A length that is too large or negative, an EOF inside a message, and a reset end their own
    connection alone.
    """
    async with running("chat") as connect:
        ann = await Member(await connect()).joins()
        eve = await Member(await connect()).joins()
        if wrong is None:
            reset(eve.stream.socket)
        else:
            await eve.stream.send_all(frame(b"the last of eve") + wrong)
            if len(wrong) != 4:
                await eve.stream.send_eof()
            await rest_of(eve.stream)
            await eve.stream.aclose()
            assert await ann.hears() == b"the last of eve"
        await ann.says(b"still here")
        assert await ann.hears() == b"still here"
        await ann.stream.aclose()


@pytest.mark.parametrize("overflow", ["close", "drop_oldest"])
async def test_chat_with_one_who_does_not_read(
    overflow: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One who has stopped reading delays nobody. Then it is closed; or, by the other policy, misses
    some whole messages and has the newest.
    """
    messages, size = 1000, 10_000
    printed = Printed(capsys)
    numbers: list[int] = []
    async with running("chat", overflow) as connect:
        ann = await Member(await connect()).joins()
        stuck = Member(await one_who_does_not_read(ann.stream.socket.getpeername()))
        await stuck.joins()
        for number in range(messages):
            await ann.says(b"%d" % number + bytes(size))
            assert (await ann.hears()).startswith(b"%d\0" % number)
        try:
            while numbers[-1:] != [messages - 1]:
                heard = await stuck.hears()
                assert len(heard.rstrip(b"\0")) + size == len(heard)
                numbers.append(int(heard.rstrip(b"\0")))
        except (AssertionError, trio.BrokenResourceError):
            if overflow == "drop_oldest":
                raise
        for member in (ann, stuck):
            await member.stream.aclose()
        if overflow == "drop_oldest":
            missed = messages - len(numbers)
            await until(lambda: any(f" missed {missed}" in line for line in printed.lines()))
    assert all(before < after for before, after in pairwise(numbers))
    if overflow == "close":
        assert numbers == list(range(len(numbers)))
        assert len(numbers) < messages - 1
    else:
        assert numbers[-1] == messages - 1
        assert len(numbers) < messages


async def test_chat_idle() -> None:
    """One that is silent is closed in time; one that asks now and then stays."""
    async with running("chat", "close", 1) as connect:
        ann = await Member(await connect()).joins()
        silent = await connect()
        begun = trio.current_time()
        async with trio.open_nursery() as nursery:

            async def wait() -> None:
                assert await read_to_eof(silent) == b""
                nursery.cancel_scope.cancel()

            nursery.start_soon(wait)
            while True:
                await ann.joins()
                await trio.sleep(0.01)
        assert trio.current_time() - begun > 0.3
        await silent.aclose()
        await ann.stream.aclose()


@asynccontextmanager
async def typing(name: str, port: int, **options: Any) -> AsyncIterator[Callable[[bytes], None]]:
    """A running chat client; gives what types on its terminal."""
    source, sink = os.pipe()
    options = {"backoff": QUICK, **options}
    try:
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(load("chat_client").main, port, name, source, **options))
                yield lambda text: os.write(sink, text) and None
                # The end of the input is its end.
                os.close(sink)
                sink = -1
    finally:
        os.close(source)
        if sink >= 0:
            os.close(sink)


async def test_chat_client(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    """What is typed all see, without control characters; what is typed while the server is away
    comes when it is back.
    """
    printed = Printed(capsys)
    async with typing("ann", port) as ann, typing("bob", port) as bob:
        ann(b"is anybody\nhere?\n")
        for number in range(1, 3):
            async with up("chat", port):
                await until(lambda n=number: printed.lines().count("! connected") == 2 * n)
                await until(lambda: "ann: here?" in printed.lines())
                bob(b"\x1b[2Jred %d\x07\n" % number)
                await until(lambda n=number: printed.lines().count(f"bob: [2Jred {n}") >= 2)
            await until(lambda n=number: printed.lines().count("! disconnected") == 2 * n)
        bob(b"not lost\n")
        async with up("chat", port):
            await until(lambda: "bob: not lost" in printed.lines())


async def test_chat_client_asks(capsys: pytest.CaptureFixture[str]) -> None:
    """A server that takes everything and says nothing is left for another connection."""
    printed = Printed(capsys)
    heartbeat = Heartbeat(ping=b"", is_pong=lambda m: not m, interval=0.05, timeout=0.2)
    heard: list[bytes] = []

    async def silent(conn: TcpConnection) -> None:
        heard.append(b"")
        async for data in conn:
            heard[-1] += data

    async with (
        serving(TcpServer(silent, 0, host=HOST)) as (_, port),
        typing("ann", port, heartbeat=heartbeat),
    ):
        await until(lambda: printed.lines().count("! disconnected") >= 2)
    assert heard[0].startswith(frame(b""))


async def test_chat_load() -> None:
    """Each message is timed at each client, the percentiles are in order, and what others say in
    the room does not count.
    """
    async with running("chat") as connect:
        stranger = await Member(await connect()).joins()
        address = stranger.stream.socket.getpeername()
        async with trio.open_nursery() as nursery:

            async def chatter() -> None:
                while True:
                    await stranger.says(b"x" * 100)
                    await stranger.hears()

            nursery.start_soon(chatter)
            result = await load("chat_load").main(address[1], 20, 10)
            nursery.cancel_scope.cancel()
        await stranger.stream.aclose()
    assert (result["clients"], result["messages"], result["lost"]) == (20, 10, 0)
    assert 0 < result["p50_ms"] <= result["p99_ms"] <= result["p99.9_ms"] < 30_000


@pytest.mark.parametrize("fault", ["misses", "closes"])
async def test_chat_load_with_a_server_that_is_wrong(fault: str) -> None:
    """Messages that do not come everywhere are counted; a server that closes is an error."""
    codec = LengthHeaderCodec()
    # How many messages have come since all were in the room.
    messages = -1

    def on_message(conn: TcpConnection, message: bytes) -> None:
        nonlocal messages
        messages += len(server.connections) == 5
        if messages != 2:
            server.broadcast(codec.encode(message))
        elif fault == "closes":
            conn.force_close()
        else:
            conn.send(codec.encode(message))

    async def chat(conn: TcpConnection) -> None:
        await conn.dispatch(codec.on_message(on_message))

    server = TcpServer(chat, 0, host=HOST)
    async with no_leaks(), serving(server) as (_, port):
        run = partial(load("chat_load").main, port, 5, 4, patience=1)
        if fault == "closes":
            with pytest.RaisesGroup(trio.BrokenResourceError):
                await run()
        else:
            assert (await run())["lost"] == 4


# -- the hub


@asynccontextmanager
async def hub(**settings: int) -> AsyncIterator[tuple[Any, Callable[[], Awaitable[Any]]]]:
    """A hub, its bounds set; gives it and what connects to it."""
    module = load("hub")
    for name, value in settings.items():
        assert hasattr(module, name)
        setattr(module, name, value)
    it = module.Hub()
    it.server = TcpServer(it, 0, host=HOST)
    async with no_leaks(), serving(it.server) as address:
        with trio.fail_after(30):
            yield it, partial(trio.open_tcp_stream, *address)


async def test_hub_replays() -> None:
    """A new subscriber has the last text at once, though its publisher has gone; one who has
    subscribed before, not again; after `unsub` nothing comes.
    """
    async with hub() as (it, connect):
        publisher = await connect()
        await publisher.send_all(b"pub a old\npub a the newest  \r\npub b other\n")
        await publisher.aclose()
        await until(lambda: len(it.last) == 2 and not it.server.connections)
        reader = await connect()
        await reader.send_all(b"sub a\nsub a\nsub c\nunsub nothing\npub c x\n")
        expected = b"a the newest\nc x\n"
        assert await read_exactly(reader, len(expected)) == expected
        await reader.send_all(b"unsub a\npub a unseen\npub c y\nsub a\n")
        expected = b"c y\na unseen\n"
        assert await read_exactly(reader, len(expected)) == expected
        await reader.aclose()


async def test_hub_forgets_who_has_gone() -> None:
    """Neither an EOF nor a reset leaves anything of a subscriber, and others have their news."""
    async with hub() as (it, connect):
        one, other, last = [await connect() for _ in range(3)]
        for stream in (one, other, last):
            await stream.send_all(b"sub a\nsub b\nsub a\n")
        await last.send_all(b"sub c\n")
        await until(lambda: sum(map(len, it.subscribers.values())) == 7)
        await one.aclose()
        reset(other.socket)
        await until(lambda: sum(map(len, it.subscribers.values())) == 3)
        await last.send_all(b"pub a news\n")
        assert await read_exactly(last, 7) == b"a news\n"
        await last.aclose()
        await until(lambda: not it.server.connections)
        assert not it.subscribers


async def test_hub_is_bounded() -> None:
    """It keeps the texts of so many topics, those published last; one who subscribes to too many
    topics is closed.
    """
    async with hub(MAX_KEPT=2, MAX_SUBSCRIPTIONS=3) as (it, connect):
        reader = await connect()
        await reader.send_all(b"pub a 1\npub b 1\npub a 2\npub c 1\nsub a\nsub b\nsub c\n")
        assert await read_exactly(reader, 8) == b"a 2\nc 1\n"
        assert list(it.last) == [b"a", b"c"]
        await reader.send_all(b"sub c\nunsub c\nsub c\n")
        assert await read_exactly(reader, 4) == b"c 1\n"
        await reader.send_all(b"sub d\n")
        assert await rest_of(reader) == b""
        await reader.aclose()


async def test_unsubscribe(port: int) -> None:
    """What a client has unsubscribed from does not come, with the next connection neither."""
    seen: list[str] = []
    subscriber = load("resubscribe").Subscriber(port, ["a", "b"], seen.append)
    async with no_leaks(), background(subscriber.client.run):
        for connection in range(2):
            async with up("hub", port), await connected(port) as publisher:
                subscriber.client.reset_backoff()
                await subscriber.client.wait_connected()
                await publisher.send_all(b"pub b first\n")
                await until(lambda: "b first" in seen)
                if connection == 0:
                    subscriber.unsubscribe("a")
                    subscriber.subscribe("c")
                # The last two came over the same connection as what was asked before.
                while "c sentinel" not in seen:
                    await publisher.send_all(b"pub c sentinel\n")
                    await trio.sleep(0.005)
                await publisher.send_all(b"pub a unwanted\npub b wanted\n")
                await until(lambda: "b wanted" in seen)
            await until(lambda: "! the hub has gone" in seen)
            assert "a unwanted" not in seen
            seen.clear()


async def connected(port: int) -> trio.SocketStream:
    return await trio.open_tcp_stream(HOST, port)


# -- idle connections


async def test_idleconnection(capsys: pytest.CaptureFixture[str]) -> None:
    """Who is silent is closed, who says something now and then is not, and one too many is closed
    at once; each end is told with its reason.
    """
    printed = Printed(capsys)

    names: dict[trio.SocketStream, str] = {}

    def told(stream: trio.SocketStream, text: str) -> bool:
        return f"{names[stream]} is {text}" in printed.lines()

    async with running("idleconnection", 1, 4) as connect:
        busy, silent, leaves, breaks = [await connect() for _ in range(4)]
        assert await ask(breaks) == b"hello"
        many = await connect()
        for stream in (busy, silent, leaves, many):
            names[stream] = "{}:{}".format(*stream.socket.getsockname())
        assert await rest_of(many) == b""
        assert not told(many, "up")
        reset(breaks.socket)
        await leaves.aclose()
        async with trio.open_nursery() as nursery:

            async def wait() -> None:
                assert await read_to_eof(silent) == b""
                await until(lambda: told(silent, "down: IDLE_TIMEOUT"))
                nursery.cancel_scope.cancel()

            nursery.start_soon(wait)
            while True:
                assert await ask(busy) == b"hello"
                await trio.sleep(0.01)
        assert told(silent, "up")
        assert await ask(busy) == b"hello"
        await until(lambda: told(leaves, "down: PEER_EOF"))
        for stream in (busy, silent, many):
            await stream.aclose()


async def test_idleconnection_with_one_who_does_not_read(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One that sends and never reads is idle when the kernels and the buffer are full."""
    async with running("idleconnection", 0.5, 2) as connect:
        other = await connect()
        stuck = await one_who_does_not_read(other.socket.getpeername())
        await other.aclose()
        with pytest.raises(trio.BrokenResourceError):
            while True:
                await stuck.send_all(bytes(100_000))
        printed = Printed(capsys)
        await until(lambda: printed.lines()[-1].endswith("is down: IDLE_TIMEOUT"))
        await stuck.aclose()


# -- the multiplexer


def muxed(number: int, payload: bytes) -> bytes:
    return struct.pack("<BH", len(payload), number) + payload


class Backend:
    """The multiplexer's backend, by hand."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream

    async def says(self, number: int, payload: bytes) -> None:
        await self.stream.send_all(muxed(number, payload))

    async def hears(self) -> tuple[int, bytes]:
        size, number = struct.unpack("<BH", await read_exactly(self.stream, 3))
        return number, await read_exactly(self.stream, size) if size else b""


@asynccontextmanager
async def multiplexing(
    listener: trio.SocketListener, patience: float = 5
) -> AsyncIterator[Callable[[], Awaitable[trio.SocketStream]]]:
    """A running multiplexer whose backend is at *listener*."""
    module = load("multiplexer")
    module.BACKOFF = QUICK
    host, port = address_of(listener)
    async with trio.open_nursery() as nursery:
        (acceptor,) = await nursery.start(module.main, 0, f"{host}:{port}", patience)
        with trio.fail_after(30):
            yield partial(trio.open_tcp_stream, *acceptor.address)
        nursery.cancel_scope.cancel()


async def newcomer(
    connect: Callable[[], Awaitable[trio.SocketStream]], backend: Backend
) -> tuple[trio.SocketStream, int]:
    """A client, and the number that the backend was told."""
    client = await connect()
    number, payload = await backend.hears()
    name = "{}:{}".format(*client.socket.getsockname())
    words = payload.decode().split(" ")
    assert (number, [words[0], *words[2:]]) == (0, ["CONN", "FROM", name, "IS", "UP\r\n"])
    return client, int(words[1])


async def ready(connect: Callable[[], Awaitable[trio.SocketStream]], backend: Backend) -> None:
    """Until the multiplexer has its backend: clients that come before are reset."""
    async with trio.open_nursery() as nursery:

        async def try_on() -> None:
            while True:
                with suppress(OSError):
                    async with await connect() as client:
                        await rest_of(client)

        nursery.start_soon(try_on)
        assert (await backend.hears())[1].endswith(b" IS UP\r\n")
        nursery.cancel_scope.cancel()
    assert (await backend.hears())[1].endswith(b" IS DOWN\r\n")


async def test_multiplexer() -> None:
    """What clients send arrives with their numbers, in frames of 255 bytes at most; what the
    backend sends arrives at whom it is for; each end is told to the other side.
    """
    async with no_leaks(), listening() as listener, multiplexing(listener) as connect:
        backend = Backend(await listener.accept())
        async with backend.stream:
            await ready(connect, backend)
            one, first = await newcomer(connect, backend)
            other, second = await newcomer(connect, backend)
            assert first != second
            await other.send_all(b"hello")
            assert await backend.hears() == (second, b"hello")
            sent = os.urandom(1000)
            await one.send_all(sent)
            received = b""
            while len(received) < len(sent):
                number, payload = await backend.hears()
                assert number == first
                received += payload
            assert received == sent
            # For nobody, empty, or no command: nothing comes of it.
            for number, payload in (
                (999, b"x"),
                (first, b""),
                (0, b"DISCONNECT 999\r\n"),
                (0, b"what?"),
            ):
                await backend.says(number, payload)
            await backend.says(second, b"for other")
            await backend.says(first, b"for one")
            await backend.says(0, b"DISCONNECT %d\r\n" % first)
            assert await read_to_eof(one) == b"for one"
            assert await read_exactly(other, 9) == b"for other"
            await one.aclose()
            assert (await backend.hears())[1].startswith(b"CONN %d " % first)
            reset(other.socket)
            number, payload = await backend.hears()
            assert payload.startswith(b"CONN %d FROM 127.0.0.1:" % second)
            assert payload.endswith(b" IS DOWN\r\n")


async def test_multiplexer_loses_its_backend() -> None:
    """Then its clients are reset, newcomers too, and when it is back others are served."""
    async with no_leaks(), listening() as listener, multiplexing(listener) as connect:
        for way in ("EOF", "reset", "garbage"):
            backend = Backend(await listener.accept())
            await ready(connect, backend)
            clients = [(await newcomer(connect, backend))[0] for _ in range(3)]
            if way == "garbage":
                await backend.stream.send_all(b"\xff" * 100)
                await backend.stream.send_eof()
            if way == "reset":
                reset(backend.stream.socket)
            else:
                await backend.stream.aclose()
            for client in clients:
                with pytest.raises(trio.BrokenResourceError):
                    await client.receive_some()
                await client.aclose()
            # The next one is in the listener's queue: connected, or soon to be.


async def test_multiplexer_without_a_backend(port: int) -> None:
    """Clients are reset at once while there is no backend."""
    async with running("multiplexer", f"{HOST}:{port}") as connect:
        # Which connect itself may be told of.
        with pytest.raises((trio.BrokenResourceError, OSError)):
            async with await connect() as client:
                await client.receive_some()


async def test_multiplexer_with_a_slow_backend() -> None:
    """When the backend stops reading the clients have to wait, and nothing is lost."""
    async with no_leaks(), listening() as listener, multiplexing(listener) as connect:
        listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        backend = Backend(await listener.accept())
        async with backend.stream:
            await ready(connect, backend)
            (one, first), (other, second) = [await newcomer(connect, backend) for _ in range(2)]
            sent = {first: 0, second: 0}

            async def send(client: trio.SocketStream, number: int) -> None:
                while sent[number] < limit:
                    await client.send_all(bytes([number % 256]) * 100_000)
                    sent[number] += 100_000

            limit = 50_000_000
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send, one, first)
                nursery.start_soon(send, other, second)
                before: dict[int, int] = {}
                while sent != before:
                    before = dict(sent)
                    await trio.sleep(0.2)
                # The rest is in the kernels.
                assert all(0 < size < limit for size in sent.values())
                limit = 0
                received = {first: 0, second: 0}
                data = bytearray()
                while sum(received.values()) < sum(sent.values()) + 200_000:
                    data += await backend.stream.receive_some()
                    at = 0
                    while len(data) >= at + 3 + (size := data[at] if at < len(data) else 0):
                        number = int.from_bytes(data[at + 1 : at + 3], "little")
                        part = data[at + 3 : at + 3 + size]
                        assert part == bytes([number % 256]) * size
                        received[number] += size
                        at += 3 + size
                    del data[:at]
                    if not nursery.child_tasks and received == sent:
                        break
            assert received == sent
            for client in (one, other):
                await client.aclose()


async def test_multiplexer_waits_for_a_slow_client() -> None:
    """While a client does not read, the backend is not read either, until that client has gone."""
    async with no_leaks(), listening() as listener, multiplexing(listener, 60) as connect:
        backend = Backend(await listener.accept())
        async with backend.stream:
            await ready(connect, backend)
            other, _ = await newcomer(connect, backend)
            address = other.socket.getpeername()
            stuck, number = await newcomer(partial(one_who_does_not_read, address), backend)
            sent, block = 0, muxed(number, bytes(255)) * 1000

            async def send() -> None:
                nonlocal sent
                for _ in range(400):
                    await backend.stream.send_all(block)
                    sent += len(block)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                before = -1
                while sent != before:
                    before = sent
                    await trio.sleep(0.3)
                # The rest is in the kernels.
                assert sent < 60_000_000
                reset(stuck.socket)
                nursery.cancel_scope.cancel()
            await other.aclose()


async def test_multiplexer_with_a_slow_client() -> None:
    """All wait for a client that does not read, until it has taken nothing for a while; then it is
    closed, the others have everything, and the backend is told.
    """
    async with no_leaks(), listening() as listener, multiplexing(listener, 0.3) as connect:
        backend = Backend(await listener.accept())
        async with backend.stream:
            await ready(connect, backend)
            other, second = await newcomer(connect, backend)
            address = other.socket.getpeername()
            stuck, first = await newcomer(partial(one_who_does_not_read, address), backend)
            rounds = 0
            down = b""

            async def listen() -> None:
                nonlocal down
                down = (await backend.hears())[1]

            async with trio.open_nursery() as nursery:
                nursery.start_soon(listen)
                while not down:
                    await backend.stream.send_all(muxed(first, bytes(255)) * 1000)
                    await backend.says(second, b"%8d" % rounds)
                    assert await read_exactly(other, 8) == b"%8d" % rounds
                    rounds += 1
            assert down.startswith(b"CONN %d " % first)
            # What it was sent and did not take is with the kernel.
            assert rounds * 255_000 < 40_000_000
            await backend.says(second, b"and on")
            assert await read_exactly(other, 6) == b"and on"
            for client in (stuck, other):
                await client.aclose()


@asynccontextmanager
async def tunnelling(
    target: str,
) -> AsyncIterator[Callable[[], Awaitable[trio.SocketStream]]]:
    """Both ends of the tunnel; gives what connects to the near one."""
    mux, demux = load("multiplexer"), load("demultiplexer")
    mux.BACKOFF = QUICK
    async with trio.open_nursery() as nursery:
        (far,) = await nursery.start(demux.main, 0, target, 0.5)
        (near,) = await nursery.start(mux.main, 0, "{}:{}".format(*far.address))
        with trio.fail_after(40):
            yield partial(trio.open_tcp_stream, *near.address)
        nursery.cancel_scope.cancel()


async def answered(connect: Callable[[], Awaitable[trio.SocketStream]]) -> trio.SocketStream:
    """A client whose hello has come back: those before the tunnel is complete are reset."""
    while True:
        with suppress(OSError):
            client = await connect()
            if await ask(client) == b"hello":
                return client
            await client.aclose()


async def test_tunnel() -> None:
    """Bytes of many clients at once go through the tunnel and come back, to each its own."""
    async with no_leaks(), running("echo") as direct:
        peer = await direct()
        host, port = peer.socket.getpeername()
        await peer.aclose()
        async with tunnelling(f"{host}:{port}") as connect:
            await (await answered(connect)).aclose()

            async def client() -> None:
                sent = os.urandom(200_000)
                async with await connect() as stream, trio.open_nursery() as nursery:
                    nursery.start_soon(stream.send_all, sent)
                    assert await read_exactly(stream, len(sent)) == sent

            async with trio.open_nursery() as nursery:
                for _ in range(10):
                    nursery.start_soon(client)


async def test_tunnel_ends() -> None:
    """What a target says last arrives, then its EOF; a client whose target cannot be reached, or
    resets, is let go; and a target is let go when its client has gone.
    """
    living = 0

    async def target(conn: TcpConnection) -> None:
        nonlocal living
        living += 1
        try:
            word = await conn.receive_some()
            if word == b"reset":
                conn.force_close(reset=True)
            elif word == b"bye":
                await conn.send_all(b"x" * 100_000)
            else:
                await conn.send_all(word)
                await conn.receive_some()
        finally:
            living -= 1

    server = TcpServer(target, 0, host=HOST)
    async with (
        no_leaks(),
        serving(server) as (host, port),
        tunnelling(f"{host}:{port}") as connect,
    ):
        stays = await answered(connect)
        for word, answer in ((b"bye", b"x" * 100_000), (b"reset", b"")):
            async with await connect() as client:
                await client.send_all(word)
                assert await read_to_eof(client) == answer
        await until(lambda: living == 1)
        reset(stays.socket)
        await until(lambda: living == 0)
        server.close()
        async with await connect() as client:
            # No reset: the tunnel stands.
            assert await read_to_eof(client) == b""


# -- as programs


@pytest.mark.program
@pytest.mark.shown
def test_chat_by_hand(port: int) -> None:
    """The server, two users at their terminals, and the load test, which prints a line of JSON."""

    def user(name: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, ROOT / "examples/chat_client.py", "--port", str(port), "--name", name],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    options = ["--clients", "5", "--messages", "7", "--size", "50", "--json"]
    with program("chat", port, "--overflow", "drop_oldest", "--idle", "60") as server:
        server.says("chat on")
        with user("ann") as ann, user("bob") as bob:
            assert ann.stdin
            assert ann.stdout
            assert bob.stdout
            for each in (ann, bob):
                assert each.stdout
                assert each.stdout.readline() == b"! connected\n"
            # Both are in the room as soon as the server has taken bob's first message.
            out, _ = bob.communicate(b"hello\nand good-bye", timeout=20)
            assert out == b"bob: hello\nbob: and good-bye\n! disconnected\n"
            assert ann.stdout.readline() == b"bob: hello\n"
            ann.stdin.write(b"bye\n")
            ann.stdin.close()
            assert b"ann: bye\n! disconnected\n" in ann.stdout.read()
            assert (ann.wait(20), bob.wait(20)) == (0, 0)
        with program("chat_load", port, *options) as load_test:
            result = json.loads(load_test.process.communicate(timeout=30)[0])
        assert (result["clients"], result["messages"], result["size"]) == (5, 7, 50)
        assert server.interrupt() == ""
    with program("chat_load", port, *options) as load_test:
        out, errors = load_test.process.communicate(timeout=30)
        assert (load_test.process.returncode, out) == (1, "")
        assert "Connection refused" in errors
        assert "Traceback" not in errors


@pytest.mark.program
@pytest.mark.shown
def test_idleconnection_by_hand(port: int) -> None:
    """It tells how each connection ends."""
    with program("idleconnection", port, "--idle", "0.2", "--most", "1") as server:
        server.says("echo on")
        with socket.create_connection((HOST, port), timeout=20) as client:
            assert client.recv(1) == b""
        server.says("is up")
        server.says("is down: IDLE_TIMEOUT")
        assert server.interrupt() == ""


@pytest.mark.program
@pytest.mark.shown
def test_tunnel_by_hand(port: int) -> None:
    """Three programs, the middle one killed and started again."""

    def where(program: Program) -> str:
        return program.out.readline().split()[-1]

    with program("echo", 0) as echo:
        target = where(echo)
        with program("multiplexer", 0, "--backend", f"{HOST}:{port}") as near:
            host, _, near_port = where(near).rpartition(":")
            for _ in range(2):
                near.says("Connection refused")
                with program("demultiplexer", port, "--target", target) as far:
                    near.says("connected")
                    with socket.create_connection((host, int(near_port)), timeout=20) as client:
                        client.sendall(b"hello")
                        assert client.recv(5, socket.MSG_WAITALL) == b"hello"
                        far.kill()
                        with pytest.raises(ConnectionResetError):
                            client.recv(1)
            assert near.interrupt() == ""
