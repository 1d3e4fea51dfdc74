"""TlsSocket: what comes in, record by record, by the rules of an edge-triggered reader."""

from __future__ import annotations

import ssl
from contextlib import suppress
from functools import partial
from itertools import accumulate, pairwise

import pytest
import trio
import trio.testing

from tests.conftest import everything, until
from tests.simulated import SimulatedPoller, SimulatedSocket, simulated
from tests.tls import NAME, TlsPeer, client_context, server_context, simulated_tls, versions
from trioreactor import Buffer, CloseReason, ProtocolError, TcpConnection
from trioreactor.poller import current

settled = trio.testing.wait_all_tasks_blocked

# Small ones, a whole record, and more than one.
MESSAGES = [b"a", b"bc" * 30, b"d" * 16384, b"", b"e" * 40000, b"f" * 100]


class Received:
    """Reads in one of the two modes, until the end, and keeps what came and what it ended by."""

    def __init__(self, size: int | None = None) -> None:
        self._size = size
        self.data = bytearray()
        self.error: BaseException | None = None
        self.ended = trio.Event()

    async def coroutine(self, conn: TcpConnection) -> None:
        try:
            while data := await conn.receive_some(self._size):
                self.data += data
        except trio.BrokenResourceError as error:
            self.error = error
        self.ended.set()

    async def dispatch(self, conn: TcpConnection) -> None:
        def on_message(_conn: TcpConnection, buffer: Buffer) -> None:
            self.data += buffer.take()

        try:
            await conn.dispatch(on_message)
        except trio.BrokenResourceError as error:
            self.error = error
        self.ended.set()


modes = pytest.mark.parametrize("mode", ["coroutine", "dispatch"])


@modes
@pytest.mark.parametrize("cut", [1, 7, 4096, 16500, 1 << 20])
@versions
async def test_however_it_comes(version: ssl.TLSVersion, cut: int, mode: str) -> None:
    """Records that come in pieces of any size are the same plaintext, and the end its own."""
    messages = MESSAGES if cut > 7 else [b"a", b"bc" * 30, b"d" * 700]
    conn, peer = await simulated_tls(version)
    received = Received()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(getattr(received, mode), conn)
        data = peer.records(*filter(None, messages)) + peer.close_notify()
        for start in range(0, len(data), cut):
            peer.sock.peer_sends(data[start : start + cut])
            await settled()
        await received.ended.wait()
    assert received.data == b"".join(messages)
    assert received.error is None
    assert conn.at_eof
    assert conn.statistics().bytes_received == len(received.data)
    conn.force_close()


@pytest.mark.parametrize("size", [1, 60, 16384, 20000])
async def test_however_it_is_read(size: int) -> None:
    """What a read has not asked for is there for the next one, with no event."""
    conn, peer = await simulated_tls()
    peer.sock.peer_sends(peer.records(b"a" * 100, b"b" * 30000, b"c") + peer.close_notify())
    received = Received(size)
    await received.coroutine(conn)
    assert received.data == b"a" * 100 + b"b" * 30000 + b"c"
    assert conn.at_eof
    conn.force_close()


async def test_more_than_one_read_takes() -> None:
    """A megabyte that came at once is read in turns, whole."""
    conn, peer = await simulated_tls()
    data = bytes(range(256)) * 4096
    peer.sock.peer_sends(peer.records(*(data[i : i + 16384] for i in range(0, len(data), 16384))))
    received = Received()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(received.dispatch, conn)
        await settled()
        assert received.data == data
        nursery.cancel_scope.cancel()
    conn.force_close()


@modes
async def test_cut(mode: str) -> None:
    """FAULTS 52. An EOF without close_notify is an error, behind what came before it."""
    conn, peer = await simulated_tls()
    peer.sock.peer_sends(peer.records(b"half of it"))
    peer.sock.peer_ends()
    received = Received()
    await getattr(received, mode)(conn)
    assert received.data == b"half of it"
    assert isinstance(received.error, trio.BrokenResourceError)
    assert not conn.at_eof
    assert conn.close_reason is CloseReason.PEER_RESET


