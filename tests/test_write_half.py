"""WriteHalf: every byte sent leaves once, in order, with as few calls as can be."""

from __future__ import annotations

import array
import socket
from collections.abc import Callable

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.conftest import fill, no_leaks, tcp_pair, unix_pair
from tests.simulated import SimulatedSocket, simulated
from trioreactor import (
    CloseReason,
    ConnectionState,
    SendBufferFull,
    TcpConnection,
    Timeouts,
    Watermarks,
)
from trioreactor.buffer import Buffer
from trioreactor.poller import MAX_ROUNDS

settled = trio.testing.wait_all_tasks_blocked


async def in_callback(conn: TcpConnection, sock: SimulatedSocket, act: Callable[[], None]) -> None:
    """Run *act* inside a dispatch callback, and let the reactor come to rest."""

    def on_message(conn: TcpConnection, buffer: Buffer) -> None:
        buffer.take()
        act()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(conn.dispatch, on_message)
        await settled()
        sock.peer_sends(b"x")
        await settled()
        nursery.cancel_scope.cancel()


# -- calls and order


@pytest.mark.parametrize(
    "pieces", [[b"one"], [b"one", b"two"], [b"a" * 600, b"b" * 600, b"c"], [b"x"] * 1000]
)
async def test_sends_of_one_callback_leave_together(pieces: list[bytes]) -> None:
    """What a callback sends leaves after it, in one call to the kernel."""
    conn, sock = simulated()

    def act() -> None:
        for piece in pieces:
            assert conn.send(piece)
        assert sock.writes == []
        assert conn.statistics().buffered == sum(map(len, pieces))

    await in_callback(conn, sock, act)
    assert sock.output == b"".join(pieces)
    assert len(sock.writes) == 1
    assert conn.statistics().bytes_sent == len(sock.output)
    conn.force_close()


async def test_a_direct_write_needs_no_queue() -> None:
    """Outside a callback a send is one call at once, and leaves nothing queued."""
    conn, sock = simulated()
    for n in range(1, 4):
        assert conn.send(b"abc")
        assert sock.writes == [("send", 3)] * n
    assert conn.statistics().buffered == 0
    conn.force_close()


