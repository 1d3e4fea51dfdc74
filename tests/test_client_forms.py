"""The three ways to use a TcpClient: run, the block and the loop; and what leaves each of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.clients import AT_ONCE, client_to, settled
from tests.conftest import (
    accepted,
    echo,
    everything,
    fill,
    no_leaks,
    refusing,
    reset,
)
from trioreactor import (
    Buffer,
    Callbacks,
    CloseReason,
    ConnectError,
    ConnectionState,
    FramedChannel,
    LineCodec,
    NotConnected,
    ProtocolError,
    TcpClient,
    TcpConnection,
)
from trioreactor.connection_callbacks import Handler


class Mine(Exception):
    """The user's own error."""


def mine() -> Mine:
    """One with a cause and a context, that are to stay what they are."""
    try:
        try:
            raise KeyError("context")
        except KeyError:
            raise Mine("own") from ValueError("cause")
    except Mine as error:
        return error


def check_mine(error: BaseException) -> None:
    """It came out as it went in."""
    assert type(error) is Mine
    assert isinstance(error.__cause__, ValueError)
    assert isinstance(error.__context__, KeyError)


# -- run(handler)


async def test_run_calls_the_handler_for_each_connection(listener: trio.SocketListener) -> None:
    """A handler that returns has its connection closed gracefully, and the next one is made."""
    conns: list[TcpConnection] = []

    async def handler(conn: TcpConnection) -> None:
        assert client.connection is conn
        conns.append(conn)
        conn.send(b"%d" % len(conns))
        if len(conns) == 3:
            client.disconnect()

    async with no_leaks():
        client = client_to(listener)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.run, handler)
            for number in (b"1", b"2", b"3"):
                async with await accepted(listener) as stream:
                    assert await everything(stream) == number
        assert client.connection is None
        assert client.statistics().closed == {CloseReason.LOCAL_CLOSE: 3}
        assert [conn.state for conn in conns] == [ConnectionState.DISCONNECTED] * 3
        assert [conn.handler_scope for conn in conns] == [None] * 3


async def test_handler_of_the_client_and_of_the_call(listener: trio.SocketListener) -> None:
    """The client's own handler serves, unless the call has one; with none there is a TypeError."""
    served = []

    async def own(conn: TcpConnection) -> None:
        served.append("own")
        client.disconnect()

    async def calls(conn: TcpConnection) -> None:
        served.append("call's")
        client.disconnect()

    client = client_to(listener, own)
    await client.run()
    await client.run(calls)
    await client.run()
    assert served == ["own", "call's", "own"]
    bare = client_to(listener)
    with pytest.raises(TypeError, match="handler"):
        await bare.run()
    # And that is not in the way of a run that has one.
    client = bare
    await bare.run(own)


async def test_callbacks_are_a_handler(listener: trio.SocketListener) -> None:
    """muduo's style: connection up, messages, connection down, for each connection."""
    heard: list[object] = []

    def connection(conn: TcpConnection) -> None:
        heard.append(conn.state)
        if conn.state is ConnectionState.CONNECTED:
            conn.send(b"hello")

    def message(conn: TcpConnection, buffer: Buffer) -> None:
        heard.append(buffer.take())
        if conn.name.endswith("#2"):
            client.disconnect()

    client = client_to(listener, Callbacks(message=message, connection=connection))
    async with no_leaks(), trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        for _ in range(2):
            async with await accepted(listener) as stream:
                assert await stream.receive_some(5) == b"hello"
                await stream.send_all(b"world")
    up, down = ConnectionState.CONNECTED, ConnectionState.DISCONNECTED
    assert heard == [up, b"world", down] * 2


@pytest.mark.parametrize("form", ["run", "block", "loop"])
async def test_an_error_of_the_handlers_own_leaves(
    form: str, listener: trio.SocketListener, caplog: pytest.LogCaptureFixture
) -> None:
    """It leaves as itself, the connection is closed with HANDLER_ERROR, nothing follows."""
    error = mine()

    async def handler(conn: TcpConnection) -> None:
        raise error

    client = client_to(listener, handler)
    async with no_leaks():
        with caplog.at_level(logging.WARNING), pytest.raises(Mine) as raised:
            with trio.fail_after(10):
                await use(client, form)
        assert raised.value is error
        check_mine(raised.value)
    assert client.statistics().closed == {CloseReason.HANDLER_ERROR: 1}
    # It is raised, so it need not be logged as well.
    assert not caplog.records


