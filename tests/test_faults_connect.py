"""What goes wrong at connect, with the real kernel: FAULTS 42, 43 and 46 to 50."""

from __future__ import annotations

import errno
import os
import resource
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.conftest import no_leaks, reset, until
from tests.fake_network import Resolver
from tests.namespaces import black_hole, ip, local_ports, own_network
from trioreactor import ConnectAttempt, ConnectError, Connector, open_tcp_connection

__all__ = ["own_network"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="about Linux's kernel")

# Often enough that a test is quick, and bounded, so that none is endless.
SOON = [0.01] * 500


class Log(list[ConnectAttempt]):
    """An `on_attempt` that remembers."""

    def __call__(self, attempt: ConnectAttempt) -> None:
        self.append(attempt)

    def errnos(self) -> set[int | None]:
        """What the failed ones failed by."""
        return {getattr(attempt.error, "errno", None) for attempt in self if attempt.error}


@contextmanager
def not_listening() -> Iterator[socket.socket]:
    """A server's socket that nobody listens on yet: the kernel refuses for it."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        yield server


async def failed_attempts(log: Log, number: int) -> None:
    """Wait for so many."""
    await until(lambda: len(log) >= number)
    assert all(attempt.error is not None for attempt in log)


# -- refused (42)


async def test_refused_until_the_server_comes() -> None:
    """Nobody listens: refused again and again, until the server does."""
    log = Log()
    async with no_leaks():
        with not_listening() as server:
            connector = Connector(*server.getsockname(), backoff=SOON, on_attempt=log)
            async with trio.open_nursery() as nursery:

                async def start_server() -> None:
                    await failed_attempts(log, 3)
                    server.listen()

                nursery.start_soon(start_server)
                async with await connector.connect() as stream:
                    assert stream.socket.getpeername() == server.getsockname() == log[-1].address
    assert log.errnos() == {errno.ECONNREFUSED}
    assert len(log) == connector.attempts >= 4


# -- a black hole (43)


@contextmanager
def full_backlog() -> Iterator[tuple[str, int]]:
    """A server that accepts nobody, its queue full: the kernel drops every further SYN."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(3):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(server.getsockname())
        yield server.getsockname()


async def test_a_black_hole_times_out(own_network: None) -> None:
    """SYNs into nothing are given up by `connect_timeout`, each attempt anew."""
    black_hole("198.18.0.0/15")
    log = Log()
    connector = Connector(
        "198.18.0.1", 80, connect_timeout=0.3, backoff=SOON, max_attempts=2, on_attempt=log
    )
    async with no_leaks():
        with trio.fail_after(20), pytest.raises(ConnectError) as caught:
            await connector.connect()
    assert caught.value.errno == errno.ETIMEDOUT
    assert len(log) == 2
    assert all(0.3 <= attempt.duration < 5 for attempt in log)


async def test_a_full_backlog_times_out() -> None:
    """The same with a server that is there, but hangs."""
    async with no_leaks():
        with full_backlog() as address, trio.fail_after(20), pytest.raises(ConnectError) as caught:
            await open_tcp_connection(*address, connect_timeout=0.3)
    assert caught.value.errno == errno.ETIMEDOUT


async def test_no_route(own_network: None) -> None:
    """A network that is not there can come: unreachable is retried, until the route is."""
    log = Log()
    with socket.create_server(("", 0)) as server:
        connector = Connector("198.18.0.1", server.getsockname()[1], backoff=SOON, on_attempt=log)
        async with trio.open_nursery() as nursery:

            async def come() -> None:
                await failed_attempts(log, 2)
                ip("addr", "add", "198.18.0.1/32", "dev", "lo")

            nursery.start_soon(come)
            async with await connector.connect():
                pass
    assert log.errnos() == {errno.ENETUNREACH}


# -- the resolver (46)


