"""TcpClient: staying connected, and everything one can do about it meanwhile."""

from __future__ import annotations

import gc
import logging
import socket
import weakref
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.clients import AT_ONCE, client_to, settled
from tests.conftest import (
    accepted,
    address_of,
    echo,
    everything,
    fill,
    no_leaks,
    refusing,
    reset,
    unanswering,
)
from trioreactor import (
    Backoff,
    Callbacks,
    CloseReason,
    ConnectAttempt,
    ConnectError,
    ConnectionState,
    NotConnected,
    SendBufferFull,
    SocketOptions,
    TcpClient,
    TcpConnection,
    Timeouts,
    Watermarks,
)
from trioreactor.connection_callbacks import Handler


async def until_draining(conn: TcpConnection) -> None:
    """A handler that stays, and ends when it is asked to."""
    await conn.draining.wait()


async def never_ends(conn: TcpConnection) -> None:
    """A handler that has to be cancelled."""
    await trio.sleep_forever()


# -- what it is made of


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({}, TypeError),
        ({"host": "127.0.0.1"}, TypeError),
        ({"port": 80}, TypeError),
        ({"host": "127.0.0.1", "port": 80, "path": "/run/x"}, TypeError),
        ({"endpoints": []}, ValueError),
        ({"host": "127.0.0.1", "port": 0}, ValueError),
        ({"host": "127.0.0.1", "port": 80, "handler": "echo"}, TypeError),
        ({"host": "127.0.0.1", "port": 80, "backoff": 1.0}, TypeError),
        ({"host": "127.0.0.1", "port": 80, "connect_timeout": 0}, ValueError),
        ({"host": "127.0.0.1", "port": 80, "max_attempts": 0}, ValueError),
        ({"host": "127.0.0.1", "port": 80, "on_attempt": 1}, TypeError),
        ({"host": "127.0.0.1", "port": 80, "local_address": "here"}, ValueError),
        ({"host": "127.0.0.1", "port": 80, "chooser": "best"}, ValueError),
        ({"host": "127.0.0.1", "port": 80, "colour": "red"}, TypeError),
    ],
)
def test_wrong_options_are_refused_at_construction(
    wrong: dict[str, Any], error: type[Exception]
) -> None:
    """What cannot be meant is refused when the client is made, not when it connects."""
    with pytest.raises(error):
        TcpClient(**wrong)


async def test_names(listener: trio.SocketListener) -> None:
    """Connections are named {client}-{ip}:{port}#{n}, counted over all of the client's life."""
    host, port = address_of(listener)
    client = client_to(listener, name="feed")
    names = []

    async def handler(conn: TcpConnection) -> None:
        names.append(conn.name)
        assert conn.name in repr(client)
        if len(names) % 2 == 0:
            client.disconnect()

    await client.run(handler)
    await client.run(handler)
    assert names == [f"feed-{host}:{port}#{number}" for number in (1, 2, 3, 4)]
    assert "feed" in repr(client)
    assert "#4" not in repr(client)
    assert client_to(listener).name == "client"


async def test_where_to(listener: trio.SocketListener, tmp_path: Path) -> None:
    """A Unix path and several endpoints do as host and port do; names say which it was."""
    path = str(tmp_path / "socket")
    names = []

    async def handler(conn: TcpConnection) -> None:
        names.append(conn.name)
        client.disconnect()

    with trio.socket.socket(trio.socket.AF_UNIX) as unix, refusing() as refused:
        await unix.bind(path)
        unix.listen(10)
        client = TcpClient(path=path)
        await client.run(handler)
        client = TcpClient(endpoints=[refused.getsockname(), path, address_of(listener)])
        await client.run(handler)
        client = TcpClient(
            endpoints=[path, address_of(listener)], chooser=lambda places: places[-1]
        )
        await client.run(handler)
    host, port = address_of(listener)
    assert names == [f"client-{path}#1", f"client-{path}#1", f"client-{host}:{port}#1"]


