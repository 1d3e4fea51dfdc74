"""Listening sockets: both families on one port, options, Unix sockets and their files."""

from __future__ import annotations

import errno
import os
import random
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from tests.conftest import connect, no_leaks, open_descriptors, until
from trioreactor import (
    Acceptor,
    Keepalive,
    SocketOptions,
    open_tcp_acceptors,
    open_unix_acceptor,
)


@asynccontextmanager
async def owned(acceptors: list[Acceptor]) -> AsyncIterator[list[Acceptor]]:
    """Close them all at the end."""
    try:
        yield acceptors
    finally:
        for acceptor in acceptors:
            acceptor.close()


async def greet(acceptor: Acceptor) -> None:
    """Accept one client and say hello."""
    async with await acceptor.accept() as stream:
        await stream.send_all(b"hello")


async def connect_unix(path: str | Path) -> trio.SocketStream:
    """A client of a Unix socket, abstract names too."""
    sock = trio.socket.socket(socket.AF_UNIX)
    try:
        await sock.connect(str(path))
    except BaseException:
        sock.close()
        raise
    return trio.SocketStream(sock)


async def assert_serves(acceptor: Acceptor, client: trio.SocketStream) -> None:
    """A client that has connected to *acceptor* is greeted."""
    with trio.fail_after(5):
        async with client, trio.open_nursery() as nursery:
            nursery.start_soon(greet, acceptor)
            assert await client.receive_some() == b"hello"


def has_ipv6() -> bool:
    """Whether this machine has an IPv6 loopback."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


def free_port() -> int:
    """A port that is free in both families, outside the range that clients are given."""
    for port in random.sample(range(10_000, 30_000), 100):
        with suppress(OSError), socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::", port))
            return port
    raise AssertionError("no port is free")


# -- TCP


@needs_ipv6
async def test_both_families_share_a_port_that_the_system_chose() -> None:
    """With port 0, IPv4 and IPv6 get the same free port, and both serve."""
    async with no_leaks(), owned(await open_tcp_acceptors(0)) as acceptors:
        assert {a.socket.family for a in acceptors} == {socket.AF_INET, socket.AF_INET6}
        (port,) = {a.address[1] for a in acceptors}
        assert port != 0
        for acceptor in acceptors:
            client = await trio.testing.open_stream_to_socket_listener(acceptor)
            await assert_serves(acceptor, client)


@needs_ipv6
async def test_both_families_share_a_given_port() -> None:
    """The same for a port that the caller names."""
    port = free_port()
    async with no_leaks(), owned(await open_tcp_acceptors(port)) as acceptors:
        assert [a.address[1] for a in acceptors] == [port] * 2


@needs_ipv6
async def test_a_chosen_port_that_is_taken_in_the_other_family_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If the port that the system chose for one family is taken in the other, another is tried."""
    async with no_leaks():
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as blocker:
            taken = blocker.getsockname()[1]
            bind = socket.socket.bind
            tried: list[int] = []

            class Biased(socket.socket):
                """The first time, the system chooses the port that is taken."""

                def bind(self, address: Any) -> None:
                    if self.family == socket.AF_INET:
                        tried.append(address[1] if tried else taken)
                        address = (address[0], tried[-1])
                    bind(self, address)

            async def both(*_: object, **__: object) -> list[object]:
                return [
                    (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0)),
                    (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0)),
                ]

            monkeypatch.setattr(trio.socket, "getaddrinfo", both)
            monkeypatch.setattr(socket, "socket", Biased)
            async with owned(await open_tcp_acceptors(0, host="localhost")) as acceptors:
                monkeypatch.undo()
                assert tried[:2] == [taken, 0]
                first, second = (a.address[1] for a in acceptors)
                assert first == second != taken


@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("::1", marks=needs_ipv6), "localhost"])
async def test_only_the_given_host(host: str) -> None:
    """A host means its own addresses and no other."""
    async with no_leaks(), owned(await open_tcp_acceptors(0, host=host)) as acceptors:
        assert {a.address[0] for a in acceptors} <= {"127.0.0.1", "::1"}
        for acceptor in acceptors:
            client = await trio.testing.open_stream_to_socket_listener(acceptor)
            await assert_serves(acceptor, client)


async def test_a_port_in_use_is_a_clear_error() -> None:
    """A port that is taken raises OSError that names it, and leaves nothing open (F)."""
    async with no_leaks(), owned(await open_tcp_acceptors(0)) as acceptors:
        port = acceptors[0].address[1]
        assert isinstance(port, int)
        before = open_descriptors()
        with pytest.raises(OSError, match=rf"cannot listen on .*:{port}: .*in use") as caught:
            await open_tcp_acceptors(port)
        assert caught.value.errno == errno.EADDRINUSE
        assert open_descriptors() == before