async def test_why_it_was_cut() -> None:
    """The error says so, and what ssl calls it is its cause."""
    conn, peer = await simulated_tls()
    peer.sock.peer_ends()
    with pytest.raises(trio.BrokenResourceError, match="close_notify") as caught:
        await conn.receive_some()
    assert isinstance(caught.value.__cause__, ssl.SSLEOFError)


@modes
async def test_cut_of_https(mode: str) -> None:
    """With `https_compatible` it is an EOF."""
    conn, peer = await simulated_tls(https_compatible=True)
    peer.sock.peer_sends(peer.records(b"all of it"))
    peer.sock.peer_ends()
    received = Received()
    await getattr(received, mode)(conn)
    assert (received.data, received.error) == (b"all of it", None)
    assert conn.at_eof
    await conn.aclose()
    assert conn.close_reason is CloseReason.PEER_EOF


@modes
@pytest.mark.parametrize("https_compatible", [False, True])
async def test_reset(mode: str, https_compatible: bool) -> None:
    """A reset is an error in any case; in coroutine mode behind what came before it."""
    conn, peer = await simulated_tls(https_compatible=https_compatible)
    peer.sock.peer_sends(peer.records(b"x"))
    peer.sock.peer_resets()
    received = Received()
    await getattr(received, mode)(conn)
    assert received.data == b"x"
    assert received.error is not None
    assert conn.close_reason is CloseReason.PEER_RESET


@modes
async def test_a_record_that_was_changed(mode: str) -> None:
    """It ends that connection, by a typed error, behind what came before it."""
    conn, peer = await simulated_tls()
    good, bad = peer.records(b"good"), bytearray(peer.records(b"bad"))
    bad[-1] ^= 1
    peer.sock.peer_sends(good + bytes(bad) + peer.records(b"never"))
    received = Received()
    await getattr(received, mode)(conn)
    assert received.data == b"good"
    assert received.error is not None
    assert isinstance(received.error.__cause__, (ssl.SSLError, trio.BrokenResourceError))
    # The peer is told by an alert.
    with pytest.raises(ssl.SSLError, match=r"(?i)alert"):
        peer.received()


async def test_plain_bytes_are_no_plaintext() -> None:
    """FAULTS 53. What comes in the open after the handshake is an error."""
    conn, peer = await simulated_tls()
    peer.sock.peer_sends(b"QUIT\r\n" * 10)
    with pytest.raises(trio.BrokenResourceError):
        await conn.receive_some()


async def test_the_end_behind_data() -> None:
    """close_notify that came with the last data is found, though no FIN announces it."""
    conn, peer = await simulated_tls()
    received = Received()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(received.dispatch, conn)
        peer.sock.peer_sends(peer.records(b"last") + peer.close_notify())
        await settled()
        assert received.ended.is_set()
    assert received.data == b"last"
    assert received.error is None
    conn.force_close()


async def test_what_was_peeked_at_stays() -> None:
    """Asking whether there is input takes none of it away, whoever waits for it."""
    conn, peer = await simulated_tls()
    assert not conn.has_unread()
    received = Received()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(received.coroutine, conn)
        await settled()
        # Its event comes, but what it is about has been taken from the socket.
        peer.sock.input += peer.records(b"one", b"two")
        assert conn.has_unread()
        await settled()
        assert received.data == b"onetwo"
        # The same of an end.
        peer.sock.input += peer.close_notify()
        assert not conn.has_unread()
        await settled()
        assert received.ended.is_set()
    assert conn.at_eof
    conn.force_close()


async def test_half_a_record_is_nothing_to_read() -> None:
    """Though the kernel had something."""
    conn, peer = await simulated_tls()
    data = peer.records(b"whole")
    peer.sock.peer_sends(data[:-1])
    await settled()
    assert not conn.has_unread()
    peer.sock.peer_sends(data[-1:])
    assert conn.has_unread()
    assert await conn.receive_some() == b"whole"
    conn.force_close()