async def test_options_reach_the_connections(
    listener: trio.SocketListener, autojump_clock: MockClock
) -> None:
    """Watermarks, timeouts and socket options are each connection's."""
    client = client_to(
        listener,
        watermarks=Watermarks(high=2048, low=1024, limit=4096),
        timeouts=Timeouts(write_stall=7.0),
        socket_options=SocketOptions(no_delay=False, keepalive=False, send_buffer=4096),
        retry=False,
    )
    async with no_leaks():
        async for conn in client:
            assert not conn.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert not conn.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert conn.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 2 * 4096
            stream = await accepted(listener)
            await fill(conn, 1024)
            assert 2048 < conn.buffered <= 4096
            with pytest.raises(SendBufferFull):
                conn.send(bytes(4096))
        await stream.aclose()
        async for conn in client:
            stream = await accepted(listener)
            begun = trio.current_time()
            await fill(conn, 1024)
            await conn.wait_closed()
            assert conn.close_reason is CloseReason.WRITE_STALLED
            assert trio.current_time() - begun == 7.0
        await stream.aclose()


async def test_on_attempt(listener: trio.SocketListener) -> None:
    """The caller's on_attempt hears of every attempt, failed or not."""
    attempts: list[ConnectAttempt] = []
    with refusing() as refused:
        client = TcpClient(
            endpoints=[refused.getsockname(), address_of(listener)],
            on_attempt=attempts.append,
            backoff=AT_ONCE,
        )
        async with client:
            await client.wait_connected()
    assert [attempt.endpoint for attempt in attempts] == [
        refused_address := attempts[0].endpoint,
        address_of(listener),
    ]
    assert refused_address != address_of(listener)
    assert isinstance(attempts[0].error, ConnectionRefusedError)
    assert attempts[1].error is None
    assert attempts[1].address == address_of(listener)


@pytest.mark.parametrize("error", [KeyError, trio.ClosedResourceError, trio.BrokenResourceError])
@pytest.mark.parametrize("succeeds", [False, True])
async def test_what_on_attempt_raises_leaves_run(
    succeeds: bool, error: type[Exception], listener: trio.SocketListener
) -> None:
    """Whatever it raises, after a success or a failure: it leaves, and nothing stays open."""

    def fail(attempt: ConnectAttempt) -> None:
        raise error("mine")

    with refusing() as refused:
        where = address_of(listener) if succeeds else refused.getsockname()
        async with no_leaks():
            client = TcpClient(*where, echo, on_attempt=fail, backoff=AT_ONCE)
            with pytest.raises(error, match="mine"):
                await client.run()
            assert client.statistics().opened == 0
            with pytest.raises(trio.ClosedResourceError):
                client.send(b"x")


async def test_statistics(listener: trio.SocketListener) -> None:
    """Attempts, failures, connections, their ends and their bytes; ended ones stay counted."""

    async def handler(conn: TcpConnection) -> None:
        await conn.send_all(b"hello")
        while await conn.receive_some():
            pass
        if conn.name.endswith("#2"):
            client.disconnect()

    with refusing() as refused:
        client = TcpClient(endpoints=[refused.getsockname(), address_of(listener)], backoff=AT_ONCE)
        async with no_leaks(), trio.open_nursery() as nursery:
            nursery.start_soon(client.run, handler)
            for number in (1, 2):
                async with await accepted(listener) as stream:
                    assert await stream.receive_some() == b"hello"
                    await stream.send_all(b"bye")
                    await settled()
                    now = client.statistics()
                    assert (now.opened, now.active, now.attempts) == (number, 1, 2 * number)
                    assert now.bytes_sent == 5 * number
                    assert now.bytes_received == 3 * number
                    assert sum(now.closed.values()) == number - 1
        end = client.statistics()
        assert (end.opened, end.active, end.attempts) == (2, 0, 4)
        assert end.closed == {CloseReason.PEER_EOF: 2}
        assert end.failures == {"ECONNREFUSED": 2}
        assert (end.bytes_sent, end.bytes_received) == (10, 6)


async def test_logs(listener: trio.SocketListener, caplog: pytest.LogCaptureFixture) -> None:
    """A connection's end is news; an attempt that failed is a warning if another follows."""
    caplog.set_level(logging.INFO)

    async def handler(conn: TcpConnection) -> None:
        client.disconnect()

    with refusing() as refused:
        client = TcpClient(endpoints=[refused.getsockname(), address_of(listener)], backoff=AT_ONCE)
        await client.run(handler)
    warning, connected, ended = caplog.records
    assert (warning.name, warning.levelname) == ("trioreactor.connector", "WARNING")
    assert "Connection refused" in warning.getMessage()
    assert (connected.name, connected.levelname) == ("trioreactor.connector", "INFO")
    assert (ended.name, ended.levelname) == ("trioreactor.client", "INFO")
    assert "#1" in ended.getMessage()
    assert "local_close" in ended.getMessage()


