"""The relay: what goes in comes out, ends are passed on, and who is slow makes the other wait."""

from __future__ import annotations

import errno
import hashlib
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing

from tests.conftest import echo, no_leaks, reset, serving, tcp_streams, until
from tests.servers import assert_echoes, installed, server_process, unused_port
from tests.test_examples import load, read_exactly, read_to_eof, running
from trioreactor import CloseReason, TcpConnection, TcpServer, Watermarks
from trioreactor.default_poller import current_poller
from trioreactor.trio_poller import TrioPoller

HIGH, LOW = Watermarks().high, Watermarks().low
# The most that one read takes from the kernel.
READ = 65536

each_mode = pytest.mark.parametrize("mode", ["coroutine", "dispatch"])
each_way = pytest.mark.parametrize("way", ["there", "back"])


@dataclass
class Relayed:
    """Two plain streams with a relay between, and the relay's own two connections."""

    near: trio.SocketStream
    """What the test sends from, or breaks."""
    far: trio.SocketStream
    """Where that should arrive."""
    source: TcpConnection
    """The relay's connection to *near*."""
    sink: TcpConnection
    """The relay's connection to *far*."""
    ended: trio.Event = field(default_factory=trio.Event)
    sizes: list[int] = field(default_factory=list)
    """Sizes of send buffers when they rose above the high mark. Until they have sunk to the low
    one nothing is added, so these are their maxima."""

    def balance(self) -> tuple[int, int]:
        """Pauses and resumes of both ways."""
        counts = self.source.statistics(), self.sink.statistics()
        return sum(count.pauses for count in counts), sum(count.resumes for count in counts)


@asynccontextmanager
async def relayed(mode: str, way: str = "there") -> AsyncIterator[Relayed]:
    """A relay's two connections and the streams at their other ends, from the client's side, or
    from the target's. Nothing is left of the relay afterwards.
    """
    relay: Callable[..., Awaitable[None]] = load("tcprelay").relay
    async with no_leaks():
        (near, source), (far, sink) = await tcp_streams(), await tcp_streams()
        it = Relayed(near, far, TcpConnection(source), TcpConnection(sink))
        for conn in (it.source, it.sink):
            # So that the kernel holds less of what is on its way.
            conn.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_SNDBUF, 32768)
            conn.high_water_mark_callback = lambda _conn, size: it.sizes.append(size)

        async def run() -> None:
            ends = (it.source, it.sink) if way == "there" else (it.sink, it.source)
            # As a server does: a connection that is closed by force takes its handler along.
            with trio.CancelScope() as ends[0].handler_scope:
                async with ends[0], ends[1]:
                    await relay(*ends, mode)
            ends[0].handler_scope = None
            it.ended.set()

        async with near, far, trio.open_nursery() as nursery:
            nursery.start_soon(run)
            with trio.fail_after(30):
                yield it
                await it.ended.wait()


async def send_in_pieces(stream: trio.SocketStream, data: bytes, seed: int) -> None:
    """Send all of *data* in pieces of random sizes, then EOF."""
    sizes = random.Random(seed)
    while data:
        n = sizes.choice([1, sizes.randrange(1, 3000), sizes.randrange(1, 300_000)])
        await stream.send_all(data[:n])
        data = data[n:]
    await stream.send_eof()


async def sha256_of_rest(stream: trio.SocketStream, seed: int) -> str:
    """The digest of what comes until EOF, read in random sizes and now and then not at all."""
    sizes = random.Random(seed)
    digest = hashlib.sha256()
    while data := await stream.receive_some(sizes.randrange(1, 100_000)):
        digest.update(data)
        if not sizes.randrange(50):
            await trio.sleep(0.001)
    return digest.hexdigest()


async def assert_reset(stream: trio.SocketStream) -> None:
    """What comes next, after all data, is a reset, and no EOF."""
    with pytest.raises(trio.BrokenResourceError) as caught:
        while True:
            assert await stream.receive_some(), "EOF instead of a reset"
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ECONNRESET


# -- bytes


@each_mode
async def test_bytes(mode: str) -> None:
    """Promise B, both ways at once: each end's SHA-256 of what it gets is that of what was sent."""
    contents = [random.Random(seed).randbytes(3_000_000) for seed in (1, 2)]
    digests: dict[trio.SocketStream, str] = {}
    async with relayed(mode) as it, trio.open_nursery() as nursery:

        async def digest(stream: trio.SocketStream) -> None:
            digests[stream] = await sha256_of_rest(stream, 3)

        for stream, content in zip((it.near, it.far), contents, strict=True):
            nursery.start_soon(send_in_pieces, stream, content, 4)
            nursery.start_soon(digest, stream)
    expected = [hashlib.sha256(content).hexdigest() for content in contents]
    assert [digests[it.far], digests[it.near]] == expected
    assert [it.source.close_reason, it.sink.close_reason] == [CloseReason.PEER_EOF] * 2