async def use(client: TcpClient, form: str) -> None:
    """Each form with the client's own handler, until that is over."""
    assert client._handler is not None
    if form == "run":
        await client.run()
    elif form == "block":
        async with client:
            with suppress(trio.ClosedResourceError):
                while True:
                    conn = await client.wait_connected()
                    await conn.wait_closed()
    else:
        async for conn in client:
            async with client.session(conn):
                await client._handler(conn)


@pytest.mark.parametrize("form", ["run", "block", "loop"])
async def test_a_reset_in_the_handler(form: str, listener: trio.SocketListener) -> None:
    """That the peer broke the connection is no error: the next connection follows."""
    heard: list[object] = []

    async def handler(conn: TcpConnection) -> None:
        try:
            heard.append(await conn.receive_some())
        except BaseException as error:
            heard.append(type(error))
            raise
        client.disconnect()

    client = client_to(listener, handler)
    async with no_leaks(), trio.open_nursery() as nursery:
        nursery.start_soon(use, client, form)
        reset((await accepted(listener)).socket)
        async with await accepted(listener) as stream:
            await stream.send_all(b"hello")
            assert await everything(stream) == b""
    assert heard == [trio.BrokenResourceError, b"hello"]
    closed = client.statistics().closed
    assert closed[CloseReason.PEER_RESET] == 1


async def test_a_peer_that_breaks_the_protocol(
    listener: trio.SocketListener, caplog: pytest.LogCaptureFixture
) -> None:
    """A ProtocolError is one warning on trioreactor.client, and the next connection follows."""

    async def handler(conn: TcpConnection) -> None:
        if conn.name.endswith("#1"):
            raise ProtocolError("a frame of minus one byte")
        client.disconnect()

    client = client_to(listener)
    with caplog.at_level(logging.WARNING):
        await client.run(handler)
    (record,) = [record for record in caplog.records if record.name == "trioreactor.client"]
    assert record.levelno == logging.WARNING
    assert "#1" in record.getMessage()
    assert "a frame of minus one byte" in record.getMessage()
    closed = client.statistics().closed
    assert closed == {CloseReason.PROTOCOL_ERROR: 1, CloseReason.LOCAL_CLOSE: 1}


@pytest.mark.parametrize("form", ["run", "session"])
async def test_a_login_that_nobody_answers(form: str, listener: trio.SocketListener) -> None:
    """A channel that ends where a message was expected leads to the next connection, in silence."""
    tried: list[str] = []

    async def log_in(conn: TcpConnection) -> None:
        tried.append(conn.name)
        channel = FramedChannel(conn, LineCodec())
        await channel.send("hello")
        if len(tried) == 3:
            client.disconnect()
        await channel.receive()

    async def hang_up() -> None:
        for turn in range(3):
            stream = await listener.accept()
            assert await stream.receive_some() == b"hello\n"
            if turn < 2:
                await stream.aclose()
            else:
                assert await stream.receive_some() == b""
                await stream.aclose()

    client = client_to(listener)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hang_up)
        if form == "run":
            await client.run(log_in)
        else:
            async for conn in client:
                async with client.session(conn):
                    await log_in(conn)
    assert len(tried) == 3
    closed = client.statistics().closed
    assert closed == {CloseReason.PEER_EOF: 2, CloseReason.LOCAL_CLOSE: 1}


async def test_a_group_of_only_the_peers_doing(listener: trio.SocketListener) -> None:
    """A handler with a nursery of its own raises groups: of only such errors they are none."""

    async def handler(conn: TcpConnection) -> None:
        if conn.name.endswith("#2"):
            client.disconnect()
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(conn.receive_some)

    client = client_to(listener)
    async with no_leaks(), trio.open_nursery() as nursery:
        nursery.start_soon(client.run, handler)
        reset((await accepted(listener)).socket)
        await (await accepted(listener)).aclose()
    assert client.statistics().closed[CloseReason.PEER_RESET] == 1