# -- wait_connected


async def test_wait_connected_counts_from_the_call(autojump_clock: MockClock) -> None:
    """ConnectError after so many failures since the call; the client goes on all the same."""
    with refusing() as refused:
        client = TcpClient(*refused.getsockname(), echo, backoff=[1.0] * 100)
        async with no_leaks(), trio.open_nursery() as nursery:
            nursery.start_soon(client.run)
            # Three have failed when the call comes.
            await trio.sleep(2.5)
            with pytest.raises(ConnectError) as raised:
                await client.wait_connected(max_failures=2)
            assert trio.current_time() == 4.0
            assert [attempt.number for attempt in raised.value.attempts] == [4, 5]
            assert isinstance(raised.value.__cause__, ConnectionRefusedError)
            with pytest.raises(ConnectError):
                await client.wait_connected(1)
            assert trio.current_time() == 5.0
            refused.listen()
            conn = await client.wait_connected(1)
            assert trio.current_time() == 6.0
            assert client.connection is conn
            client.stop()


async def test_many_wait_and_each_has_its_own_patience(autojump_clock: MockClock) -> None:
    """Any number of tasks may wait; one's patience is not another's."""
    told: dict[object, float] = {}

    async def wait(patience: int | None) -> None:
        try:
            await client.wait_connected(patience)
        except ConnectError:
            told[patience] = trio.current_time()
        else:
            told["connected"] = trio.current_time()

    with refusing() as refused:
        client = TcpClient(*refused.getsockname(), echo, backoff=[1.0] * 100)
        async with trio.open_nursery() as nursery:
            for patience in (1, 2, 3, None):
                nursery.start_soon(wait, patience)
            await settled()
            nursery.start_soon(client.run)
            await trio.sleep(2.5)
            refused.listen()
            await trio.sleep(1)
            client.stop()
    assert told == {1: 0.0, 2: 1.0, 3: 2.0, "connected": 3.0}


async def test_wait_connected_more_failures_than_are_remembered(autojump_clock: MockClock) -> None:
    """A great patience is counted rightly, though only the last failures are told of."""
    with refusing() as refused:
        client = TcpClient(*refused.getsockname(), echo, backoff=[1.0] * 100)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.run)
            with pytest.raises(ConnectError) as raised:
                await client.wait_connected(50)
            assert trio.current_time() == 49.0
            assert raised.value.attempts[-1].number == 50
            client.stop()


@pytest.mark.parametrize(("wrong", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError)])
async def test_wait_connected_wrong_patience(
    wrong: Any, error: type[Exception], listener: trio.SocketListener
) -> None:
    """A patience that is none is refused."""
    with pytest.raises(error, match="max_failures"):
        await client_to(listener).wait_connected(wrong)


async def test_wait_connected_before_run(listener: trio.SocketListener) -> None:
    """It may be waited for before the client is run, and is a checkpoint when there is one."""
    got = []

    async def wait() -> None:
        got.append(await client.wait_connected())

    client = client_to(listener, until_draining)
    async with no_leaks(), trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await settled()
        assert not got
        nursery.start_soon(client.run)
        await settled()
        assert got == [client.connection]
        with trio.testing.assert_checkpoints():
            assert await client.wait_connected() is got[0]
        client.disconnect()


@pytest.mark.parametrize("how", ["disconnect", "stop", "cancel", "retry"])
async def test_wait_connected_at_the_end(how: str, listener: trio.SocketListener) -> None:
    """ClosedResourceError when the client ends, and afterwards, until it is begun again."""
    told = []

    async def wait() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await client.wait_connected()
        told.append(True)

    async def gone(conn: TcpConnection) -> None:
        await conn.wait_eof()
        nursery.start_soon(wait)
        await settled()
        assert not told
        if how == "cancel":
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await settled()
        elif how == "retry":
            client.retry = False
        else:
            getattr(client, how)()

    client = client_to(listener)
    async with no_leaks():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.run, gone)
            await (await accepted(listener)).aclose()
        assert told == ([] if how == "cancel" else [True])
        await wait()


