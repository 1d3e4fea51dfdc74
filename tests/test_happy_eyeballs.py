"""One connection to a host of several addresses: their order, their timing, nothing left open."""

from __future__ import annotations

import errno
import gc
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.conftest import cancelled_after, no_leaks
from tests.fake_network import CONNECTED, HANGS, Answer, FakeNetwork, Resolver, failing
from trioreactor import SocketOptions
from trioreactor.happy_eyeballs import ATTEMPT_DELAY, connect_tcp, connect_unix

pytestmark = pytest.mark.pure

V4 = ["192.0.2.1", "192.0.2.2", "192.0.2.3"]
V6 = ["2001:db8::1", "2001:db8::2", "2001:db8::3"]


def network_with(addresses: list[str], **answers: Answer) -> FakeNetwork:
    """One name, "host"; all its addresses hang but for those named."""
    network = FakeNetwork()
    network.names["host"] = addresses
    for address in addresses:
        network.answers[address, 80] = [HANGS]
    return network


def tried(network: FakeNetwork) -> list[str]:
    """Whom it has connected to, in order."""
    return [address[0] for _, address in network.tried]


def times(network: FakeNetwork) -> list[float]:
    """When."""
    return [time for time, _ in network.tried]


# -- order


@pytest.mark.parametrize(
    ("resolved", "order"),
    [
        (V6 + V4, [V6[0], V4[0], V6[1], V4[1], V6[2], V4[2]]),
        (V4 + V6, [V4[0], V6[0], V4[1], V6[1], V4[2], V6[2]]),
        ([V6[0], V6[1], V6[2], V4[0]], [V6[0], V4[0], V6[1], V6[2]]),
        ([V4[0], V6[0], V6[1]], [V4[0], V6[0], V6[1]]),
        ([V4[2], V4[0], V4[1]], [V4[2], V4[0], V4[1]]),
        ([V4[0], V6[0], V4[0], V6[0], V4[1]], [V4[0], V6[0], V4[1]]),
    ],
    ids=["6 first", "4 first", "one of 4", "one of 4 first", "one family", "duplicates"],
)
async def test_families_take_turns(
    resolved: list[str], order: list[str], autojump_clock: trio.testing.MockClock
) -> None:
    """The resolver's order and first family count, but the families take turns; an address that is
    named twice is tried once."""
    network = FakeNetwork()
    network.names["host"] = resolved
    with pytest.raises(ExceptionGroup) as caught:
        await connect_tcp("host", 80)
    assert tried(network) == order
    assert len(caught.value.exceptions) == len(order)
    assert network.open == []


# -- timing


async def test_the_next_after_its_time(autojump_clock: trio.testing.MockClock) -> None:
    """An address that does not answer has 250 ms before the next is tried beside it, and may still
    win."""
    network = network_with(V4)
    network.answers[V4[0], 80] = [Answer(after=0.625)]
    stream = await connect_tcp("host", 80)
    assert times(network) == [0, 0.25, 0.5]
    assert ATTEMPT_DELAY == 0.25
    assert trio.current_time() == 0.625
    assert stream.socket.getpeername() == (V4[0], 80)
    assert network.open == [stream.socket]


async def test_the_next_at_once_after_a_failure(autojump_clock: trio.testing.MockClock) -> None:
    """An address that fails gives way to the next at once."""
    network = network_with(V4)
    network.answers[V4[0], 80] = [failing(errno.ECONNREFUSED, after=0.125)]
    network.answers[V4[1], 80] = [failing(errno.EHOSTUNREACH)]
    network.answers[V4[2], 80] = [Answer(after=1)]
    stream = await connect_tcp("host", 80)
    assert times(network) == [0, 0.125, 0.125]
    assert trio.current_time() == 1.125
    assert network.open == [stream.socket]


async def test_a_failure_gives_way_to_one_only(autojump_clock: trio.testing.MockClock) -> None:
    """An old attempt's failure does not take the newest one's time from it."""
    network = network_with(V4)
    network.answers[V4[0], 80] = [failing(errno.ECONNREFUSED, after=0.375)]
    network.answers[V4[2], 80] = [CONNECTED]
    await connect_tcp("host", 80)
    assert times(network) == [0, 0.25, 0.5]