@pytest.mark.parametrize("room", [0, 1, 2, 100, 70_000, 1 << 30])
async def test_order_across_all_ways(room: int) -> None:
    """Direct, partly written, queued, held and gathered: the bytes leave in the order of sends."""
    conn, sock = simulated(room=room, watermarks=Watermarks(high=65536, low=100))
    sent = bytearray()
    serial = 0

    def send(size: int) -> None:
        nonlocal serial
        serial += 1
        data = (serial.to_bytes(4, "big") * (size // 4 + 1))[:size]
        conn.send(data)
        sent.extend(data)

    def several() -> None:
        for size in (3, 700, 3, 40_000, 3, 40_000, 3, 700):
            send(size)

    send(5)
    await in_callback(conn, sock, several)
    send(1000)
    sock.peer_takes(50)
    await in_callback(conn, sock, several)
    await in_callback(conn, sock, lambda: send(10))
    send(10)
    sock.peer_takes(1 << 30)
    await settled()
    assert sock.output == sent
    assert conn.statistics().buffered == 0
    statistics = conn.statistics()
    assert statistics.pauses == statistics.resumes
    conn.force_close()


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("room", [0, 5, 1 << 30])
async def test_what_was_sent_does_not_change(inside: bool, room: int) -> None:
    """The caller may reuse a bytearray right after `send`: what was in it then is what goes out."""
    conn, sock = simulated(room=room)

    def act() -> None:
        data = bytearray(b"0123456789" * 100)
        conn.send(data)
        data[:] = b"!" * 1000
        # Nothing holds it, so it can be resized.
        data.clear()
        conn.send(memoryview(b"__abc__")[2:5])

    if inside:
        await in_callback(conn, sock, act)
    else:
        act()
    sock.peer_takes(1 << 30)
    await settled()
    assert sock.output == b"0123456789" * 100 + b"abc"
    conn.force_close()


async def test_views_of_other_items() -> None:
    """A memoryview is sent as its bytes, whatever its items are, and counted in bytes."""
    conn, sock = simulated(room=3)
    numbers = array.array("i", [1, 2, 3])
    conn.send(memoryview(numbers))
    await conn.send_all(memoryview(numbers)[:1])
    sock.peer_takes(100)
    await settled()
    assert sock.output == numbers.tobytes() + numbers[:1].tobytes()
    assert conn.statistics().bytes_sent == 4 * numbers.itemsize
    conn.force_close()


@pytest.mark.parametrize("data", ["text", 5, None, ["x"]])
async def test_what_is_not_bytes_is_refused(data: object) -> None:
    """Anything but bytes raises TypeError and sends nothing; the connection is none the worse."""
    conn, sock = simulated()
    with pytest.raises(TypeError):
        conn.send(data)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        await conn.send_all(data)  # type: ignore[arg-type]
    await conn.send_all(b"fine")
    assert sock.output == b"fine"
    conn.force_close()


async def test_empty_sends() -> None:
    """Empty data is no call and no callback, and does not get in the way of the end (FAULTS 25)."""
    conn, sock = simulated(room=0)
    conn.write_complete_callback = lambda conn: pytest.fail("nothing was sent")
    for data in (b"", bytearray(), memoryview(b"")):
        assert conn.send(data)
        await conn.send_all(data)
    assert sock.writes == []
    conn.write_complete_callback = None
    conn.send(b"x")
    for _ in range(1000):
        conn.send(b"")
    sock.peer_takes(10)
    await conn.aclose()
    assert sock.output == b"x"


# -- held data and the end, in one callback


async def test_shutdown_in_the_callback() -> None:
    """What a callback sent before `shutdown` leaves, then the EOF; later sends are refused."""
    conn, sock = simulated()

    def act() -> None:
        conn.send(b"last ")
        conn.send(b"words")
        conn.shutdown()
        assert not sock.shut
        with pytest.raises(trio.ClosedResourceError):
            conn.send(b"too late")

    await in_callback(conn, sock, act)
    assert sock.output == b"last words"
    assert sock.shut
    assert conn.state is ConnectionState.DISCONNECTING
    conn.force_close()


async def test_shutdown_with_one_held_piece() -> None:
    """The same with a single piece, which is held in another place, and a kernel that is full."""
    conn, sock = simulated(room=2)

    def act() -> None:
        conn.send(b"goodbye")
        conn.shutdown()

    await in_callback(conn, sock, act)
    assert (bytes(sock.output), sock.shut) == (b"go", False)
    sock.peer_takes(100)
    await settled()
    assert (bytes(sock.output), sock.shut) == (b"goodbye", True)
    conn.force_close()


async def test_shutdown_in_a_callback_lingers_for_what_it_sent(autojump_clock: MockClock) -> None:
    """The bound on a close counts what the callback sent just before: a peer that takes a quarter
    of the high mark a period is patient company.
    """
    conn, sock = simulated(
        room=0, watermarks=Watermarks(high=4000, low=100), timeouts=Timeouts(linger=2)
    )

    def act() -> None:
        conn.send(b"x" * 3500)
        conn.shutdown()

    await in_callback(conn, sock, act)
    for _ in range(4):
        await trio.sleep(1.9)
        sock.peer_takes(1000)
        await settled()
    assert (len(sock.output), sock.shut, conn.close_reason) == (3500, True, None)
    sock.peer_ends()
    conn.force_close()


async def test_force_close_in_the_callback() -> None:
    """`force_close` drops what the callback had sent; nothing is written to a closed socket."""
    conn, sock = simulated()

    def act() -> None:
        conn.send(b"dropped")
        conn.send(b"dropped, too")
        conn.force_close()

    await in_callback(conn, sock, act)
    assert (bytes(sock.output), sock.closed) == (b"", True)
    assert conn.statistics().buffered == 0


async def test_aclose_after_the_callback() -> None:
    """`aclose`, started by the callback, sends what the callback sent before and after that."""
    conn, sock = simulated(room=1)
    async with trio.open_nursery() as nursery:

        def act() -> None:
            conn.send(b"one ")
            nursery.start_soon(conn.aclose)
            conn.send(b"two")

        await in_callback(conn, sock, act)
        assert conn.close_reason is None
        sock.peer_takes(100)
    assert sock.output == b"one two"
    assert conn.close_reason is CloseReason.LOCAL_CLOSE


async def test_a_reset_while_held() -> None:
    """A reset met when the callback's data is written ends dispatch with the peer's error."""
    conn, sock = simulated()

    def on_message(conn: TcpConnection, buffer: Buffer) -> None:
        buffer.take()
        conn.send(b"x")
        sock.peer_resets()

    async with trio.open_nursery() as nursery:

        async def dispatch() -> None:
            with pytest.raises(trio.BrokenResourceError):
                await conn.dispatch(on_message)

        nursery.start_soon(dispatch)
        await settled()
        sock.peer_sends(b"x")
    assert conn.close_reason is CloseReason.PEER_RESET


# -- waiting


async def test_a_flush_takes_turns() -> None:
    """A kernel that takes everything cannot keep the reactor: a flush is a few writes, then others
    have their turn, and it goes on by itself.
    """
    conn, sock = simulated(room=0)
    chunk = bytes(100_000)
    for _ in range(500):
        conn.send(chunk)
    at_turns: list[int] = []
    sock.peer_takes(1 << 30)
    while len(sock.output) < 500 * len(chunk):
        await trio.lowlevel.checkpoint()
        at_turns.append(len(sock.output))
        assert len(at_turns) < 1000
    steps = [after - before for before, after in zip([0, *at_turns], at_turns, strict=False)]
    # The event's flush and one in each round, times writes in a flush, times one write's bound;
    # and trio may run the poller twice between two turns of ours.
    assert max(steps) <= 2 * (1 + MAX_ROUNDS) * 4 * (262144 + len(chunk))
    assert sum(step > 0 for step in steps) >= 3
    conn.force_close()


async def test_everybody_who_waits_is_woken() -> None:
    """Waiters for room, for empty and for the close are separate, and a close wakes them all."""
    async with no_leaks():
        left, right = await tcp_pair()
        await fill(left)
        told: list[str] = []

        async def wait(name: str, fn: Callable[[], object]) -> None:
            try:
                await fn()  # type: ignore[misc]
            except trio.ClosedResourceError:
                told.append(name)
            else:
                told.append(f"{name} was done")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait, "room", left.wait_send_all_might_not_block)
            nursery.start_soon(wait, "drained", left.wait_drained)
            nursery.start_soon(wait, "drained", left.wait_drained)
            nursery.start_soon(wait, "closed", left.wait_closed)
            nursery.start_soon(wait, "input", left.receive_some)
            await settled()
            with pytest.raises(trio.BusyResourceError):
                await left.send_all(b"x")
            left.force_close()
        assert sorted(told) == ["closed was done", "drained", "drained", "input", "room"]
        right.force_close()


async def test_wait_drained() -> None:
    """It ends when the last byte is with the kernel, and not before."""
    conn, sock = simulated(room=10)
    await conn.wait_drained()
    conn.send(bytes(30))
    done = False

    async def wait() -> None:
        nonlocal done
        await conn.wait_drained()
        done = True

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await settled()
        sock.peer_takes(19)
        await settled()
        assert not done
        sock.peer_takes(1)
    assert done
    conn.force_close()


async def test_send_eof_waits_for_the_queue() -> None:
    """The EOF follows what is queued; waiting for it can be cancelled without changing that."""
    conn, sock = simulated(room=1)
    conn.send(b"abc")
    with trio.move_on_after(0.01) as scope:
        await conn.send_eof()
    assert scope.cancelled_caught
    assert not sock.shut
    with pytest.raises(trio.ClosedResourceError):
        conn.send(b"x")
    sock.peer_takes(10)
    await conn.send_eof()
    assert (bytes(sock.output), sock.shut) == (b"abc", True)
    # We can read on for as long as we like.
    sock.peer_sends(b"answer")
    assert await conn.receive_some() == b"answer"
    await conn.send_eof()
    conn.force_close()


async def test_full_in_a_callback() -> None:
    """The hard limit holds inside a callback, too: that connection ends as a slow consumer."""
    conn, sock = simulated(room=0, watermarks=Watermarks(high=1000, low=100, limit=2048))
    refused = False

    def act() -> None:
        nonlocal refused
        with pytest.raises(SendBufferFull):
            for _ in range(100):
                conn.send(bytes(100))
        refused = True

    with pytest.raises(trio.BrokenResourceError):
        try:
            await in_callback(conn, sock, act)
        except* trio.BrokenResourceError as group:
            raise trio.BrokenResourceError from group
    assert refused
    assert conn.close_reason is CloseReason.SLOW_CONSUMER


# -- write_stall


@pytest.mark.parametrize("where", ["in dispatch", "in send_all", "alone"])
async def test_write_stall(where: str, autojump_clock: MockClock) -> None:
    """A peer that takes nothing loses the connection after exactly that long (FAULTS 30)."""
    conn, sock = simulated(room=100, timeouts=Timeouts(write_stall=7))
    await trio.sleep(100)
    begun = trio.current_time()
    async with trio.open_nursery() as nursery:
        if where == "in dispatch":
            nursery.start_soon(conn.dispatch, lambda conn, buffer: None)
        if where == "in send_all":

            async def send_all() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await conn.send_all(bytes(100_000))

            nursery.start_soon(send_all)
        else:
            conn.send(bytes(1000))
        await conn.wait_closed()
    assert trio.current_time() == begun + 7
    assert conn.close_reason is CloseReason.WRITE_STALLED
    assert sock.closed


async def test_progress_holds_a_stall_off(autojump_clock: MockClock) -> None:
    """Each byte taken gives the whole time again; nothing queued is no stall at all."""
    conn, sock = simulated(room=0, timeouts=Timeouts(write_stall=7))
    conn.send(bytes(10))
    for _ in range(10):
        await trio.sleep(6.5)
        sock.peer_takes(1)
        await settled()
    assert conn.statistics().buffered == 0
    await trio.sleep(1000)
    assert conn.close_reason is None
    # More sends are not progress.
    begun = trio.current_time()
    with trio.move_on_after(100):
        while conn.close_reason is None:
            conn.send(b"x")
            await trio.sleep(0.5)
    assert conn.close_reason is CloseReason.WRITE_STALLED
    assert trio.current_time() - begun <= 7.5


async def test_write_stall_of_a_real_peer(autojump_clock: MockClock) -> None:
    """A peer that never reads, on a real socket, is noticed as well (D)."""
    async with no_leaks():
        left, right = await unix_pair(timeouts=Timeouts(write_stall=3))
        left.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        await fill(left)
        begun = trio.current_time()
        with pytest.raises(trio.ClosedResourceError):
            await left.wait_drained()
        assert trio.current_time() == begun + 3
        assert left.close_reason is CloseReason.WRITE_STALLED
        right.force_close()