async def test_wait_connected_ends_at_stop_without_a_run(listener: trio.SocketListener) -> None:
    """A client that was stopped will never connect: whoever waits hears of it, run or not."""
    client = client_to(listener)

    async def wait() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await client.wait_connected()

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await settled()
            client.stop()
        await wait()


@pytest.mark.parametrize("how", ["eof", "broken", "closing"])
async def test_wait_connected_gives_none_that_has_had_its_day(
    how: str, listener: trio.SocketListener
) -> None:
    """A connection at EOF, broken or closing is not handed out; the next one is."""

    async def handler(conn: TcpConnection) -> None:
        if not conn.name.endswith("#1"):
            await conn.draining.wait()
            return
        if how == "eof":
            await conn.wait_eof()
        elif how == "broken":
            with pytest.raises(trio.BrokenResourceError):
                while True:
                    conn.send(b"x")
                    await settled()
        else:
            conn.shutdown()
        ready.set()
        await go_on.wait()

    ready, go_on = trio.Event(), trio.Event()
    got = []

    async def wait() -> None:
        got.append(await client.wait_connected())

    client = client_to(listener)
    async with no_leaks(), trio.open_nursery() as nursery:
        nursery.start_soon(client.run, handler)
        stream = await accepted(listener)
        if how == "eof":
            await stream.aclose()
        elif how == "broken":
            # Unread input keeps a broken connection open.
            await stream.send_all(b"hello")
            reset(stream.socket)
        await ready.wait()
        nursery.start_soon(wait)
        await settled()
        assert not got
        go_on.set()
        with trio.fail_after(10):
            while not got:
                await trio.lowlevel.checkpoint()
        assert got[0].name.endswith("#2")
        client.disconnect()
        await stream.aclose()


# -- send, send_all


async def test_sending_without_a_connection(
    listener: trio.SocketListener, autojump_clock: MockClock
) -> None:
    """Between connections sending raises, and none of it ever reaches the next one."""
    client = client_to(listener, TcpConnection.wait_eof, backoff=[5.0] * 10)
    async with no_leaks(), trio.open_nursery() as nursery:
        with pytest.raises(NotConnected):
            client.send(b"before")
        nursery.start_soon(client.run)
        first = await client.wait_connected()
        stream = await accepted(listener)
        queued = await fill(first)
        await stream.aclose()
        await first.wait_closed()
        assert first.buffered == 0 < queued
        with pytest.raises(NotConnected) as raised:
            client.send(b"between")
        assert isinstance(raised.value, trio.BrokenResourceError)
        with pytest.raises(NotConnected):
            await client.send_all(b"between")
        await client.wait_connected()
        async with await accepted(listener) as stream:
            client.send(b"after")
            client.disconnect()
            assert await everything(stream) == b"after"


async def test_not_connected_says_why(listener: trio.SocketListener) -> None:
    """While attempts fail, the error tells of the last one; a success makes it forget them."""
    with refusing() as refused:
        places = [refused.getsockname(), address_of(listener)]
        async with TcpClient(endpoints=places, backoff=[3600.0]) as client:
            await client.wait_connected()
            await (await accepted(listener)).aclose()
            await settled()
            with pytest.raises(NotConnected) as raised:
                client.send(b"x")
            assert "refused" not in str(raised.value)
        client = TcpClient(*refused.getsockname(), backoff=[3600.0])
        async with client:
            with pytest.raises(ConnectError):
                await client.wait_connected(1)
            with pytest.raises(NotConnected, match="Connection refused"):
                client.send(b"x")


@pytest.mark.parametrize("how", ["disconnect", "stop"])
async def test_sending_after_the_end(how: str, listener: trio.SocketListener) -> None:
    """ClosedResourceError as soon as it has been told to end, and ever after."""
    client = client_to(listener, until_draining)
    async with no_leaks(), trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        await client.wait_connected()
        getattr(client, how)()
        for _ in range(2):
            with pytest.raises(trio.ClosedResourceError):
                client.send(b"x")
            with pytest.raises(trio.ClosedResourceError):
                await client.send_all(b"x")
            await settled()


# -- disconnect


async def test_disconnect_while_it_connects(autojump_clock: MockClock) -> None:
    """An attempt that nobody answers is given up at once."""
    with unanswering() as where:
        client = TcpClient(*where, echo)
        async with no_leaks(), trio.open_nursery() as nursery:
            nursery.start_soon(client.run)
            await trio.sleep(3)
            client.disconnect()
        assert trio.current_time() == 3.0
        assert client.statistics().attempts == 0