# -- backpressure


@each_way
@each_mode
async def test_one_who_does_not_read_makes_the_other_wait(mode: str, way: str) -> None:
    """Promise M: what is queued for the slow one is the high mark and one read at most; no more is
    taken from the other; when all has arrived, each pause has had its resume.
    """
    data = random.Random(5).randbytes(2_000_000)
    async with relayed(mode, way) as it, trio.open_nursery() as nursery:
        nursery.start_soon(send_in_pieces, it.near, data, 6)
        await until(lambda: it.sizes)
        # The kernels take some more, by and by.
        taken = -1
        while taken != (taken := it.source.statistics().bytes_received):
            await trio.sleep(0.2)
        assert taken < len(data)
        assert it.sink.buffered > LOW
        pauses, resumes = it.balance()
        assert pauses == resumes + 1
        assert it.source.reading == (mode == "coroutine")
        # The way back is none of its business.
        await it.far.send_all(b"back")
        assert await read_exactly(it.near, 4) == b"back"

        assert await sha256_of_rest(it.far, 7) == hashlib.sha256(data).hexdigest()
        await it.far.send_eof()
        assert await read_to_eof(it.near) == b""
    pauses, resumes = it.balance()
    assert pauses == resumes > 1
    assert len(it.sizes) == pauses
    assert max(it.sizes) <= HIGH + READ
    assert it.source.statistics().buffered == it.sink.statistics().buffered == 0


# -- ends


@each_way
@each_mode
async def test_half_close(mode: str, way: str) -> None:
    """An EOF is passed on, after the data, and the other side may still speak as long as it likes;
    when it has ended, too, so has the relay.
    """
    async with relayed(mode, way) as it:
        await it.near.send_all(b"question")
        await it.near.send_eof()
        assert await read_to_eof(it.far) == b"question"
        for _ in range(3):
            await it.far.send_all(b"answer")
            assert await read_exactly(it.near, 6) == b"answer"
        assert not it.ended.is_set()
        await it.far.send_eof()
        assert await read_to_eof(it.near) == b""
    assert [it.source.close_reason, it.sink.close_reason] == [CloseReason.PEER_EOF] * 2


@each_way
@each_mode
async def test_reset(mode: str, way: str) -> None:
    """A reset is passed on as a reset, and both connections end."""
    async with relayed(mode, way) as it:
        await it.near.send_all(b"hello")
        assert await read_exactly(it.far, 5) == b"hello"
        reset(it.near.socket)
        await assert_reset(it.far)
    assert [it.source.close_reason, it.sink.close_reason] == [CloseReason.PEER_RESET] * 2


@each_way
@each_mode
async def test_reset_by_one_who_is_sent_to(mode: str, way: str) -> None:
    """One who resets in the middle of what it is sent: the sender is told by a reset."""
    async with relayed(mode, way) as it, trio.open_nursery() as nursery:

        async def flood() -> None:
            with pytest.raises(trio.BrokenResourceError):
                while True:
                    await it.near.send_all(bytes(100_000))

        nursery.start_soon(flood)
        # What is queued may sink again below the mark: the kernels take some more, by and by.
        await until(lambda: it.sizes)
        reset(it.far.socket)
    assert [it.source.close_reason, it.sink.close_reason] == [CloseReason.PEER_RESET] * 2


@each_way
async def test_reset_by_one_who_waits(way: str) -> None:
    """Callbacks hear of a reset also from one who is not being read from, and pass it on."""
    async with relayed("dispatch", way) as it:
        if isinstance(current_poller(), TrioPoller):
            it.near.socket.close()
            it.far.socket.close()
            pytest.skip("the trio poller sees no reset while nobody reads")
        with trio.CancelScope() as flood:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(it.near.send_all, bytes(20_000_000))
                await until(lambda: not it.source.reading)
                flood.cancel()
        reset(it.near.socket)
        # Without a byte read from the other.
        await it.ended.wait()
        await assert_reset(it.far)
    assert [it.source.close_reason, it.sink.close_reason] == [CloseReason.PEER_RESET] * 2


@each_mode
@pytest.mark.parametrize("begin", [b"", b"early"])
async def test_reset_before_the_first_byte(mode: str, begin: bytes) -> None:
    """A target that was reset before the relay began: the client is told by a reset."""
    relay: Callable[..., Awaitable[None]] = load("tcprelay").relay
    async with no_leaks():
        (near, source), (far, sink) = await tcp_streams(), await tcp_streams()
        async with near, TcpConnection(source) as one, TcpConnection(sink) as other:
            reset(far.socket)
            with trio.fail_after(10):
                await relay(one, other, mode, begin)
                await assert_reset(near)