async def test_a_mixed_group_leaves(listener: trio.SocketListener) -> None:
    """With one error of its own in it, the handler's group leaves as it is."""
    group = ExceptionGroup("both", [ProtocolError("theirs"), mine()])

    async def handler(conn: TcpConnection) -> None:
        raise group

    client = client_to(listener)
    with pytest.raises(ExceptionGroup) as raised:
        await client.run(handler)
    assert raised.value is group
    assert client.statistics().closed == {CloseReason.HANDLER_ERROR: 1}


async def test_an_error_of_another_resource_is_the_handlers_own(
    listener: trio.SocketListener,
) -> None:
    """A BrokenResourceError that is not this connection's is no doing of its peer."""

    async def handler(conn: TcpConnection) -> None:
        raise trio.BrokenResourceError("some other stream")

    client = client_to(listener)
    with pytest.raises(trio.BrokenResourceError, match="some other stream"):
        await client.run(handler)
    assert client.statistics().closed == {CloseReason.HANDLER_ERROR: 1}


@pytest.mark.parametrize("form", ["run", "block", "loop"])
async def test_no_attempt_left(form: str) -> None:
    """ConnectError leaves each form as a single error; it cancels the block."""
    with refusing() as refused:
        client = TcpClient(*refused.getsockname(), echo, backoff=AT_ONCE, max_attempts=3)
        with pytest.raises(ConnectError) as raised, trio.fail_after(10):
            await use(client, form)
        assert isinstance(raised.value.__cause__, ConnectionRefusedError)
        assert [attempt.number for attempt in raised.value.attempts] == [1, 2, 3]
        with pytest.raises(trio.ClosedResourceError):
            client.send(b"x")
        with pytest.raises(ConnectError), trio.fail_after(10):
            async with client:
                await trio.sleep_forever()


# -- async with


async def test_block_without_a_handler(listener: trio.SocketListener) -> None:
    """The block has the connection, can wait for it, and send by the client."""
    async with no_leaks():
        client = client_to(listener)
        async with client as same:
            assert same is client
            assert client.connection is None
            conn = await client.wait_connected()
            assert client.connection is conn
            async with await accepted(listener) as stream:
                assert client.send(b"one ")
                await client.send_all(b"two")
                assert await stream.receive_some(100) == b"one two"
                await stream.send_all(b"answer")
                assert await conn.receive_some() == b"answer"
            # The peer has gone, which nobody has to read; the next one comes by itself.
            await settled()
            second = await client.wait_connected()
            assert second is not conn
            assert conn.close_reason is CloseReason.PEER_EOF
        assert client.connection is None
        assert second.close_reason is CloseReason.LOCAL_CLOSE
    assert client.statistics().opened == 2


@pytest.mark.parametrize("unread", [False, True])
async def test_block_ends_gracefully(listener: trio.SocketListener, unread: bool) -> None:
    """What was queued at the block's end arrives whole, though input is left unread."""
    client = client_to(listener)
    got = []

    async def peer() -> None:
        async with await accepted(listener) as stream:
            if unread:
                await stream.send_all(b"nobody reads this")
            await settled()
            got.append(len(await everything(stream)))

    async with no_leaks(), trio.open_nursery() as nursery:
        nursery.start_soon(peer)
        async with client:
            conn = await client.wait_connected()
            if unread:
                await settled()
            queued = await fill(conn)
            assert conn.buffered
    assert got == [queued]
    assert conn.close_reason is CloseReason.LOCAL_CLOSE