@pytest.mark.parametrize("how", ["disconnect", "stop"])
async def test_ended_while_it_waits(how: str, autojump_clock: MockClock) -> None:
    """The backoff's delay is not waited out."""
    with refusing() as refused:
        client = TcpClient(*refused.getsockname(), echo, backoff=[100.0])
        async with no_leaks(), trio.open_nursery() as nursery:
            nursery.start_soon(client.run)
            await trio.sleep(3)
            with pytest.raises(NotConnected):
                client.send(b"x")
            getattr(client, how)()
            # At once, though its task has not run since.
            with pytest.raises(trio.ClosedResourceError):
                client.send(b"x")
        assert trio.current_time() == 3.0
        assert client.statistics().attempts == 1


@pytest.mark.parametrize("linger", [2.0, 30.0])
async def test_disconnect_while_connected(
    linger: float, listener: trio.SocketListener, autojump_clock: MockClock
) -> None:
    """The handler hears of it, the peer gets all that was queued and then EOF; a handler that
    stays is cancelled after `linger`, not sooner and not later.
    """
    heard: list[object] = []

    async def handler(conn: TcpConnection) -> None:
        heard.append(await fill(conn))
        await conn.draining.wait()
        heard.append(trio.current_time())
        try:
            await trio.sleep_forever()
        finally:
            heard.append(trio.current_time())

    client = client_to(listener, handler, timeouts=Timeouts(linger=linger))
    async with no_leaks(), trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        conn = await client.wait_connected()
        async with await accepted(listener) as stream:
            await trio.sleep(5)
            client.disconnect()
            assert conn.state is ConnectionState.DISCONNECTING
            got = await everything(stream)
            await trio.sleep_until(5 + linger - 0.001)
            assert heard == [len(got), 5.0]
            await trio.sleep(0.001)
            await settled()
            assert heard == [len(got), 5.0, 5 + linger]
    assert client.statistics().closed == {CloseReason.LOCAL_CLOSE: 1}


async def test_disconnect_without_linger_lets_the_handler_finish(
    listener: trio.SocketListener, autojump_clock: MockClock
) -> None:
    """With no linger the handler has all the time it wants."""

    async def handler(conn: TcpConnection) -> None:
        await conn.draining.wait()
        await trio.sleep(1000)
        assert await conn.receive_some() == b"answer"

    client = client_to(listener, handler, timeouts=Timeouts(linger=None))
    async with no_leaks(), trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        async with await accepted(listener) as stream:
            client.disconnect()
            assert await everything(stream) == b""
            await stream.send_all(b"answer")
            await trio.sleep(2000)
    assert trio.current_time() == 2000.0


async def test_disconnect_again(listener: trio.SocketListener, autojump_clock: MockClock) -> None:
    """It is idempotent: a later call gives no more time, and none that ended is disturbed."""
    client = client_to(listener, never_ends)
    async with no_leaks():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.run)
            async with await accepted(listener) as stream:
                for _ in range(4):
                    client.disconnect()
                    await trio.sleep(0.5)
                await settled()
                assert client.connection is None
                assert await everything(stream) == b""
        client.disconnect()
    assert trio.current_time() == 2.0
    assert client.statistics().closed == {CloseReason.LOCAL_CLOSE: 1}


async def test_disconnect_before_run_means_nothing(listener: trio.SocketListener) -> None:
    """It ends what goes on: what begins afterwards is not concerned."""
    client = client_to(listener, until_draining)
    client.disconnect()
    async with no_leaks(), trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        conn = await client.wait_connected()
        assert not conn.draining.is_set()
        client.disconnect()


async def test_disconnect_from_on_attempt(listener: trio.SocketListener) -> None:
    """Disconnected in the very turn that connected it: no connection comes of it."""
    client = client_to(listener, echo, on_attempt=lambda attempt: client.disconnect())
    async with no_leaks():
        with trio.fail_after(10):
            await client.run()
    assert client.statistics().opened == 0
    assert client.statistics().attempts == 1