async def test_the_winner_ends_the_race(autojump_clock: trio.testing.MockClock) -> None:
    """With a winner nobody else is tried, and those that still try are closed."""
    network = network_with(V6 + V4)
    network.answers[V4[0], 80] = [Answer(after=0.125)]
    stream = await connect_tcp("host", 80)
    assert tried(network) == [V6[0], V4[0]]
    assert trio.current_time() == 0.375
    assert stream.socket.getpeername() == (V4[0], 80)
    assert network.open == [stream.socket]


async def test_the_resolvers_time_is_its_own(autojump_clock: trio.testing.MockClock) -> None:
    """One address only: nothing waits for a second one."""
    network = network_with(V4[:1])
    network.answers[V4[0], 80] = [Answer(after=0.125)]
    await connect_tcp("host", 80)
    assert trio.current_time() == 0.125


async def test_two_winners_in_one_turn(autojump_clock: trio.testing.MockClock) -> None:
    """Of two that are connected in the same turn of the loop one is given, the other closed."""
    network = network_with(V4)
    gate = trio.Event()
    connected: list[float] = []

    def note() -> None:
        connected.append(trio.current_time())

    for address in V4[:2]:
        network.answers[address, 80] = [Answer(gate=gate, then=note)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(at, 0.375, gate.set)
        stream = await connect_tcp("host", 80)
    assert connected == [0.375, 0.375], "they were not connected in one turn"
    assert network.open == [stream.socket]


async def at(seconds: float, *fns: Callable[[], object]) -> None:
    """Call them all, at that time."""
    await trio.sleep(seconds)
    for fn in fns:
        fn()


# -- cancellation


@pytest.mark.parametrize("cancelled_first", [True, False])
async def test_a_winner_cancelled_in_the_same_turn(
    cancelled_first: bool, autojump_clock: trio.testing.MockClock
) -> None:
    """Cancelled in the turn in which the connection is made, it leaves nothing open."""
    network = network_with(V4)
    gate = trio.Event()
    network.answers[V4[0], 80] = [Answer(gate=gate)]
    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            fns = [scope.cancel, gate.set] if cancelled_first else [gate.set, scope.cancel]
            nursery.start_soon(at, 0.625, *fns)
            await connect_tcp("host", 80)
    assert scope.cancelled_caught
    assert len(network.sockets) == 3
    assert network.open == []


async def test_a_winner_that_cancels(autojump_clock: trio.testing.MockClock) -> None:
    """The same when the cancellation comes with the connection itself."""
    network = network_with(V4)
    with trio.CancelScope() as scope:
        network.answers[V4[0], 80] = [Answer(after=1, then=scope.cancel)]
        await connect_tcp("host", 80)
    assert scope.cancelled_caught
    assert network.open == []


async def test_real_races_cancelled_at_every_turn() -> None:
    """Racing real sockets, of which one wins and one is refused, it leaks nothing wherever it is
    cancelled."""
    Resolver(["127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4"])
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.3")
    port = listener.socket.getsockname()[1]
    async with listener:
        cancelled = 0
        while True:

            async def attempt() -> None:
                stream = await connect_tcp("host", port)
                stream.socket.close()

            async with no_leaks():
                if not await cancelled_after(cancelled, attempt):
                    break
            cancelled += 1
    assert cancelled > 3


# -- errors


async def test_one_address_one_error() -> None:
    """The error of the only address comes without a group, and says what it is about."""
    network = FakeNetwork()
    network.names["host"] = V6[:1]
    network.answers[V6[0], 80] = [failing(errno.EHOSTUNREACH)]
    with pytest.raises(OSError, match=r"\[2001:db8::1\]:80: No route to host") as caught:
        await connect_tcp("host", 80)
    assert caught.value.errno == errno.EHOSTUNREACH


async def test_a_group_of_errors() -> None:
    """When every address fails in its own way, each error is there, in the order they came."""
    network = FakeNetwork()
    network.names["host"] = V4[:2]
    network.answers[V4[0], 80] = [failing(errno.ENETUNREACH)]
    network.answers[V4[1], 80] = [failing(errno.EACCES)]
    with pytest.raises(ExceptionGroup) as caught:
        await connect_tcp("host", 80)
    assert [str(error) for error in caught.value.exceptions] == [
        f"[Errno {number}] {address}:80: {os.strerror(number)}"
        for number, address in ((errno.ENETUNREACH, V4[0]), (errno.EACCES, V4[1]))
    ]


async def test_no_addresses() -> None:
    """A resolver that knows the name, but no address, is an OSError like any other."""
    network = FakeNetwork()
    network.names["host"] = []
    with pytest.raises(OSError, match="host"):
        await connect_tcp("host", 80)


async def test_what_is_no_network_error() -> None:
    """What is neither an OSError nor expected comes out, and the sockets are closed."""
    network = FakeNetwork()
    network.names["host"] = V4
    network.answers[V4[0], 80] = [Answer(after=0.01, error=ZeroDivisionError("a bug"))]
    network.answers[V4[1], 80] = [HANGS]
    with pytest.raises(ExceptionGroup) as caught:
        await connect_tcp("host", 80)
    assert caught.group_contains(ZeroDivisionError)
    assert network.open == []


# -- our own end


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        ("192.0.2.200", V4),
        ("2001:db8::200", V6),
        ("fe80::1%1", V6),
    ],
)
async def test_local_address_restricts_the_family(ours: str, expected: list[str]) -> None:
    """Only addresses of its family are tried, each from it."""
    network = FakeNetwork()
    network.names["host"] = V6 + V4
    with pytest.raises(ExceptionGroup):
        await connect_tcp("host", 80, local_address=(ours, 0))
    assert tried(network) == expected
    assert [sock.bound for sock in network.sockets] == [(ours, 0)] * len(expected)