async def test_block_with_a_handler(listener: trio.SocketListener) -> None:
    """The handler serves in the background; at the block's end it hears of it and may finish."""
    heard = []

    async def handler(conn: TcpConnection) -> None:
        conn.send(await conn.receive_some())
        await conn.draining.wait()
        heard.append(await conn.receive_some())

    client = client_to(listener, handler)
    async with no_leaks(), trio.open_nursery() as nursery:

        async def peer() -> None:
            async with await accepted(listener) as stream:
                await stream.send_all(b"ping")
                assert await stream.receive_some() == b"ping"
                served.set()
                assert await everything(stream) == b""
                await stream.send_all(b"last words")

        served = trio.Event()
        nursery.start_soon(peer)
        async with client:
            await served.wait()
    assert heard == [b"last words"]


@pytest.mark.parametrize("handler", [None, echo])
@pytest.mark.parametrize("connected", [False, True])
async def test_an_error_in_the_block(
    listener: trio.SocketListener, connected: bool, handler: Handler | None
) -> None:
    """It leaves without a group, its cause and context intact; the connection is closed at once."""
    client = client_to(listener, handler)
    error = mine()
    conn = None
    async with no_leaks():
        with pytest.raises(Mine) as raised, trio.fail_after(10):
            async with client:
                if connected:
                    conn = await client.wait_connected()
                raise error
        assert raised.value is error
        check_mine(raised.value)
        assert client.connection is None
        if conn is not None:
            assert conn.close_reason is CloseReason.CANCELLED


async def test_a_group_that_the_block_raises(listener: trio.SocketListener) -> None:
    """A group of the user's own making leaves as it is."""
    group = ExceptionGroup("own", [Mine()])
    with pytest.raises(ExceptionGroup) as raised:
        async with client_to(listener) as client:
            await client.wait_connected()
            raise group
    assert raised.value.message == "own"
    assert raised.value.exceptions == group.exceptions


async def test_the_handlers_error_cancels_the_block(listener: trio.SocketListener) -> None:
    """What the handler raises in the background leaves the block, alone and as it was."""
    error = mine()

    async def handler(conn: TcpConnection) -> None:
        raise error

    async with no_leaks():
        with pytest.raises(Mine) as raised, trio.fail_after(10):
            async with client_to(listener, handler):
                await trio.sleep_forever()
        check_mine(raised.value)


async def test_an_error_on_both_sides(listener: trio.SocketListener) -> None:
    """Where the block and the handler raise, both leave, in a group."""

    async def handler(conn: TcpConnection) -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise KeyError

    with pytest.raises(ExceptionGroup) as raised:
        async with client_to(listener, handler) as client:
            await client.wait_connected()
            await settled()
            raise Mine
    assert {type(error) for error in raised.value.exceptions} >= {Mine, KeyError}


async def test_block_that_ends_before_a_connection() -> None:
    """It ends at once, in its first turn, while it connects, and while it waits to."""
    with refusing() as refused:
        where = refused.getsockname()
        for turns in range(30):
            async with no_leaks():
                async with TcpClient(*where, backoff=[3600.0]) as client:
                    for _ in range(turns):
                        await trio.lowlevel.checkpoint()
                assert client.connection is None
                assert client.statistics().opened == 0
        # The last ones did wait.
        assert client.statistics().failures == {"ECONNREFUSED": 1}


async def test_block_that_ends_in_the_turn_of_the_connection(
    listener: trio.SocketListener,
) -> None:
    """However close the end is to the connection, nothing is left open and all is counted."""
    opened = set()
    for turns in range(30):
        async with no_leaks():
            async with client_to(listener) as client:
                for _ in range(turns):
                    await trio.lowlevel.checkpoint()
            statistics = client.statistics()
            assert statistics.opened == statistics.closed.get(CloseReason.LOCAL_CLOSE, 0)
            opened.add(statistics.opened)
    assert opened == {0, 1}


async def test_block_may_be_entered_again(listener: trio.SocketListener) -> None:
    """After a block the client can be used again, in whatever form."""

    async def once(conn: TcpConnection) -> None:
        client.disconnect()

    client = client_to(listener)
    async with no_leaks():
        for _ in range(2):
            async with client:
                await client.wait_connected()
        await client.run(once)
        async for conn in client:
            async with client.session(conn):
                client.disconnect()
    assert client.statistics().closed == {CloseReason.LOCAL_CLOSE: 4}


