"""The examples of clients, each with its server, which comes and goes."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import IO, Any

import pytest
import trio

from tests.conftest import no_leaks, serving, until
from tests.kill_nine import HOST, reserve_port
from tests.test_examples import ROOT, load
from trioreactor import Backoff, ConnectError, TcpClient, TcpConnection, TcpServer

QUICK = Backoff(initial=0.01, maximum=0.05)


@pytest.fixture
def port() -> Iterator[int]:
    """A port that a server can leave and come back to."""
    with reserve_port() as reserved:
        yield reserved.getsockname()[1]


@asynccontextmanager
async def up(name: str, port: int, *arguments: object) -> AsyncIterator[None]:
    """The example's server, on *port* for the time of the block."""
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(load(name).main, port, *arguments))
        yield
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def background(run: Callable[[], Any]) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        with trio.fail_after(30):
            yield
        nursery.cancel_scope.cancel()


class Printed:
    """What has been printed so far."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self._text = ""

    def lines(self) -> list[str]:
        self._text += self._capsys.readouterr().out
        return self._text.splitlines()

    def times(self) -> list[datetime]:
        return [datetime.fromisoformat(line) for line in self.lines() if line[:2] == "20"]


# -- the time


async def test_time_client(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Each answer is the time, each costs a connection, and it ends after as many as asked."""
    printed = Printed(capsys)
    async with no_leaks(), up("time_server", port):
        with trio.fail_after(30):
            await load("time_client").main(port, 3, backoff=QUICK)
    assert len(printed.times()) == 3
    for told in printed.times():
        assert abs((datetime.now(UTC) - told).total_seconds()) < 60