async def test_nobody_reads_and_it_ends() -> None:
    """`wait_eof` hears of close_notify, and of a cut."""
    conn, peer = await simulated_tls()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(conn.wait_eof)
        await settled()
        peer.sock.peer_sends(peer.close_notify())
    assert conn.at_eof
    conn.force_close()

    conn, peer = await simulated_tls()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(conn.wait_eof)
        await settled()
        peer.sock.peer_ends()
    assert conn.close_reason is CloseReason.PEER_RESET


async def test_an_end_that_is_seen_makes_nothing_spin() -> None:
    """Promise S. An EOF that nobody reads, looked at twice, keeps the poller asleep."""
    conn, peer = await simulated_tls()
    peer.sock.peer_sends(peer.close_notify())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(conn.wait_eof)
    assert not conn.has_unread()
    await settled()
    poller = current.get()
    assert isinstance(poller, SimulatedPoller)
    turns = poller.turn
    assert not conn.has_unread()
    for _ in range(10):
        await trio.lowlevel.checkpoint()
    assert poller.turn <= turns + 1
    conn.force_close()


@versions
async def test_half_close(version: ssl.TLSVersion) -> None:
    """Ours leaves what has come and was not read, and what comes later, to be read."""
    conn, peer = await simulated_tls(version)
    peer.sock.peer_sends(peer.records(b"a" * 100, b"b" * 20000))
    assert await conn.receive_some(10) == b"a" * 10
    await conn.send_eof()
    assert peer.sock.shut
    assert peer.received() == b""
    peer.sock.peer_sends(peer.records(b"c") + peer.close_notify())
    assert await everything(conn) == b"a" * 90 + b"b" * 20000 + b"c"
    await conn.aclose()
    assert conn.close_reason is CloseReason.PEER_EOF


async def test_theirs_leaves_us_to_send() -> None:
    """After their close_notify we can still send."""
    conn, peer = await simulated_tls()
    peer.sock.peer_sends(peer.close_notify())
    assert await conn.receive_some() == b""
    await conn.send_all(b"answer")
    assert peer.received() == b"answer"
    await conn.aclose()
    assert peer.sock.shut


async def test_a_close_says_so() -> None:
    """`aclose` sends close_notify; `force_close` does not, so that its peer sees the cut."""
    for close, sees in ((TcpConnection.aclose, b""), (None, None)):
        conn, peer = await simulated_tls()
        await conn.send_all(b"x")
        if close is None:
            conn.force_close()
        else:
            await close(conn)
        assert peer.received() == b"x"
        if sees is None:
            with pytest.raises(ssl.SSLWantReadError):
                peer.tls.read(1)
        else:
            assert peer.tls.read(1) == sees


async def test_closing_reads_to_the_end() -> None:
    """With unread input it half-closes, and drops what comes; that it is cut is nothing then."""
    conn, peer = await simulated_tls()
    peer.sock.peer_sends(peer.records(b"unread"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(conn.aclose)
        await settled()
        assert not peer.sock.closed
        peer.sock.peer_sends(peer.records(b"more"))
        peer.sock.peer_ends()
    assert conn.close_reason is CloseReason.LOCAL_CLOSE


async def test_errors_of_callbacks_reach_dispatch() -> None:
    """As without TLS."""
    conn, peer = await simulated_tls()

    def refuse(_conn: TcpConnection, _buffer: Buffer) -> None:
        raise ProtocolError("no")

    peer.sock.peer_sends(peer.records(b"x"))
    with pytest.raises(ProtocolError):
        await conn.dispatch(refuse)
    conn.force_close()


@pytest.mark.parametrize("step", [50, 1000])
async def test_a_handshake_in_pieces(step: int) -> None:
    """The peer takes the server's part of it, and the tickets that follow, in any pieces."""
    conn, sock = simulated(room=0)
    peer = TlsPeer(sock)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(conn.start_tls, server_context(), server_side=True))
        nursery.start_soon(peer.shake_hands)
        while conn.tls is None:
            sock.peer_takes(step)
            await settled()
    sock.peer_takes(1 << 20)
    await settled()
    # Which nobody has asked for.
    assert peer.received() == b""
    assert peer.tls.session is not None
    assert peer.tls.session.has_ticket
    await conn.send_all(b"x")
    assert peer.received() == b"x"
    conn.force_close()


class ReadsByTurn:
    """What is taken from a socket in each turn of the loop, as another task has turns."""

    def __init__(self, sock: SimulatedSocket) -> None:
        self._turns = [0]
        self._receive = sock.recv
        sock.recv = self._recv  # type: ignore[method-assign]

    def _recv(self, size: int, flags: int = 0, /) -> bytes:
        data = self._receive(size, flags)
        self._turns[-1] += len(data)
        return data

    async def look(self) -> None:
        while True:
            self._turns.append(0)
            await trio.lowlevel.checkpoint()

    def most(self, size: int) -> int:
        """The most that a turn took of the first *size* bytes."""
        ends = [min(total, size) for total in accumulate(self._turns)]
        return max(end - begin for begin, end in pairwise([0, *ends]))


@modes
async def test_records_that_hold_next_to_nothing(mode: str) -> None:
    """O: what OpenSSL has to do for a flood of them is done in small parts, in turn with others.
    What comes behind is whole.
    """
    conn, peer = await simulated_tls()
    reads = ReadsByTurn(peer.sock)
    bulk = bytes(range(256)) * 2048
    flood = peer.records(*[b"x"] * 4000)
    peer.sock.peer_sends(flood)
    peer.sock.peer_sends(peer.records(*(bulk[i : i + 16384] for i in range(0, len(bulk), 16384))))
    peer.sock.peer_sends(peer.close_notify())
    received = Received()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reads.look)
        await getattr(received, mode)(conn)
        nursery.cancel_scope.cancel()
    assert received.data == b"x" * 4000 + bulk
    # The first read cannot know.
    assert reads.most(len(flood)) <= 2 * 16896
    conn.force_close()