@needs_ipv6
async def test_one_family_in_use_is_an_error_too() -> None:
    """A port taken in the second family alone closes the first one's socket again (F)."""
    port = free_port()
    async with no_leaks(), owned(await open_tcp_acceptors(port, host="::1")):
        before = open_descriptors()
        with pytest.raises(OSError, match=r"cannot listen on \[::\]"):
            await open_tcp_acceptors(port)
        assert open_descriptors() == before
        # The IPv4 port is free again.
        socket.create_server(("127.0.0.1", port)).close()


async def test_an_address_that_is_not_ours() -> None:
    """An address of another machine cannot be bound: OSError that says which."""
    with pytest.raises(OSError, match=r"cannot listen on 192\.0\.2\.1:") as caught:
        await open_tcp_acceptors(0, host="192.0.2.1")
    assert caught.value.errno == errno.EADDRNOTAVAIL


async def test_a_family_that_the_machine_lacks_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without IPv6 in the kernel it listens on IPv4 alone."""

    class NoIPv6(socket.socket):
        def __init__(self, family: int = -1, *args: int, **kwargs: int) -> None:
            if family == socket.AF_INET6:
                raise OSError(errno.EAFNOSUPPORT, "no such family")
            super().__init__(family, *args, **kwargs)

    monkeypatch.setattr(socket, "socket", NoIPv6)
    acceptors = await open_tcp_acceptors(0)
    monkeypatch.undo()
    async with owned(acceptors):
        assert [a.address[0] for a in acceptors] == ["0.0.0.0"]


async def test_an_unknown_host() -> None:
    """A host that does not resolve raises the resolver's own error."""
    with pytest.raises(socket.gaierror):
        await open_tcp_acceptors(0, host="::bad::")


@pytest.mark.parametrize("port", [-1, 65536])
async def test_a_port_out_of_range(port: int) -> None:
    """A number that is no port is refused before anything is opened."""
    with pytest.raises(ValueError, match="0 to 65535"):
        await open_tcp_acceptors(port)


@pytest.mark.parametrize("port", ["80", None, True, 80.0])
async def test_a_port_of_the_wrong_type(port: object) -> None:
    """The port is a whole number."""
    with pytest.raises(TypeError, match="whole number"):
        await open_tcp_acceptors(port)  # type: ignore[arg-type]


async def test_the_listening_socket_can_be_bound_again_at_once() -> None:
    """A restart on the same port need not wait for old connections' TIME_WAIT."""
    port = free_port()
    async with no_leaks():
        async with owned(await open_tcp_acceptors(port, host="127.0.0.1")) as (acceptor,):
            client = connect(acceptor.address)
            # Whoever closes first has the TIME_WAIT: here it is the server.
            await (await acceptor.accept()).aclose()
            await client.aclose()
        async with owned(await open_tcp_acceptors(port, host="127.0.0.1")):
            pass