async def test_run_again_waits_for_nothing(
    listener: trio.SocketListener, autojump_clock: MockClock
) -> None:
    """Our own end was no loss: a client that is run again connects at once. Its counters go on."""

    async def once(conn: TcpConnection) -> None:
        times.append(trio.current_time())
        client.disconnect()

    times: list[float] = []
    client = client_to(listener, once, backoff=[3.0] * 10)
    await client.run()
    await client.run()
    await trio.sleep(100)
    await client.run()
    assert times == [0.0, 0.0, 100.0]
    assert client.statistics().opened == 3


# -- stop


@pytest.mark.parametrize("handler", [never_ends, echo])
async def test_stop_while_connected(handler: Handler, listener: trio.SocketListener) -> None:
    """At once: the connection is closed, its handler cancelled, and nothing runs again."""
    client = client_to(listener, handler)
    async with no_leaks():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.run)
            conn = await client.wait_connected()
            client.stop()
            assert conn.state is ConnectionState.DISCONNECTED
            assert client.connection is None
        client.stop()
        assert client.statistics().closed == {CloseReason.FORCED: 1}
        await client.run()
        async for _ in client:
            raise AssertionError("it was stopped")
        async with client:
            with pytest.raises(trio.ClosedResourceError):
                await client.wait_connected()
        assert client.statistics().opened == 1


async def test_stop_before_run(listener: trio.SocketListener) -> None:
    """It is final: a run that comes later returns, and has not connected."""
    client = client_to(listener, echo)
    client.stop()
    async with no_leaks():
        await client.run()
        with trio.testing.assert_checkpoints():
            await client.run()
    assert client.statistics().attempts == 0
    with pytest.raises(trio.ClosedResourceError):
        client.send(b"x")


async def test_stop_while_it_connects(autojump_clock: MockClock) -> None:
    """An attempt that nobody answers is given up at once."""
    with unanswering() as where:
        client = TcpClient(*where, echo)
        async with no_leaks(), trio.open_nursery() as nursery:
            nursery.start_soon(client.run)
            await trio.sleep(3)
            client.stop()
        assert trio.current_time() == 3.0


async def test_stop_from_a_callback(listener: trio.SocketListener) -> None:
    """A message callback may stop the client, in the reactor."""
    client = client_to(listener, Callbacks(message=lambda conn, buffer: client.stop()))
    async with no_leaks(), trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        async with await accepted(listener) as stream:
            await stream.send_all(b"stop")
    assert client.statistics().closed == {CloseReason.FORCED: 1}


@pytest.mark.parametrize("delay", [0.0, 5.0])
@pytest.mark.parametrize("succeeds", [False, True])
async def test_stop_from_on_attempt(
    succeeds: bool, delay: float, listener: trio.SocketListener
) -> None:
    """After an attempt that failed or succeeded: run returns, and nothing stays open."""
    with refusing() as refused:
        where = address_of(listener) if succeeds else refused.getsockname()
        client = TcpClient(
            *where, echo, backoff=[delay] * 9, on_attempt=lambda attempt: client.stop()
        )
        async with no_leaks():
            with trio.fail_after(2):
                await client.run()
        assert client.statistics().attempts == 1
        assert client.statistics().opened == 0


# -- retry


async def test_no_retry_makes_one_connection(listener: trio.SocketListener) -> None:
    """With retry=False the first connection is the last, in each run."""
    client = client_to(listener, TcpConnection.wait_eof, retry=False)
    async with no_leaks():
        for number in (1, 2):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.run)
                await (await accepted(listener)).aclose()
            assert client.statistics().opened == number
    with refusing() as refused:
        client = TcpClient(*refused.getsockname(), echo, retry=False)
        with pytest.raises(ConnectError):
            await client.run()
        assert client.statistics().attempts == 1


async def test_retry_is_turned_off_while_connected(listener: trio.SocketListener) -> None:
    """The connection there is stays, and is the last one."""
    client = client_to(listener, TcpConnection.wait_eof)
    async with no_leaks(), trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        stream = await accepted(listener)
        assert client.retry
        client.retry = False
        await settled()
        assert client.connection is not None
        await stream.aclose()
    assert client.statistics().opened == 1
    assert not client.retry