async def test_disconnect_in_the_block(listener: trio.SocketListener) -> None:
    """The block goes on without a connection, and ends as every other."""
    async with no_leaks(), client_to(listener) as client:
        conn = await client.wait_connected()
        async with await accepted(listener) as stream:
            client.disconnect()
            assert await everything(stream) == b""
        await conn.wait_closed()
        with pytest.raises(trio.ClosedResourceError):
            await client.wait_connected()
        with pytest.raises(trio.ClosedResourceError):
            client.send(b"x")


async def test_block_that_only_sends_gets_the_next_connection(
    listener: trio.SocketListener,
) -> None:
    """Input that the block never reads does not hide for ever that the connection broke."""
    async with no_leaks(), client_to(listener) as client:
        first = await client.wait_connected()
        stream = await accepted(listener)
        await stream.send_all(b"a greeting")
        await settled()
        reset(stream.socket)
        await settled()
        with pytest.raises(trio.BrokenResourceError), trio.fail_after(10):
            while True:
                client.send(b"x")
                await trio.lowlevel.checkpoint()
        with trio.fail_after(10):
            second = await client.wait_connected()
        assert second is not first
        client.send(b"hello")
        async with await accepted(listener) as stream:
            assert await stream.receive_some(5) == b"hello"


@pytest.mark.skipif(
    os.environ.get("TRIOREACTOR_POLLER") == "trio",
    reason="the trio poller does not see an EOF behind input that nobody reads",
)
async def test_block_that_reads_nothing_gets_the_next_connection(
    listener: trio.SocketListener,
) -> None:
    """Unread input does not hide for ever that the peer has gone: who waits gets the next one."""
    async with no_leaks(), client_to(listener) as client:
        first = await client.wait_connected()
        async with await accepted(listener) as stream:
            await stream.send_all(b"a greeting, and goodbye")
        await settled()
        with trio.fail_after(10):
            second = await client.wait_connected()
        assert second is not first


async def test_a_handler_that_sends_once_more(listener: trio.SocketListener) -> None:
    """Disconnected while it sends, it meets a ClosedResourceError: what was queued still goes."""
    queued = []

    async def handler(conn: TcpConnection) -> None:
        queued.append(await fill(conn))
        await conn.draining.wait()
        await conn.send_all(b"too late")

    client = client_to(listener, handler)
    async with no_leaks(), trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        async with await accepted(listener) as stream:
            client.disconnect()
            await settled()
            assert [len(await everything(stream))] == queued
    assert client.statistics().closed == {CloseReason.LOCAL_CLOSE: 1}


# -- async for


async def test_loop_gives_each_connection_in_turn(listener: trio.SocketListener) -> None:
    """Without `session` the next turn closes the connection before, gracefully."""
    conns: list[TcpConnection] = []

    async def peer() -> None:
        for number in (b"1", b"2", b"3"):
            async with await accepted(listener) as stream:
                assert await everything(stream) == number

    async with no_leaks(), trio.open_nursery() as nursery:
        nursery.start_soon(peer)
        client = client_to(listener)
        async for conn in client:
            assert client.connection is conn
            assert [old.state for old in conns] == [ConnectionState.DISCONNECTED] * len(conns)
            conns.append(conn)
            conn.send(b"%d" % len(conns))
            if len(conns) == 3:
                client.disconnect()
        with pytest.raises(trio.ClosedResourceError), trio.fail_after(10):
            await client.wait_connected()
    assert client.statistics().closed == {CloseReason.LOCAL_CLOSE: 3}


async def test_loop_that_is_broken_off(listener: trio.SocketListener) -> None:
    """`break` closes in `session`, and leaves open what is the user's without it."""
    client = client_to(listener)
    async with no_leaks():
        async for conn in client:
            async with client.session(conn):
                break
        assert conn.close_reason is CloseReason.LOCAL_CLOSE
        assert client.statistics().active == 0
        async for _ in client:
            break
        conn = client.connection
        assert conn is not None
        assert conn.state is ConnectionState.CONNECTED
        client.stop()
        assert conn.close_reason is CloseReason.FORCED