async def test_local_address_of_a_family_the_host_lacks() -> None:
    """A host without addresses of that family is an error that says so."""
    network = FakeNetwork()
    network.names["host"] = V4
    with pytest.raises(OSError, match=r"host has no address.*local_address='::1'") as caught:
        await connect_tcp("host", 80, local_address=("::1", 0))
    assert caught.value.errno == errno.EAFNOSUPPORT
    assert network.sockets == []


async def test_a_local_address_that_fails() -> None:
    """An error of binding names the local address, and the socket is closed."""
    network = FakeNetwork()
    network.bind_error = OSError(errno.EADDRINUSE, "in use")
    with pytest.raises(OSError, match=r"local address 127\.0\.0\.1:5000: Address") as caught:
        await connect_tcp(V4[0], 80, local_address=("127.0.0.1", 5000))
    assert caught.value.errno == errno.EADDRINUSE
    assert len(network.sockets) == 1
    assert network.open == []


async def test_a_real_local_address_and_port() -> None:
    """The other end sees the address and the port that were asked for."""
    with socket.socket() as free:
        free.bind(("127.0.0.2", 0))
        ours = free.getsockname()
    with socket.create_server(("127.0.0.1", 0)) as server:
        for local_address in (("127.0.0.2", 0), ours):
            stream = await connect_tcp(*server.getsockname(), local_address=local_address)
            async with stream:
                accepted, address = server.accept()
                accepted.close()
            assert address[0] == "127.0.0.2"
            assert local_address[1] in (0, address[1])


async def test_the_same_port_at_both_ends() -> None:
    """Two addresses may have the same port: that is no connection to itself."""
    network = FakeNetwork()
    network.answers[V4[0], 80] = [CONNECTED]
    stream = await connect_tcp(V4[0], 80, local_address=("192.0.2.200", 80))
    assert stream.socket.getsockname() == ("192.0.2.200", 80)
    with pytest.raises(ConnectionRefusedError, match="itself"):
        await connect_tcp(V4[0], 80, local_address=(V4[0], 80))
    assert network.open == [stream.socket]


