"""A chat of several processes, real haproxy in front, real redis-server behind; and the files that
deploy it.
"""

from __future__ import annotations

import ast
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.conftest import connect, until
from tests.servers import installed, rest_of, server_process, unused_port
from tests.test_client_examples import Program, program
from tests.test_examples import ROOT, load
from trioreactor import (
    NEED_MORE,
    Backoff,
    Buffer,
    FramedChannel,
    FrameTooLarge,
    LengthHeaderCodec,
    ProtocolError,
    TcpClient,
    TcpConnection,
    format_address,
)

DEPLOY = ROOT / "examples" / "deploy"
CODEC = LengthHeaderCodec(max_frame=16384)
ALONE = b"* other servers are out of reach: only those on this one read you"
TOGETHER = b"* other servers are back: all read you again"


@pytest.fixture(autouse=True)
def _examples_find_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")


class Member:
    """A client that comes back, from *source*, and what it has read."""

    def __init__(self, port: int, source: str) -> None:
        self.read: list[bytes] = []
        self.client = TcpClient(
            "127.0.0.1",
            port,
            self._handler,
            backoff=Backoff(initial=0.02, maximum=0.2),
            local_address=source,
        )

    @property
    def has_come(self) -> str:
        """The line by which a server behind a proxy says that it serves this one."""
        assert self.client.connection is not None
        return f"{format_address(self.client.connection.local_address)} has come\n"

    async def _handler(self, conn: TcpConnection) -> None:
        async for message in FramedChannel(conn, CODEC):
            self.read.append(message)

    def say(self, text: bytes) -> None:
        self.client.send(CODEC.encode(text))

    async def is_served(self) -> None:
        """Wait for the server's own answer: a balancer takes connections before a server does."""
        answers = self.read.count(b"")
        self.say(b"")
        await until(lambda: self.read.count(b"") > answers)

    async def reads(self, text: bytes) -> None:
        await until(lambda: text in self.read)


async def exchange(speaker: Member, others: list[Member], text: bytes) -> None:
    """What one says, all read, and exactly once."""
    speaker.say(text)
    for member in [speaker, *others]:
        await member.reads(text)
        assert member.read.count(text) == 1