@pytest.mark.parametrize("name", ["EAI_AGAIN", "EAI_NONAME"])
async def test_the_resolver_fails(name: str) -> None:
    """A resolver that fails is asked again, and its name is known in the end."""
    resolver = Resolver(socket.gaierror(getattr(socket, name), "no"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        log = Log()
        connector = Connector("server.invalid", port, backoff=SOON, on_attempt=log)
        async with trio.open_nursery() as nursery:

            async def recover() -> None:
                await failed_attempts(log, 3)
                resolver.answer = ["127.0.0.1"]

            nursery.start_soon(recover)
            async with await connector.connect():
                pass
    assert log.errnos() == {getattr(socket, name)}
    assert resolver.asked == len(log) >= 4


async def test_the_resolver_hangs() -> None:
    """`connect_timeout` ends the wait for it, and the next attempt asks again."""
    resolver = Resolver(None)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def on_attempt(attempt: ConnectAttempt) -> None:
            log(attempt)
            resolver.answer = ["127.0.0.1"]

        log = Log()
        connector = Connector(
            "server.invalid",
            server.getsockname()[1],
            connect_timeout=0.3,
            backoff=SOON,
            on_attempt=on_attempt,
        )
        async with no_leaks(), await connector.connect():
            pass
    assert log.errnos() == {errno.ETIMEDOUT}
    assert 0.3 <= log[0].duration < 5


async def test_the_systems_resolver() -> None:
    """The real one, in its thread, and whichever address of localhost the server has."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        async with no_leaks():
            conn = await open_tcp_connection("localhost", server.getsockname()[1])
            async with conn:
                assert conn.peer_address == server.getsockname()


# -- dead IPv6, good IPv4 (47)


async def test_dead_ipv6(own_network: None) -> None:
    """A host whose IPv6 leads into nothing is reached by IPv4 within 300 ms more than by IPv4
    alone."""
    black_hole("2001:db8::/32")
    resolver = Resolver([])

    async def seconds(answer: list[str]) -> float:
        resolver.answer = answer
        log = Log()
        connector = Connector("server.invalid", server.getsockname()[1], on_attempt=log)
        async with await connector.connect() as stream:
            assert stream.socket.getpeername()[0] == "127.0.0.1"
        return log[0].duration

    with socket.create_server(("127.0.0.1", 0)) as server:
        async with no_leaks():
            alone = min([await seconds(["127.0.0.1"]) for _ in range(3)])
            dead = [f"2001:db8::{number}" for number in range(1, 5)]
            # The best of several: the promise is about the library, not about a busy machine.
            for _ in range(10):
                beside = await seconds([*dead, "127.0.0.1"])
                if beside < alone + 0.3:
                    break
    assert 0.25 <= beside < alone + 0.3


async def test_unreachable_ipv6(own_network: None) -> None:
    """Where IPv6 fails at once, IPv4 is tried at once."""
    resolver = Resolver(["2001:db8::1", "127.0.0.1"])
    with socket.create_server(("127.0.0.1", 0)) as server:
        log = Log()
        durations = []
        for _ in range(5):
            connector = Connector("server.invalid", server.getsockname()[1], on_attempt=log)
            async with await connector.connect():
                durations.append(log[-1].duration)
    assert resolver.asked == 5
    assert min(durations) < 0.2


# -- a connection to itself (48)


def assert_can_be_listened_on(address: tuple[str, int]) -> None:
    """A server can have the port, though it does not ask for one in TIME_WAIT."""
    with socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET) as server:
        server.bind(address)
        server.listen()


async def test_a_self_connect(own_network: None) -> None:
    """Where nobody listens on a port of the ephemeral range, the kernel can connect a socket with
    itself: that is refused, and leaves the port free for the server."""
    local_ports(40000, 40000)
    address = ("127.0.0.1", 40000)
    with socket.create_connection(address, timeout=5) as sock:
        assert sock.getsockname() == sock.getpeername(), "the kernel does not do it"
        reset(sock)
    async with no_leaks():
        for _ in range(3):
            with pytest.raises(ConnectError, match="to itself") as caught:
                await open_tcp_connection(*address)
            assert caught.value.errno == errno.ECONNREFUSED
            assert isinstance(caught.value.__cause__, ConnectionRefusedError)
            assert_can_be_listened_on(address)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_a_self_connect_by_local_address(host: str, own_network: None) -> None:
    """The same where the port is asked for as our own."""
    address = (host, 40000)
    with pytest.raises(ConnectError, match="to itself"):
        await open_tcp_connection(*address, local_address=address)
    assert_can_be_listened_on(address)


async def test_the_server_comes_after_self_connects(own_network: None) -> None:
    """A client that tries all the time does not keep its own server from starting."""
    local_ports(40000, 40001)
    address = ("127.0.0.1", 40000)
    log = Log()
    connector = Connector(*address, backoff=SOON, on_attempt=log)
    async with trio.open_nursery() as nursery:

        async def start_server() -> None:
            await until(lambda: len(log) >= 20)
            # Between two attempts: the client waits.
            server.bind(address)
            server.listen()

        with socket.socket() as server:
            nursery.start_soon(start_server)
            async with await connector.connect() as stream:
                assert stream.socket.getsockname() != stream.socket.getpeername() == address
    assert any("itself" in str(attempt) for attempt in log)
    assert log.errnos() == {errno.ECONNREFUSED}


# -- no address, no port (49)


async def test_no_local_port_is_free(own_network: None) -> None:
    """All ports for our end are taken: retried, and connected once one comes free."""
    local_ports(40000, 40001)
    log = Log()
    with socket.create_server(("127.0.0.1", 30000)) as server:
        address = server.getsockname()
        taken = [socket.create_connection(address) for _ in range(2)]
        connector = Connector(*address, backoff=SOON, on_attempt=log)
        async with no_leaks():
            async with trio.open_nursery() as nursery:

                async def free_one() -> None:
                    await failed_attempts(log, 3)
                    reset(taken[0])

                nursery.start_soon(free_one)
                with trio.fail_after(20):
                    stream = await connector.connect()
                await stream.aclose()
            # The one that was freed in between stood for it.
            taken[0] = socket.socket()
        for sock in taken:
            sock.close()
    assert log.errnos() == {errno.EADDRNOTAVAIL}


async def test_a_local_address_takes_no_port_of_its_own(own_network: None) -> None:
    """With `local_address` and no port, one port of ours serves several servers."""
    local_ports(40000, 40000)
    with ExitStack() as stack:
        for port in range(30000, 30005):
            stack.enter_context(socket.create_server(("127.0.0.1", port)))
        for port in range(30000, 30005):
            connector = Connector("127.0.0.1", port, local_address="127.0.0.2", retry=False)
            stream = await connector.connect()
            stack.enter_context(closing(stream.socket))
            assert stream.socket.getsockname() == ("127.0.0.2", 40000)


async def test_an_address_that_is_not_ours(own_network: None) -> None:
    """A local address that the machine does not have may come: retried until it does."""
    log = Log()
    with socket.create_server(("127.0.0.1", 0)) as server:
        connector = Connector(
            *server.getsockname(), local_address="198.18.0.1", backoff=SOON, on_attempt=log
        )
        async with trio.open_nursery() as nursery:

            async def come() -> None:
                await failed_attempts(log, 3)
                ip("addr", "add", "198.18.0.1/32", "dev", "lo")

            nursery.start_soon(come)
            async with await connector.connect() as stream:
                assert stream.socket.getsockname()[0] == "198.18.0.1"
    assert log.errnos() == {errno.EADDRNOTAVAIL}
    assert "local address 198.18.0.1" in str(log[0])


async def test_a_local_port_in_use() -> None:
    """A local port that somebody has is waited for, too."""
    log = Log()
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        ours = holder.getsockname()
        connector = Connector(
            *server.getsockname(), local_address=ours, backoff=SOON, on_attempt=log
        )
        async with trio.open_nursery() as nursery:

            async def leave() -> None:
                await failed_attempts(log, 3)
                holder.close()

            nursery.start_soon(leave)
            async with await connector.connect() as stream:
                assert stream.socket.getsockname() == ours
    assert log.errnos() == {errno.EADDRINUSE}


# -- no descriptor


async def test_no_descriptor_is_free() -> None:
    """EMFILE is retried, and connected once a descriptor comes free."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    log = Log()

    def on_attempt(attempt: ConnectAttempt) -> None:
        log(attempt)
        if attempt.number == 3:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    with socket.create_server(("127.0.0.1", 0)) as server:
        connector = Connector(*server.getsockname(), backoff=SOON, on_attempt=on_attempt)
        async with no_leaks():
            try:
                # What is open stays open; nothing can be opened.
                resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
                stream = await connector.connect()
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            await stream.aclose()
    assert len(log) == 4
    assert log.errnos() == {errno.EMFILE}


# -- Unix sockets


async def test_a_unix_server_that_comes_late(tmp_path: Path) -> None:
    """No such path, then a path where nobody listens: retried until somebody does."""
    path = str(tmp_path / "socket")
    log = Log()
    connector = Connector(path=path, backoff=SOON, on_attempt=log)
    async with no_leaks(), trio.open_nursery() as nursery:

        async def start_server() -> None:
            await failed_attempts(log, 2)
            server.bind(path)
            await until(lambda: errno.ECONNREFUSED in log.errnos())
            server.listen()

        with socket.socket(socket.AF_UNIX) as server:
            nursery.start_soon(start_server)
            async with await connector.connect():
                pass
    assert log.errnos() == {errno.ENOENT, errno.ECONNREFUSED}


async def test_a_unix_socket_without_permission(tmp_path: Path) -> None:
    """A socket that we may not use is given up at once."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become somebody else")
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        path.chmod(0o600)
        connector = Connector(path=path)
        os.seteuid(65534)
        try:
            with pytest.raises(ConnectError) as caught:
                await connector.connect()
        finally:
            os.seteuid(0)
        assert caught.value.errno == errno.EACCES
        assert len(caught.value.attempts) == 1
        async with await connector.connect():
            pass


async def test_a_unix_socket_of_another_type(tmp_path: Path) -> None:
    """A datagram socket there will not do, today or tomorrow."""
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(path))
        with pytest.raises(ConnectError) as caught:
            await Connector(path=path).connect()
    assert caught.value.errno == errno.EPROTOTYPE


# -- what cannot pass, from the real kernel


@pytest.mark.parametrize(
    ("host", "number"),
    [("198.18.0.1", errno.EACCES), ("fe80::1", errno.EINVAL)],
    ids=["a route that is prohibited", "link-local without its link"],
)
async def test_a_final_error(host: str, number: int, own_network: None) -> None:
    """It ends the connect at once."""
    ip("route", "add", "prohibit", "198.18.0.0/15")
    with trio.fail_after(20), pytest.raises(ConnectError) as caught:
        await Connector(host, 80).connect()
    assert caught.value.errno == number
    assert len(caught.value.attempts) == 1


# -- stop and cancellation (50)


@pytest.mark.parametrize("phase", ["connecting", "backoff"])
@pytest.mark.parametrize("how", ["stop", "cancel"])
async def test_ended_with_real_sockets(phase: str, how: str) -> None:
    """Ended in a real attempt or in a real backoff, it leaves no descriptor and no task."""
    async with no_leaks():
        with full_backlog() as hanging, not_listening() as refusing:
            address = hanging if phase == "connecting" else refusing.getsockname()
            connector = Connector(*address, backoff=[1000], connect_timeout=None)
            async with trio.open_nursery() as nursery:

                async def end() -> None:
                    state = "CONNECTING" if phase == "connecting" else "WAITING"
                    await until(lambda: connector.state.name == state)
                    await trio.testing.wait_all_tasks_blocked()
                    if how == "stop":
                        connector.stop()
                    else:
                        nursery.cancel_scope.cancel()

                nursery.start_soon(end)
                if how == "stop":
                    with pytest.raises(trio.ClosedResourceError):
                        await connector.connect()
                else:
                    await connector.connect()
    assert connector.attempts == (phase == "backoff")