# -- the program


@each_mode
async def test_the_target_refuses(mode: str) -> None:
    """While nobody listens at the target clients are reset; as soon as somebody does, served."""
    with unused_port() as port:
        async with running("tcprelay", f"127.0.0.1:{port}", mode) as connect:
            for _ in range(3):
                async with await connect() as client:
                    await assert_reset(client)
            target = TcpServer(echo, port, host="127.0.0.1")
            async with serving(target), await connect() as client:
                await assert_echoes(client)


@each_mode
async def test_pauses_and_resumes_are_told(
    mode: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """With each connection that ends the program tells of its pauses and resumes: as many."""
    may_read = trio.Event()
    received = sent = 0

    async def target(conn: TcpConnection) -> None:
        nonlocal received
        await may_read.wait()
        async for data in conn:
            received += len(data)

    printed = ""

    def told() -> re.Match[str] | None:
        nonlocal printed
        printed += capsys.readouterr().out
        return re.search(r"(\d+) pauses, (\d+) resumes\n", printed)

    with unused_port() as port:
        server = TcpServer(target, port, host="127.0.0.1")
        async with running("tcprelay", f"127.0.0.1:{port}", mode) as connect, serving(server):
            client = await connect()
            with trio.move_on_after(1) as patience:
                while True:
                    await client.send_all(bytes(1_000_000))
                    sent += 1_000_000
                    patience.deadline = trio.current_time() + 0.5
            may_read.set()
            await client.aclose()
            await until(told)
    found = told()
    assert found
    pauses, resumes = map(int, found.groups())
    assert pauses == resumes > 0
    assert received >= sent > 0
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


# -- in front of a real server


def redis_command(*words: bytes) -> bytes:
    """A command in redis's protocol."""
    bulks = (b"$%d\r\n%s\r\n" % (len(word), word) for word in words)
    return b"*%d\r\n%s" % (len(words), b"".join(bulks))


@pytest.fixture
def redis() -> Iterator[tuple[int, tuple[object, ...]]]:
    """A port for redis, and the command that makes it listen there."""
    program = installed("redis-server")
    with unused_port() as port:
        options = ("--bind", "127.0.0.1", "--save", "", "--appendonly", "no")
        yield port, (program, "--port", port, *options)


async def ping(client: trio.SocketStream) -> None:
    await client.send_all(redis_command(b"PING"))
    assert await read_exactly(client, 7) == b"+PONG\r\n"


@each_mode
async def test_redis(mode: str, redis: tuple[int, tuple[object, ...]]) -> None:
    """Thousands of commands without waiting for answers get all answers, in order, by several
    clients at once; large values, too.
    """
    port, command = redis

    async def use(client: trio.SocketStream, seed: int) -> None:
        sizes = random.Random(seed)
        asked, expected = [], []
        for n in range(1000):
            key = b"%d:%d" % (seed, n)
            value = sizes.randbytes(sizes.choice([0, 10, 1000, 20_000]))
            asked += [redis_command(b"SET", key, value), redis_command(b"GET", key)]
            expected += [b"+OK\r\n", b"$%d\r\n%s\r\n" % (len(value), value)]
        answers = b"".join(expected)
        async with client, trio.open_nursery() as nursery:
            await ping(client)
            nursery.start_soon(client.send_all, b"".join(asked))
            digest = hashlib.sha256(await read_exactly(client, len(answers)))
        assert digest.digest() == hashlib.sha256(answers).digest()

    async with (
        server_process(port, *command),
        running("tcprelay", f"127.0.0.1:{port}", mode) as to,
        trio.open_nursery() as nursery,
    ):
        for seed in range(3):
            nursery.start_soon(use, await to(), seed)


@each_mode
async def test_redis_is_killed(mode: str, redis: tuple[int, tuple[object, ...]]) -> None:
    """A target that is killed in the middle ends its clients' connections; newcomers are refused
    until it is there again, and then are served.
    """
    port, command = redis
    async with running("tcprelay", f"127.0.0.1:{port}", mode) as to:
        async with server_process(port, *command) as process:
            idle, busy = await to(), await to()
            await ping(idle)

            async def flood() -> None:
                with suppress(trio.BrokenResourceError):
                    while True:
                        await busy.send_all(redis_command(b"SET", b"key", bytes(100_000)))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(flood)
                await read_exactly(busy, 500)
                process.kill()
                for client in (idle, busy):
                    with suppress(trio.BrokenResourceError):
                        await read_to_eof(client)
                nursery.cancel_scope.cancel()
            for client in (idle, busy):
                await client.aclose()
            await process.wait()
        async with await to() as client:
            await assert_reset(client)
        async with server_process(port, *command), await to() as client:
            await ping(client)