def redis(path: str, port: int) -> Any:
    arguments = ["--port", port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    return server_process(port, path, *arguments)


@asynccontextmanager
async def haproxy(path: str, backends: list[int], directory: Path) -> AsyncIterator[int]:
    """haproxy as examples/deploy configures it, with ports of ours; gives that in front."""
    with socket.create_server(("127.0.0.1", 0)) as front:
        text = (DEPLOY / "haproxy.cfg").read_text()
        for old, new in {
            "maxconn 20000": "maxconn 100",
            "bind :7020": f"bind fd@{front.fileno()}",
            "127.0.0.1:7023": f"127.0.0.1:{backends[0]}",
            "127.0.0.1:7024": f"127.0.0.1:{backends[1]}",
        }.items():
            assert text.count(old) == 1
            text = text.replace(old, new)
        (directory / "haproxy.cfg").write_text(text)
        process = await trio.lowlevel.open_process(
            [path, "-db", "-f", str(directory / "haproxy.cfg")],
            pass_fds=[front.fileno()],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield front.getsockname()[1]
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()


@contextmanager
def chat(port: int, redis_port: int, *arguments: str) -> Any:
    with program("chat_cluster", port, "--redis", f"127.0.0.1:{redis_port}", *arguments) as running:
        yield running


def established(port: int) -> int:
    """How many connections the server on that port has accepted."""
    table = Path("/proc/net/tcp").read_text()
    return len(re.findall(rf"^ *\d+: 0100007F:{port:04X} \w+:\w+ 01 ", table, re.MULTILINE))


@asynccontextmanager
async def members(port: int, count: int) -> AsyncIterator[list[Member]]:
    async with AsyncExitStack() as stack:
        found = [Member(port, f"127.0.0.{7 + number}") for number in range(count)]
        for member in found:
            await stack.enter_async_context(member.client)
            with trio.fail_after(20):
                await member.client.wait_connected()
            await member.is_served()
        yield found


async def in_thread(fn: Callable[..., Any], *arguments: object) -> Any:
    with trio.fail_after(20):
        return await trio.to_thread.run_sync(fn, *arguments, abandon_on_cancel=True)


@pytest.mark.program
async def test_a_cluster_behind_haproxy(tmp_path: Path) -> None:
    """Least connections spreads two clients over two servers, which know their addresses, and hear
    each other. The broker is killed: each server goes on by itself, says so once, and they are one
    again when it is back. A server is killed: its client comes back by haproxy, to the other one.
    """
    behind = ("--proxy-protocol", "127.0.0.1")
    redis_path, haproxy_path = installed("redis-server"), installed("haproxy")
    async with AsyncExitStack() as stack:
        broker_port, *ports = [stack.enter_context(unused_port()) for _ in range(3)]
        broker = await stack.enter_async_context(redis(redis_path, broker_port))
        servers: list[Program] = [
            stack.enter_context(chat(port, broker_port, *behind)) for port in ports
        ]
        for server in servers:
            await in_thread(server.says, "fan-out works; messages lost so far: 0")
        front = await stack.enter_async_context(haproxy(haproxy_path, ports, tmp_path))
        ann, bob = await stack.enter_async_context(members(front, 2))
        # Health checks come and go.
        await until(lambda: [established(port) for port in ports] == [1, 1])
        # Each server's next line, so nobody else has come, and the checks are not told of.
        came = [await in_thread(server.out.readline) for server in servers]
        assert sorted(came) == [ann.has_come, bob.has_come]
        async with connect(("127.0.0.1", ports[0]), source="127.0.0.9") as stranger:
            assert await rest_of(stranger) == b""
        await exchange(ann, [bob], b"hello from ann")
        await exchange(bob, [ann], b"hello from bob")

        broker.kill()
        await broker.wait()
        for server in servers:
            await in_thread(server.says, "fan-out is lost; messages lost so far: 0")
        for member in (ann, bob):
            await member.reads(ALONE)
        # Of ann's own server; that bob did not read it is asked when both are one again.
        await exchange(ann, [], b"only here")
        async with redis(redis_path, broker_port):
            heard = [await in_thread(server.out.readline) for server in servers]
            # The next line of each, so the loss was said once however often it tried.
            assert sorted(heard) == [
                "fan-out works; messages lost so far: 0\n",
                "fan-out works; messages lost so far: 1\n",
            ]
            for member in (ann, bob):
                await member.reads(TOGETHER)
            await exchange(ann, [bob], b"all again")
            assert b"only here" not in bob.read

            # Ann's is the server that has lost a message.
            mine = heard.index("fan-out works; messages lost so far: 1\n")
            assert came[mine] == ann.has_come
            before = ann.client.statistics().opened
            servers[mine].kill()
            await until(lambda: ann.client.statistics().opened > before)
            await until(lambda: established(ports[1 - mine]) == 2)
            await ann.is_served()
            assert await in_thread(servers[1 - mine].out.readline) == ann.has_come
            await exchange(ann, [bob], b"here again")
            for member in (ann, bob):
                said = [text for text in member.read if text]
                assert len(said) == len(set(said)), "something came twice"
            await in_thread(servers[1 - mine].interrupt)


@pytest.mark.program
async def test_a_drain_moves_clients_on() -> None:
    """SIGTERM: the clients are sent what was said, then the end; the process ends well, and without
    a broker newcomers are told that they are alone.
    """
    with unused_port() as port, unused_port() as nobody, chat(port, nobody) as server:
        await in_thread(server.says, "fan-out is lost")
        async with members(port, 2) as (ann, bob):
            await ann.reads(ALONE)
            await exchange(ann, [bob], b"the last word")
            server.process.terminate()
            await in_thread(server.says, "drained: {'peer_eof': 2}")
            assert await in_thread(server.process.wait) == 0


@pytest.mark.pure
def test_replies_of_redis() -> None:
    """Each kind of reply, whole and byte by byte; what is none, too deep, too large is refused."""
    codec = load("parts/redis_fanout").RespReplies(2000)
    replies = {
        b"+OK\r\n": b"OK",
        b":-7\r\n": -7,
        b"_\r\n": None,
        b"$-1\r\n": None,
        b"$4\r\na\r\nb\r\n": b"a\r\nb",
        b"%1\r\n+server\r\n*0\r\n": [b"server", []],
        b">3\r\n$7\r\nmessage\r\n$4\r\nchat\r\n$0\r\n\r\n": [b"message", b"chat", b""],
        b"$1500\r\n%b\r\n" % bytes(1500): bytes(1500),
    }
    for data, reply in replies.items():
        buffer = Buffer()
        for byte in data[:-1]:
            buffer.append(bytes([byte]))
            assert codec.decode(buffer) is NEED_MORE
        buffer.append(data[-1:] + b"+next\r\n")
        assert codec.decode(buffer) == reply
        assert codec.decode(buffer) == b"next"
    for bad in (b"-NOAUTH no\r\n", b"hello\r\n", b"$x\r\n", b"*1\r\n" * 20 + b"+\r\n"):
        with pytest.raises(ProtocolError):
            codec.decode(Buffer(bad))
    with pytest.raises(FrameTooLarge):
        codec.decode(Buffer(b"$9000\r\n" + bytes(3000)))
    assert codec.encode([b"PING", b""]) == b"*2\r\n$4\r\nPING\r\n$0\r\n\r\n"


# -- the files that deploy it


def options() -> set[str]:
    """The command-line options of the example, as its source has them."""
    tree = ast.parse((ROOT / "examples" / "chat_cluster.py").read_text())
    return {
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "add_argument"
        and isinstance(node.args[0], ast.Constant)
        and isinstance(node.args[0].value, str)
    }


def unit(name: str) -> dict[str, str]:
    lines = (DEPLOY / name).read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and line[0] != "#")


def read_yaml(text: str) -> Any:
    """One document of the plainest YAML: block maps, block lists, scalars; all else is refused."""
    lines: list[tuple[int, str]] = []
    for line in text.splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            assert "\t" not in line
            lines.append((len(line) - len(line.lstrip()), line.strip()))

    def block(indent: int) -> Any:
        found: Any = [] if lines[0][1].startswith("- ") else {}
        while lines and lines[0][0] == indent:
            _, body = lines.pop(0)
            if isinstance(found, list):
                assert body.startswith("- "), body
                body = body[2:]
                if re.match(r"\w+:( |$)", body):
                    lines.insert(0, (indent + 2, body))
                    found.append(block(indent + 2))
                else:
                    found.append(scalar(body))
                continue
            match = re.fullmatch(r"(\w+):(?: (.+))?", body)
            assert match, body
            assert match[1] not in found, body
            if match[2] is None:
                assert lines[0][0] > indent, body
                found[match[1]] = block(lines[0][0])
            else:
                found[match[1]] = scalar(match[2])
        assert not lines or lines[0][0] < indent, lines[0]
        return found

    def scalar(text: str) -> Any:
        if text.startswith('"'):
            return ast.literal_eval(text)
        assert re.fullmatch(r"[\w.:/-]+", text), text
        return int(text) if text.isdigit() else text

    return block(0)


@pytest.mark.pure
def test_kubernetes_file() -> None:
    """Its options exist, its ports and labels agree, its times leave room for the drain."""
    deployment, service = map(read_yaml, (DEPLOY / "kubernetes.yaml").read_text().split("---\n"))
    assert (deployment["kind"], service["kind"]) == ("Deployment", "Service")
    pod = deployment["spec"]["template"]
    labels = pod["metadata"]["labels"]
    assert labels == deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
    (container,) = pod["spec"]["containers"]
    command = container["command"]
    assert all(isinstance(word, str) for word in command)
    assert (ROOT / command[1]).is_file()
    given = dict(zip(command[2::2], command[3::2], strict=True))
    assert set(given) <= options()
    # A Service sends no header.
    assert "--proxy-protocol" not in given
    (port,) = container["ports"]
    assert str(port["containerPort"]) == given["--port"]
    assert container["readinessProbe"]["tcpSocket"]["port"] == port["name"]
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    grace = pod["spec"]["terminationGracePeriodSeconds"]
    assert pause + float(given["--drain-seconds"]) + 2 <= grace


@pytest.mark.pure
def test_unit_files() -> None:
    """Their options exist, the socket has the name that is asked for, the drain has its time."""
    service = unit("chat@.service")
    _python, script, *arguments = shlex.split(service["ExecStart"])
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert script.endswith("examples/chat_cluster.py")
    assert set(given) <= options()
    assert float(given["--drain-seconds"]) + 2 <= float(service["TimeoutStopSec"])
    assert service["Type"] == "notify"
    # What haproxy.cfg sends is believed, and nobody comes who does not send it.
    assert "send-proxy-v2" in (DEPLOY / "haproxy.cfg").read_text()
    proxy = ip_network(given["--proxy-protocol"])
    assert unit("chat@.socket")["ListenStream"] == f"{proxy.network_address}:%i"
    name = unit("chat@.socket")["FileDescriptorName"]
    source = (ROOT / "examples" / "chat_cluster.py").read_text()
    assert f'inherited_acceptors(name="{name}")' in source


@pytest.mark.program
def test_systemd_verifies_the_units(tmp_path: Path) -> None:
    """systemd-analyze has nothing to say about them, as instances, with a Python that exists."""
    verify = installed("systemd-analyze")
    for kind in ("socket", "service"):
        text = (DEPLOY / f"chat@.{kind}").read_text()
        text = text.replace("/opt/chat/bin/python", sys.executable)
        (tmp_path / f"chat@.{kind}").write_text(text)
    paths = [str(tmp_path / f"chat@7023.{kind}") for kind in ("socket", "service")]
    for path in paths:
        Path(path).symlink_to(tmp_path / f"chat@.{path.rpartition('.')[2]}")
    done = subprocess.run(
        [verify, "verify", "--man=no", *paths],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    said = [line for line in done.stderr.splitlines() if "chat@" in line]
    assert (done.returncode, said) == (0, []), done.stderr