@modes
async def test_records_that_hold_nothing(mode: str) -> None:
    """The same of those that are TLS's own: a server's many tickets."""
    conn, sock = simulated()
    context = server_context(ssl.TLSVersion.TLSv1_3)
    context.num_tickets = 500
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_side=True)
    begin = partial(conn.start_tls, client_context(), server_side=False, server_hostname=NAME)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(begin)
        while conn.tls is None:
            await settled()
            incoming.write(bytes(sock.output))
            sock.output.clear()
            with suppress(ssl.SSLWantReadError):
                tls.do_handshake()
            if conn.tls is None:
                sock.peer_sends(outgoing.read())
    flood = outgoing.read()
    tls.write(b"whole")
    reads = ReadsByTurn(sock)
    sock.peer_sends(flood + outgoing.read())
    received = Received()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reads.look)
        nursery.start_soon(getattr(received, mode), conn)
        await until(lambda: received.data)
        nursery.cancel_scope.cancel()
    assert received.data == b"whole"
    assert len(flood) > 100000
    assert reads.most(len(flood)) <= 2 * 16896
    conn.force_close()


async def test_a_close_that_meets_them() -> None:
    """O: nor does a close, which reads to the end, do more of it at once."""
    conn, peer = await simulated_tls()
    reads = ReadsByTurn(peer.sock)
    flood = peer.records(*[b"x"] * 4000)
    peer.sock.peer_sends(flood)
    peer.sock.peer_sends(peer.close_notify())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reads.look)
        await conn.aclose()
        nursery.cancel_scope.cancel()
    assert not peer.sock.input
    assert reads.most(len(flood)) <= 2 * 16896


async def test_bits_of_a_record() -> None:
    """One who sends bits of it while we read does not keep the others waiting."""
    conn, peer = await simulated_tls()
    sock, reads = peer.sock, 0
    receive = sock.recv

    def recv(_size: int, flags: int = 0, /) -> bytes:
        nonlocal reads
        reads += 1
        return receive(1, flags)

    sock.recv = recv  # type: ignore[method-assign]
    sock.peer_sends(peer.records(b"whole"))
    most = 0
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def look() -> None:
            nonlocal reads, most
            while True:
                reads = 0
                await trio.lowlevel.checkpoint()
                most = max(most, reads)

        assert await conn.receive_some() == b"whole"
        nursery.cancel_scope.cancel()
    # Four at a time, and two or three times in a turn of the loop.
    assert most < 20
    conn.force_close()