async def test_time_client_comes_back(
    port: int, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """While the server is away the log tells of the attempts; when it is back, so are answers."""
    printed = Printed(capsys)
    async with no_leaks(), background(partial(load("time_client").main, port, backoff=QUICK)):
        for _ in range(3):
            caplog.clear()
            await until(lambda: "Connection refused; next attempt in" in caplog.text)
            before = len(printed.times())
            async with up("time_server", port):
                await until(lambda before=before: len(printed.times()) >= before + 2)


async def test_time_client_with_a_server_that_is_wrong(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Too few bytes are told by the log, and it asks again; more are too many to read."""
    answers = iter([b"\x83\xaa", b"", b"\x83\xaa\x7e\x81and so on"])

    async def handler(conn: TcpConnection) -> None:
        await conn.send_all(next(answers))

    printed = Printed(capsys)
    async with no_leaks(), serving(TcpServer(handler, 0, host=HOST)) as (_, port):
        with trio.fail_after(30):
            await load("time_client").main(port, 1, backoff=QUICK)
    # 0x83aa7e81 is one second after 1970 began.
    assert printed.lines()[-1] == "1970-01-01 00:00:01+00:00"
    assert "2 bytes instead of 4" in caplog.text
    assert "0 bytes instead of 4" in caplog.text


@pytest.mark.parametrize("answer", [b"1900", b""])
async def test_time_client_resets_its_backoff(answer: bytes) -> None:
    """After each answer the delays begin anew; a server that closes without one is asked as often
    as the backoff says.
    """

    async def handler(conn: TcpConnection) -> None:
        await conn.send_all(answer)

    server = TcpServer(handler, 0, host=HOST)
    async with no_leaks(), serving(server) as (_, port):
        with trio.fail_after(30):
            run = load("time_client").main(port, 5, backoff=[0.001, 0.002])
            if answer:
                await run
            else:
                with pytest.raises(ConnectError, match="no further delay"):
                    await run
    assert server.statistics().opened == (5 if answer else 3)


async def test_time_after_2036(capsys: pytest.CaptureFixture[str]) -> None:
    """When the 32 bits have overflowed, the time is still right."""

    async def handler(conn: TcpConnection) -> None:
        await conn.send_all((7).to_bytes(4, "big"))

    async with no_leaks(), serving(TcpServer(handler, 0, host=HOST)) as (_, port):
        with trio.fail_after(30):
            await load("time_client").main(port, 1)
    assert Printed(capsys).lines()[-1] == "2036-02-07 06:28:23+00:00"


# -- topics


class Publisher:
    """Publishes until everybody who should has it."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.serial = 0

    async def publish(self, topic: str, seen: list[str]) -> None:
        """Publish anew, until *seen* shows it: a subscription may still be on its way."""
        with trio.fail_after(20):
            while not any(line.startswith(f"{topic} ") for line in seen):
                self.serial += 1
                await self.stream.send_all(f"pub {topic} number {self.serial}\n".encode())
                await trio.sleep(0.005)

    async def publish_once(self, topic: str) -> None:
        await self.stream.send_all(f"pub {topic} text\n".encode())


@asynccontextmanager
async def hub_and_publisher(port: int) -> AsyncIterator[Publisher]:
    async with up("hub", port), await trio.open_tcp_stream(HOST, port) as stream:
        yield Publisher(stream)


async def test_subscriptions_survive_the_hub(port: int) -> None:
    """After each restart of the hub all topics come again, those that were asked for while it
    was away, too; others never.
    """
    seen: list[str] = []
    subscriber = load("resubscribe").Subscriber(port, ["news", "weather"], seen.append)
    # The same, so that the test need not wait as long.
    subscriber.client = TcpClient(
        HOST, port, subscriber._handler, backoff=QUICK, on_attempt=subscriber._on_attempt
    )
    async with no_leaks(), background(subscriber.client.run):
        await until(lambda: any("Connection refused; the next in 0.0" in line for line in seen))
        topics = ["news", "weather"]
        for restart in range(3):
            topics.append(f"while-away-{restart}")
            subscriber.subscribe(topics[-1])
            async with hub_and_publisher(port) as publisher:
                await until(lambda: "connected in" in seen[-1])
                seen.clear()
                for topic in topics:
                    await publisher.publish(topic, seen)
                topics.append(f"while-connected-{restart}")
                subscriber.subscribe(topics[-1])
                await publisher.publish(topics[-1], seen)
                await publisher.publish_once("sports")
                seen.clear()
                await publisher.publish("news", seen)
            await until(lambda: "! the hub has gone" in seen)
            assert not any(line.startswith("sports") for line in seen)
    assert subscriber.client.statistics().opened >= 3


async def test_hub(port: int) -> None:
    """Each topic goes to its subscribers, once each; what is no command ends its sender alone."""
    async with no_leaks(), hub_and_publisher(port) as publisher:
        both, one, wrong, long = [await trio.open_tcp_stream(HOST, port) for _ in range(4)]
        with trio.fail_after(20):
            await both.send_all(b"sub a\nsub b\nsub a\npub b hello\n")
            assert await both.receive_some() == b"b hello\n"
            await one.send_all(b"sub a\npub a he")
            await one.send_all(b"llo all\n")
            assert await both.receive_some() == await one.receive_some() == b"a hello all\n"
            await wrong.send_all(b"sub c\nnonsense\n")
            assert await rest_of(wrong) == b""
            await long.send_all(b"sub c\npub c " + b"x" * 2000)
            assert await rest_of(long) == b""
            await publisher.publish_once("nobodys")
            await publisher.publish_once("a")
            assert await both.receive_some() == await one.receive_some() == b"a text\n"
        for stream in (both, one, wrong, long):
            await stream.aclose()


async def rest_of(stream: trio.SocketStream) -> bytes:
    received = b""
    try:
        async for data in stream:
            received += data
    except trio.BrokenResourceError:
        pass
    return received


# -- messages that must arrive. Losing the connection and the server is tests/test_kill_nine.py.


async def test_inbox_starts_from_what_it_has(port: int, tmp_path: Path) -> None:
    """A last line that a kill has cut is dropped, a complete one is known; each sender's numbers
    are its own; and every message is acknowledged, one that has come again, too.
    """
    path = tmp_path / "inbox"
    path.write_bytes(b"ann 1 one\nbob 1 one\nann 2 two\nann 3 thr")
    async with (
        no_leaks(),
        up("inbox", port, str(path)),
        await trio.open_tcp_stream(HOST, port) as stream,
    ):
        await stream.send_all(b"ann 2 two\nann 3 three\nbob 2 two\neve 7 seven\nann 4")
        answer = b""
        with trio.fail_after(10):
            while len(answer) < 8:
                answer += await stream.receive_some()
        assert answer == b"2\n3\n2\n7\n"
    assert path.read_bytes() == (
        b"ann 1 one\nbob 1 one\nann 2 two\nann 3 three\nbob 2 two\neve 7 seven\n"
    )


async def test_inbox_takes_no_other_file(tmp_path: Path) -> None:
    """A file that is something else is left as it is."""
    path = tmp_path / "letter"
    path.write_bytes(b"Dear Ann,\n\nhow are you?")
    async with no_leaks():
        with pytest.raises(ValueError, match="a line that is no message"):
            await load("inbox").main(0, str(path))
    assert path.read_bytes() == b"Dear Ann,\n\nhow are you?"


async def test_outbox_gives_up(port: int, tmp_path: Path) -> None:
    """A message that was given up is not sent any more; one that still waits is, by a server
    that comes later.
    """
    outbox = load("outbox").Outbox()
    client = TcpClient(HOST, port, outbox.handler, backoff=QUICK)
    path = tmp_path / "inbox"
    async with no_leaks(), client, trio.open_nursery() as nursery:
        nursery.start_soon(outbox.deliver, "first")
        with trio.move_on_after(0.05) as patience:
            await outbox.deliver("second")
        assert patience.cancelled_caught
        assert len(outbox.waiting) == 1
        async with up("inbox", port, str(path)):
            with trio.fail_after(20):
                await outbox.deliver("third")
            await until(lambda: not outbox.waiting)
    texts = [line.split(b" ")[2] for line in path.read_bytes().splitlines()]
    assert texts == [b"first", b"third"]


# -- as programs


class Program:
    """A running example, its output read line by line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout is not None
        assert process.stderr is not None
        self.out: IO[str] = process.stdout
        self._errors: IO[str] = process.stderr

    def says(self, text: str) -> None:
        """Wait for a line with *text*."""
        assert any(text in line for line in self.out), f"it ended without saying {text!r}"

    def logs(self, text: str) -> None:
        """The same in the log, which nobody sent anywhere else than to stderr."""
        assert any(text in line for line in self._errors), f"it ended without logging {text!r}"

    def interrupt(self) -> str:
        """Ctrl-C; it ends without a traceback. Gives what else it had said on stderr."""
        self.process.send_signal(signal.SIGINT)
        _, errors = self.process.communicate(timeout=20)
        assert self.process.returncode == 0, errors
        assert "Traceback" not in errors
        return errors

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=20)


@contextmanager
def program(name: str, port: int, *arguments: str) -> Iterator[Program]:
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--port", str(port), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield Program(process)
        finally:
            process.kill()


@pytest.mark.program
@pytest.mark.shown
def test_time_client_by_hand(port: int) -> None:
    """It runs as a program, goes on after the server was killed, and ends on Ctrl-C."""
    with program("time_client", port) as client:
        for _ in range(2):
            client.logs("Connection refused; next attempt in")
            with program("time_server", port) as server:
                client.says("+00:00")
                server.kill()
        client.interrupt()


@pytest.mark.program
@pytest.mark.shown
def test_resubscribe_by_hand(port: int) -> None:
    """The client tells of each attempt, once, and what is published reaches it again after the
    hub was killed.
    """
    with program("resubscribe", port, "news") as client:
        for _ in range(2):
            client.says("Connection refused; the next in")
            with program("hub", port) as hub:
                client.says("connected in")
                with socket.create_connection((HOST, port)) as publisher:
                    # Anew, for the subscription may still be on its way.
                    publisher.sendall(b"pub news it works\n")
                    while not select.select([client.out], [], [], 0.1)[0]:
                        publisher.sendall(b"pub news it works\n")
                    client.says("news it works")
                hub.kill()
            client.says("! the hub has gone")
        assert client.interrupt() == ""


@pytest.mark.program
@pytest.mark.shown
def test_outbox_by_hand(port: int, tmp_path: Path) -> None:
    """Message after message arrives, those from the time without an inbox, too."""
    path = tmp_path / "inbox"
    with program("outbox", port) as outbox:
        with program("inbox", port, str(path)) as inbox:
            outbox.says("message 1: arrived")
            inbox.kill()
        with program("inbox", port, str(path)):
            outbox.says("message 4: arrived")
        outbox.interrupt()
    lines = path.read_text().splitlines()
    assert [int(line.split()[1]) for line in lines] == list(range(1, len(lines) + 1))


@pytest.mark.program
@pytest.mark.shown
def test_outbox_by_hand_gives_up(port: int) -> None:
    """Without an inbox each message is reported as given up after its time."""
    with program("outbox", port, "--patience", "0.2") as outbox:
        outbox.says("message 1: given up after 0.2 s")
        outbox.interrupt()