async def test_a_local_port_in_time_wait() -> None:
    """The last connection from that port may still be in TIME_WAIT: the next one binds it."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_server(("127.0.0.1", 0)) as another,
        socket.socket() as free,
    ):
        free.bind(("127.0.0.2", 0))
        ours = free.getsockname()
        free.close()
        stream = await connect_tcp(*server.getsockname(), local_address=ours)
        accepted, _ = server.accept()
        # We close first, so TIME_WAIT is ours.
        await stream.aclose()
        assert accepted.recv(1) == b""
        accepted.close()
        with socket.socket() as unprepared, pytest.raises(OSError, match="in use"):
            unprepared.bind(ours)
        async with await connect_tcp(*another.getsockname(), local_address=ours) as stream:
            assert stream.socket.getsockname() == ours


@pytest.mark.skipif(
    not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the option's name is known on Linux only"
)
async def test_a_local_address_uses_up_no_port() -> None:
    """With an address and no port the kernel chooses the port at connect, knowing the other end,
    so one port serves many ends."""
    network = FakeNetwork()
    await_at_connect = getattr(socket, "IP_BIND_ADDRESS_NO_PORT", 24)
    network.answers[V4[0], 80] = [CONNECTED]
    await connect_tcp(V4[0], 80, local_address=("127.0.0.1", 0))
    (sock,) = network.sockets
    call = ("setsockopt", socket.IPPROTO_IP, await_at_connect, 1)
    assert sock.calls.index(call) < sock.calls.index(("bind", ("127.0.0.1", 0)))
    assert not any(call[:3:2] == ("setsockopt", socket.SO_REUSEADDR) for call in sock.calls)


# -- the sockets


async def test_options_come_before_connect() -> None:
    """The window scale is agreed in the handshake: buffers are set before it, binding too."""
    network = FakeNetwork()
    network.answers[V4[0], 80] = [CONNECTED]
    options = SocketOptions(receive_buffer=4096, send_buffer=8192, keepalive=False, no_delay=False)
    await connect_tcp(V4[0], 80, local_address=("127.0.0.1", 5000), socket_options=options)
    (sock,) = network.sockets
    before = sock.calls[: sock.calls.index(("connect", (V4[0], 80)))]
    for level, option, value in (
        (socket.SOL_SOCKET, socket.SO_RCVBUF, 4096),
        (socket.SOL_SOCKET, socket.SO_SNDBUF, 8192),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, False),
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, False),
        (socket.SOL_SOCKET, socket.SO_REUSEADDR, 1),
    ):
        assert ("setsockopt", level, option, value) in before
    assert ("bind", ("127.0.0.1", 5000)) in before


async def test_what_trio_would_set_is_not_set() -> None:
    """The options are the user's, also where trio's stream sets its own."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        for no_delay in (False, True):
            options = SocketOptions(no_delay=no_delay)
            stream = await connect_tcp(*server.getsockname(), socket_options=options)
            async with stream:
                assert bool(stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)) is no_delay


@pytest.mark.parametrize(
    "break_it",
    [
        lambda path: None,
        lambda path: path.write_text("a file"),
        lambda path: path.mkdir(),
    ],
    ids=["missing", "a file", "a directory"],
)
async def test_a_unix_path_that_fails(break_it: Callable[[Path], object], tmp_path: Path) -> None:
    """The error says the path, and nothing is left open."""
    path = tmp_path / "socket"
    break_it(path)
    async with no_leaks():
        with pytest.raises(OSError, match=str(path)):
            await connect_unix(str(path))


async def test_a_unix_socket(tmp_path: Path) -> None:
    """Connected by its path, cancelled nowhere with a leak."""
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen(100)
        cancelled = 0
        while True:

            async def attempt() -> None:
                stream = await connect_unix(path)
                stream.socket.close()

            async with no_leaks():
                if not await cancelled_after(cancelled, attempt):
                    break
            cancelled += 1
        assert cancelled
        async with await connect_unix(path) as stream:
            assert stream.socket.getpeername() == path


async def test_a_unix_listener_whose_backlog_is_full(tmp_path: Path) -> None:
    """A non-blocking connect to it is not under way but refused, and no socket comes out of it that
    is not connected. A peer that is gone already is no such thing."""
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(0)
        first = await connect_unix(path)
        async with no_leaks():
            with pytest.raises(BlockingIOError, match="socket: ") as caught:
                await connect_unix(path)
        assert caught.value.errno == errno.EAGAIN
        listener.accept()[0].close()
        assert await first.receive_some() == b""
        second = await connect_unix(path)
        await first.aclose()
        await second.aclose()


async def test_a_race_leaves_no_garbage() -> None:
    """A first address that refuses and a second that wins leave nothing to the cycle collector."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        Resolver(["127.0.0.2", "127.0.0.1"])
        # Caches fill at the first time.
        await (await connect_tcp("host", port)).aclose()
        gc.collect()
        gc.disable()
        try:
            for _ in range(5):
                await (await connect_tcp("host", port)).aclose()
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            left = [thing for thing in gc.garbage if isinstance(thing, OSError)]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
        assert left == []