@pytest.mark.parametrize("after", ["failure", "connection"])
async def test_retry_is_turned_off_while_it_waits(
    after: str, listener: trio.SocketListener, autojump_clock: MockClock
) -> None:
    """Nobody waits for the next attempt any more: ConnectError, at once."""

    async def turn_off() -> None:
        await trio.sleep(3)
        client.retry = False

    with refusing() as refused:
        if after == "failure":
            client = TcpClient(*refused.getsockname(), echo, backoff=[100.0])
        else:
            client = client_to(listener, TcpConnection.aclose, backoff=[100.0])
        async with no_leaks(), trio.open_nursery() as nursery:
            nursery.start_soon(turn_off)
            with pytest.raises(ConnectError):
                await client.run()
    assert trio.current_time() == 3.0


async def test_flapping_server(listener: trio.SocketListener, autojump_clock: MockClock) -> None:
    """One that accepts and closes is come back to ever more slowly, until a connection lasts."""
    times: list[float] = []
    lifetimes = iter([0, 0, 0, 20, 0, 0])

    async def handler(conn: TcpConnection) -> None:
        times.append(trio.current_time())
        await trio.sleep(next(lifetimes))
        if len(times) == 6:
            client.disconnect()

    backoff = Backoff(initial=1, jitter="none", reset_after=10)
    client = client_to(listener, handler, backoff=backoff)
    await client.run()
    # 1, 2, 4; then it lasts 20 seconds, and begins anew with 1, 2.
    assert times == [0.0, 1.0, 3.0, 7.0, 28.0, 30.0]


async def test_reset_backoff(listener: trio.SocketListener, autojump_clock: MockClock) -> None:
    """Who knows that the server works has the delays begin anew, and ends the one that runs."""
    times: list[float] = []

    async def handler(conn: TcpConnection) -> None:
        times.append(trio.current_time())
        if len(times) == 3:
            client.reset_backoff()

    client = client_to(listener, handler, backoff=Backoff(initial=1, jitter="none"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        # 0, 1, 3; reset; 4, 6, 10
        await trio.sleep(11)
        client.reset_backoff()
        await settled()
        client.stop()
    assert times == [0.0, 1.0, 3.0, 4.0, 6.0, 10.0, 11.0]


# -- no garbage


async def ends_by_itself(conn: TcpConnection) -> None:
    await conn.send_all(b"hello")


async def reads_to_the_end(conn: TcpConnection) -> None:
    async for _ in conn:
        pass


async def is_cancelled(conn: TcpConnection) -> None:
    conn.force_close()
    await trio.sleep_forever()


@pytest.mark.parametrize(
    "handler",
    [
        ends_by_itself,
        is_cancelled,
        reads_to_the_end,
        TcpConnection.wait_eof,
        Callbacks(message=lambda conn, buffer: buffer.discard(len(buffer))),
        None,
    ],
    ids=["returns", "cancelled", "reads", "waits", "callbacks", "block"],
)
@pytest.mark.parametrize("resets", [False, True])
async def test_ended_connections_are_freed_at_once(
    handler: Handler | None,
    resets: bool,
    listener: trio.SocketListener,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However they end, their reference counts free them: nothing is left to the collector."""
    refs: list[weakref.ref[TcpConnection]] = []

    def note(attempt: ConnectAttempt) -> None:
        # How many of the earlier ones live now, when the next is about to come.
        alive.append(sum(ref() is not None for ref in refs))

    alive: list[int] = []
    client = client_to(listener, handler, on_attempt=note)
    enter = client._enter

    def enter_and_note(stream: trio.SocketStream) -> TcpConnection:
        conn = enter(stream)
        refs.append(weakref.ref(conn))
        return conn

    monkeypatch.setattr(client, "_enter", enter_and_note)

    async def peer() -> None:
        while True:
            stream = await accepted(listener)
            if resets:
                reset(stream.socket)
            else:
                await stream.aclose()

    gc.collect()
    gc.disable()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peer)
            if handler is None:
                async with client:
                    await many(client)
            else:
                nursery.start_soon(client.run)
                await many(client)
                client.stop()
                await settled()
            nursery.cancel_scope.cancel()
        assert len(alive) >= 50
        # The last one has its name still in whoever waits for the next.
        assert max(alive) <= 1
        assert all(ref() is None for ref in refs)
    finally:
        gc.enable()


async def many(client: TcpClient) -> None:
    """Wait for many connections."""
    with trio.fail_after(20):
        while client.statistics().opened < 50:
            await trio.sleep(0.001)