async def test_options_are_set_before_bind_and_reach_connections() -> None:
    """Every socket option holds on accepted connections, those that must precede the handshake
    included."""
    options = SocketOptions(
        no_delay=True,
        keepalive=Keepalive(idle=61, interval=11, count=7),
        user_timeout=2.5,
        send_buffer=40_000,
        receive_buffer=30_000,
    )
    async with (
        no_leaks(),
        owned(await open_tcp_acceptors(0, host="127.0.0.1", socket_options=options)) as (acceptor,),
        connect(acceptor.address),
        await acceptor.accept() as stream,
    ):
        get = stream.getsockopt
        assert get(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        assert get(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert get(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 61
        assert get(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 11
        assert get(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 7
        assert get(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 2500
        # Linux doubles what it is asked for.
        assert get(socket.SOL_SOCKET, socket.SO_SNDBUF) == 80_000
        assert get(socket.SOL_SOCKET, socket.SO_RCVBUF) == 60_000


async def test_options_can_be_off() -> None:
    """What is off is off on accepted connections, too."""
    options = SocketOptions(no_delay=False, keepalive=False)
    async with (
        no_leaks(),
        owned(await open_tcp_acceptors(0, host="127.0.0.1", socket_options=options)) as (acceptor,),
        connect(acceptor.address),
    ):
        await acceptor.wait_acceptable()
        accepted = acceptor.accept_nowait()
        assert accepted is not None
        with accepted[0] as sock:
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 0
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0


async def test_reuse_port() -> None:
    """With SO_REUSEPORT two acceptors share a port; every client comes to one of the two."""
    options = SocketOptions(reuse_port=True)
    async with (
        no_leaks(),
        owned(await open_tcp_acceptors(0, host="127.0.0.1", socket_options=options)) as (first,),
        owned(
            await open_tcp_acceptors(first.address[1], host="127.0.0.1", socket_options=options)  # type: ignore[arg-type]
        ) as (second,),
        trio.open_nursery() as nursery,
    ):
        for acceptor in (first, second):
            nursery.start_soon(_count, acceptor)
        for _ in range(100):
            await connect(first.address).aclose()
        await until(lambda: first.statistics().accepted + second.statistics().accepted == 100)
        assert first.statistics().accepted > 0 < second.statistics().accepted
        nursery.cancel_scope.cancel()


async def _count(acceptor: Acceptor) -> None:
    while True:
        await (await acceptor.accept()).aclose()


async def test_backlog() -> None:
    """The backlog is the one asked for: clients beyond it are not taken in."""
    options = SocketOptions(backlog=1)
    async with (
        no_leaks(),
        owned(await open_tcp_acceptors(0, host="127.0.0.1", socket_options=options)) as (acceptor,),
    ):
        connected = 0
        socks = [socket.socket() for _ in range(5)]
        try:
            for sock in socks:
                sock.setblocking(False)
                sock.connect_ex(acceptor.address)
            with trio.move_on_after(0.2):
                for sock in socks:
                    await trio.lowlevel.wait_writable(sock)
                    connected += 1
        finally:
            for sock in socks:
                sock.close()
        # Linux takes one more than it is told.
        assert connected == 2


@pytest.mark.parametrize("batch", [1, None])
async def test_batch_is_handed_on(batch: int | None) -> None:
    """The acceptors have the batch that was asked for."""
    async with owned(await open_tcp_acceptors(0, batch=batch)) as acceptors:
        assert {a.batch for a in acceptors} == {batch}


# -- Unix


def mode_of(path: str | Path) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a Unix socket may be."""
    return tmp_path / "socket"


async def test_unix_serves_and_cleans_up(path: Path) -> None:
    """A Unix socket serves, and its file goes with it."""
    async with no_leaks():
        async with await open_unix_acceptor(path) as acceptor:
            assert acceptor.address == str(path)
            await assert_serves(acceptor, await connect_unix(path))
        assert not path.exists()


async def test_a_stale_file_is_replaced(path: Path) -> None:
    """What a server that crashed left behind does not stop the next one."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    assert path.exists()
    async with no_leaks():
        async with await open_unix_acceptor(path) as acceptor:
            await assert_serves(acceptor, await connect_unix(path))
        assert not path.exists()


async def test_a_live_servers_file_is_left_alone(path: Path) -> None:
    """A file that somebody serves on is not taken away: EADDRINUSE, and they serve on (F)."""
    async with no_leaks(), await open_unix_acceptor(path) as live:
        before = open_descriptors()
        with pytest.raises(OSError, match=f"cannot listen on {path}") as caught:
            await open_unix_acceptor(path)
        assert caught.value.errno == errno.EADDRINUSE
        assert open_descriptors() == before
        # Asking whether it lives was a connection that said nothing.
        async with await live.accept() as asked:
            assert await asked.receive_some() == b""
        await assert_serves(live, await connect_unix(path))


async def test_a_live_server_with_a_full_backlog_is_left_alone(path: Path) -> None:
    """A server that is too busy to be asked is alive."""
    async with (
        no_leaks(),
        await open_unix_acceptor(path, socket_options=SocketOptions(backlog=1)) as live,
    ):
        clients = [await connect_unix(path) for _ in range(2)]
        with trio.fail_after(5), pytest.raises(OSError, match="in use"):
            await open_unix_acceptor(path)
        for client in clients:
            await assert_serves(live, client)
        await assert_serves(live, await connect_unix(path))


@pytest.mark.parametrize("content", [b"", b"precious"])
async def test_a_regular_file_is_left_alone(path: Path, content: bytes) -> None:
    """A file that is no socket is not taken away."""
    path.write_bytes(content)
    async with no_leaks():
        with pytest.raises(OSError, match="in use") as caught:
            await open_unix_acceptor(path)
    assert caught.value.errno == errno.EADDRINUSE
    assert path.read_bytes() == content


async def test_a_directory_is_left_alone(path: Path) -> None:
    """Nor is a directory."""
    path.mkdir()
    with pytest.raises(OSError, match="in use"):
        await open_unix_acceptor(path)
    assert path.is_dir()


async def test_a_symlink_is_left_alone(path: Path, tmp_path: Path) -> None:
    """A symbolic link is neither followed nor removed, even to a stale socket."""
    target = tmp_path / "target"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(target))
    path.symlink_to(target)
    with pytest.raises(OSError, match="in use"):
        await open_unix_acceptor(path)
    assert path.is_symlink()
    assert target.exists()


async def test_a_datagram_socket_is_left_alone(path: Path) -> None:
    """A socket of another kind that is in use is not taken away."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as live:
        live.bind(str(path))
        with pytest.raises(OSError, match="in use"):
            await open_unix_acceptor(path)
        assert path.exists()


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
@pytest.mark.parametrize("mode", [0o600, 0o660, 0o777])
async def test_mode_is_exact_and_never_wider(
    path: Path, mode: int, umask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file's mode is what was asked for whatever the umask, and never wider before that."""
    at_birth: list[int] = []
    bind = socket.socket.bind

    class Watched(socket.socket):
        def bind(self, address: Any) -> None:
            bind(self, address)
            at_birth.append(mode_of(address))

    monkeypatch.setattr(socket, "socket", Watched)
    old = os.umask(umask)
    try:
        acceptor = await open_unix_acceptor(path, mode=mode)
    finally:
        os.umask(old)
        monkeypatch.undo()
    async with acceptor:
        assert mode_of(path) == mode
        (born,) = at_birth
        assert born & ~mode == 0


async def test_without_a_mode_the_umask_decides(path: Path) -> None:
    """mode=None is what bind itself does."""
    old = os.umask(0o027)
    try:
        acceptor = await open_unix_acceptor(path)
    finally:
        os.umask(old)
    async with acceptor:
        assert mode_of(path) == 0o750


async def test_a_file_that_is_not_ours_any_more_stays(path: Path) -> None:
    """A successor's socket under the same name outlives our close."""
    async with no_leaks():
        first = await open_unix_acceptor(path)
        path.unlink()
        async with await open_unix_acceptor(path) as second:
            await first.aclose()
            assert path.exists()
            await assert_serves(second, await connect_unix(path))
        assert not path.exists()


async def test_a_file_that_is_gone_already(path: Path) -> None:
    """Somebody else's removal of the file does not disturb the close."""
    async with no_leaks(), await open_unix_acceptor(path):
        path.unlink()


async def test_an_abstract_name_has_no_file(tmp_path: Path) -> None:
    """An abstract name serves, and is free again after the close."""
    name = f"\0{tmp_path}"
    async with no_leaks():
        for _ in range(2):
            async with await open_unix_acceptor(name, mode=0o600) as acceptor:
                await assert_serves(acceptor, await connect_unix(name))
                with pytest.raises(OSError, match=f"cannot listen on @{tmp_path}"):
                    await open_unix_acceptor(name)
        with pytest.raises(ConnectionRefusedError):
            await connect_unix(name)
    assert not list(tmp_path.iterdir())


async def test_no_such_directory(path: Path) -> None:
    """A path that cannot be bound says which, and leaves nothing open."""
    async with no_leaks():
        with pytest.raises(FileNotFoundError, match=f"cannot listen on {path}/socket"):
            await open_unix_acceptor(path / "socket")


async def test_a_path_too_long_says_so(path: Path) -> None:
    """Python's own errors have no number; their text is kept."""
    async with no_leaks():
        with pytest.raises(OSError, match="too long"):
            await open_unix_acceptor(f"{path}{'x' * 200}")


async def test_options_reach_unix_connections(path: Path) -> None:
    """Buffer sizes hold on Unix sockets, too, and TCP's own options are left out."""
    options = SocketOptions(send_buffer=40_000, keepalive=Keepalive(), user_timeout=1.0)
    async with await open_unix_acceptor(path, socket_options=options) as acceptor:
        assert acceptor.socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 80_000


async def test_opening_checkpoints(path: Path) -> None:
    """Both ways of opening are checkpoints."""
    with trio.testing.assert_checkpoints():
        acceptor = await open_unix_acceptor(path)
    acceptor.close()
    with trio.testing.assert_checkpoints():
        acceptors = await open_tcp_acceptors(0, host="127.0.0.1")
    async with owned(acceptors):
        pass