async def test_loop_whose_body_raises(listener: trio.SocketListener) -> None:
    """An error of its own leaves `session` as itself and closes; without, it is left open."""
    error = mine()
    client = client_to(listener)
    async with no_leaks():
        with pytest.raises(Mine) as raised:
            async for conn in client:
                async with client.session(conn):
                    raise error
        check_mine(raised.value)
        assert conn.close_reason is CloseReason.HANDLER_ERROR
        with pytest.raises(Mine):
            async for _ in client:
                raise error
        left_open = client.connection
        assert left_open is not None
        assert left_open.state is ConnectionState.CONNECTED
        left_open.force_close()


async def test_session_swallows_the_peers_doing_only(listener: trio.SocketListener) -> None:
    """A reset in the block ends the block, not the loop."""
    numbers = []
    async with no_leaks():
        client = client_to(listener)
        async for conn in client:
            stream = await accepted(listener)
            async with client.session(conn) as same:
                assert same is conn
                numbers.append(conn.name[-1])
                if len(numbers) < 3:
                    reset(stream.socket)
                else:
                    await stream.aclose()
                assert await conn.receive_some() == b""
                client.disconnect()
    assert numbers == ["1", "2", "3"]
    closed = client.statistics().closed
    assert closed == {CloseReason.PEER_RESET: 2, CloseReason.PEER_EOF: 1}


async def test_force_close_cancels_the_session(listener: trio.SocketListener) -> None:
    """The block of the session is cancelled, and the loop goes on."""
    client = client_to(listener)
    async with no_leaks(), trio.open_nursery() as nursery:
        async for conn in client:
            async with client.session(conn):
                if conn.name.endswith("#1"):
                    nursery.start_soon(after_a_while, conn.force_close)
                    with trio.fail_after(10):
                        await trio.sleep_forever()
                client.disconnect()
    closed = client.statistics().closed
    assert closed == {CloseReason.FORCED: 1, CloseReason.LOCAL_CLOSE: 1}


async def after_a_while(fn: Callable[[], object]) -> None:
    await settled()
    fn()


@pytest.mark.parametrize("end", ["stop", "disconnect", "force_close"])
async def test_session_entered_after_the_end(
    end: str, listener: trio.SocketListener, autojump_clock: MockClock
) -> None:
    """A connection that was ended between the loop and the session has its session ended, too."""
    client = client_to(listener, retry=False)
    async with no_leaks():
        begun = trio.current_time()
        with trio.fail_after(100):
            async for conn in client:
                if end == "force_close":
                    conn.force_close()
                else:
                    getattr(client, end)()
                async with client.session(conn):
                    await trio.sleep_forever()
        assert trio.current_time() - begun == (2.0 if end == "disconnect" else 0.0)


# -- one at a time


@pytest.mark.parametrize("second", ["run", "block", "loop"])
@pytest.mark.parametrize("first", ["run", "block"])
async def test_only_one_use_at_a_time(
    first: str, second: str, listener: trio.SocketListener
) -> None:
    """A second use is refused, and changes nothing for the first: not even what it was told."""

    async def until_draining(conn: TcpConnection) -> None:
        await conn.draining.wait()
        await settled()

    client = client_to(listener, until_draining)
    async with no_leaks(), trio.open_nursery() as nursery:
        nursery.start_soon(use, client, first)
        conn = await client.wait_connected()
        with pytest.raises(trio.BusyResourceError):
            await use(client, second)
        assert client.connection is conn
        assert conn.state is ConnectionState.CONNECTED
        assert not conn.draining.is_set()
        client.disconnect()
        with pytest.raises(trio.BusyResourceError):
            await use(client, second)
    assert client.statistics().opened == 1


async def test_no_connection_before_the_first_turn(listener: trio.SocketListener) -> None:
    """What is not begun has no connection, and says so without ending anything."""
    client = client_to(listener)
    assert client.connection is None
    with pytest.raises(NotConnected):
        client.send(b"x")
    with pytest.raises(NotConnected):
        await client.send_all(b"x")
    async with client:
        await client.wait_connected()
