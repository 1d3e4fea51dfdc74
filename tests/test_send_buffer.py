"""SendBuffer: bytes leave in the order they came, and each crossing of a mark is told once."""

from __future__ import annotations

import array
import sys
import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from trioreactor import Watermarks
from trioreactor.send_buffer import (
    ENTRY_OVERHEAD,
    Crossing,
    Droppable,
    SendBuffer,
    bytes_view,
    kept,
)

pytestmark = pytest.mark.pure

pure = settings(deadline=None, derandomize=True, max_examples=100)

# One byte, either side of the size from which chunks are kept whole, and large ones.
sizes = st.one_of(
    st.integers(1, 40),
    st.integers(500, 520),
    st.integers(1, 5000),
    st.sampled_from([16383, 16384, 16385, 65536, 300000]),
)
kinds: st.SearchStrategy[Callable[[bytes], bytes | memoryview]] = st.sampled_from(
    [bytes, memoryview]
)


def numbered(start: int, n: int) -> bytes:
    """*n* bytes of an endless sequence whose period no chunk size shares, from *start* on."""
    period = bytes(range(251))
    shift = start % 251
    return (period[shift:] + period * (n // 251 + 1))[:n]


class SendBufferModel(RuleBasedStateMachine):
    """A SendBuffer beside two counters: how many bytes went in, how many came out."""

    @initialize(
        high=st.integers(1, 5000), low=st.floats(0, 0.99), room=st.none() | st.integers(0, 10000)
    )
    def start(self, high: int, low: float, room: int | None) -> None:
        limit = None if room is None else 100000 + room
        self.marks = Watermarks(high=high, low=int(low * high), limit=limit)
        self.buffer = SendBuffer(self.marks)
        self.queued = self.consumed = 0
        self.congested = False
        self.highs = self.lows = 0

    @rule(n=sizes, kind=kinds)
    def append(self, n: int, kind: Callable[[bytes], bytes | memoryview]) -> None:
        buffer = self.buffer
        if not buffer.has_room(n):
            assert buffer.limit is not None
            # Refused only where it would indeed be too much.
            assert buffer.memory + n + ENTRY_OVERHEAD > buffer.limit
            return
        crossing = buffer.append(kind(numbered(self.queued, n)))
        self.queued += n
        rises = not self.congested and self.queued - self.consumed > self.marks.high
        assert crossing is (Crossing.HIGH if rises else Crossing.NONE)
        self.congested |= rises
        self.highs += rises

    @precondition(lambda self: self.queued > self.consumed)
    @rule(share=st.floats(0, 1))
    def write(self, share: float) -> None:
        """What a gather write does: the kernel takes a part of what it was offered."""
        offered = b"".join(self.buffer.gather())
        assert offered == numbered(self.consumed, len(offered))
        self.consume(int(share * len(offered)))

    @rule(share=st.floats(0, 1))
    def consume_any(self, share: float) -> None:
        """What a direct write does: any part of what is queued."""
        self.consume(int(share * (self.queued - self.consumed)))

    def consume(self, n: int) -> None:
        crossing = self.buffer.consume(n)
        self.consumed += n
        sinks = self.congested and self.queued - self.consumed <= self.marks.low
        assert crossing is (Crossing.LOW if sinks else Crossing.NONE)
        self.congested &= not sinks
        self.lows += sinks

    @rule()
    def clear(self) -> None:
        self.buffer.clear()
        assert not self.buffer.gather()
        assert self.buffer.memory == 0
        # What went is no crossing, so the counters begin anew.
        self.consumed = self.queued
        self.congested = False
        self.highs = self.lows = 0

    @invariant()
    def accounts(self) -> None:
        buffer = self.buffer
        size = self.queued - self.consumed
        assert (buffer.size, len(buffer)) == (size, size)
        assert buffer.congested == self.congested
        assert self.highs - self.lows == self.congested
        assert buffer.memory == size + ENTRY_OVERHEAD * buffer.entries
        assert buffer.limit is None or buffer.memory <= buffer.limit
        assert (buffer.entries == 0) == (size == 0)

    @invariant()
    def gather_is_bounded(self) -> None:
        """A gather write offers something, not more than the kernel takes, and little too much."""
        chunks = self.buffer.gather()
        assert bool(chunks) == bool(self.buffer.size)
        assert len(chunks) <= 64
        assert sum(map(len, chunks[:-1])) < 262144
        assert all(len(chunk) for chunk in chunks)

    def teardown(self) -> None:
        if hasattr(self, "buffer"):
            while self.buffer.size:
                offered = b"".join(self.buffer.gather())
                assert offered == numbered(self.consumed, len(offered))
                self.consume(len(offered))
            assert self.consumed == self.queued


SendBufferModel.TestCase.settings = settings(
    deadline=None, derandomize=True, max_examples=60, stateful_step_count=40
)
TestSendBufferModel = SendBufferModel.TestCase


class DroppingModel(RuleBasedStateMachine):
    """A SendBuffer of messages, some of which may be dropped, beside a list of them.

    What is not written yet is a list of messages, each with its number in every byte; of the first
    a part may be written. Dropping takes messages from this list by the rule, and the bytes that
    leave the buffer are always those of the list.
    """

    @initialize(high=st.integers(1, 1000), low=st.floats(0, 0.99), room=st.integers(0, 3000))
    def start(self, high: int, low: float, room: int) -> None:
        self.marks = Watermarks(high=high, low=int(low * high), limit=1024 + room)
        self.buffer = SendBuffer(self.marks)
        # Each message: what is left of it, whether it may be dropped, whether it is whole.
        self.queue: list[tuple[bytes, bool, bool]] = []
        self.made = self.dropped = 0
        self.crossings: list[Crossing] = []

    def note(self, crossing: Crossing) -> None:
        if crossing is not Crossing.NONE:
            self.crossings.append(crossing)

    @rule(n=st.one_of(st.integers(1, 60), st.integers(300, 1500)), may_drop=st.booleans())
    def append(self, n: int, may_drop: bool) -> None:
        if self.buffer.has_room(n):
            self.made += 1
            data = b"%04d" % self.made * (n // 4) + b"." * (n % 4)
            self.note(self.buffer.append(Droppable(data) if may_drop else data))
            self.queue.append((data, may_drop, True))

    @precondition(lambda self: self.queue)
    @rule(share=st.floats(0, 1))
    def write(self, share: float) -> None:
        offered = b"".join(self.buffer.gather())
        assert b"".join(data for data, _, _ in self.queue).startswith(offered)
        n = int(share * len(offered))
        self.note(self.buffer.consume(n))
        while n:
            data, may_drop, _ = self.queue.pop(0)
            if len(data) > n:
                self.queue.insert(0, (data[n:], may_drop, False))
                break
            n -= len(data)

    @rule(n=st.integers(0, 4000))
    def drop_oldest(self, n: int) -> None:
        """Oldest first, none too few and none too many, and only those that may go."""
        before = self.buffer.dropped
        self.note(self.buffer.drop_oldest(n))
        gone = self.buffer.dropped - before
        self.dropped += gone
        could_go = [i for i, (_, may_drop, whole) in enumerate(self.queue) if may_drop and whole]
        assert gone <= len(could_go)
        if self.buffer.has_room(n):
            last = len(self.queue[could_go[gone - 1]][0]) if gone else 0
            limit = self.buffer.limit
            assert limit is not None
            # One less would not have done.
            assert not gone or self.buffer.memory + last + n + 2 * ENTRY_OVERHEAD > limit
        else:
            # Not even all of them would have done, so none went.
            assert gone == 0
            rest = sum(len(self.queue[i][0]) + ENTRY_OVERHEAD for i in could_go)
            assert not self.buffer.has_room(n - rest)
        for i in reversed(could_go[:gone]):
            del self.queue[i]

    @invariant()
    def accounts(self) -> None:
        buffer = self.buffer
        assert buffer.size == sum(len(data) for data, _, _ in self.queue)
        assert (buffer.entries == 0) == (not self.queue)
        assert buffer.memory == buffer.size + ENTRY_OVERHEAD * buffer.entries
        assert buffer.limit is None or buffer.memory <= buffer.limit
        assert buffer.dropped == self.dropped
        assert buffer.droppable == sum(
            len(data) + ENTRY_OVERHEAD for data, may_drop, whole in self.queue if may_drop and whole
        )

    @invariant()
    def crossings_come_in_pairs(self) -> None:
        buffer = self.buffer
        assert self.crossings == [Crossing.HIGH, Crossing.LOW] * buffer.resumes + (
            [Crossing.HIGH] if buffer.congested else []
        )
        assert buffer.pauses == buffer.resumes + buffer.congested
        assert not (buffer.congested and buffer.size <= buffer.low)
        assert buffer.congested or buffer.size <= buffer.high

    def teardown(self) -> None:
        if hasattr(self, "buffer"):
            left = b"".join(data for data, _, _ in self.queue)
            while self.buffer.size:
                offered = b"".join(self.buffer.gather())
                assert offered
                assert left.startswith(offered)
                left = left[len(offered) :]
                self.buffer.consume(len(offered))
            assert not left


DroppingModel.TestCase.settings = settings(
    deadline=None, derandomize=True, max_examples=60, stateful_step_count=40
)
TestDroppingModel = DroppingModel.TestCase


def test_what_may_be_dropped_is_an_entry_of_its_own() -> None:
    """However small: it is not gathered with its neighbours, nor they with it, and one object
    serves every queue.
    """
    message = Droppable(b"news")
    buffers = [SendBuffer(Watermarks(high=1024, low=0, limit=1024)) for _ in range(2)]
    for buffer in buffers:
        buffer.append(b"before")
        buffer.append(message)
        buffer.append(b"after")
        assert [bytes(chunk) for chunk in buffer.gather()] == [b"before", b"news", b"after"]
        assert buffer.gather()[1] is message
        buffer.drop_oldest(800)
        assert b"".join(buffer.gather()) == b"beforeafter"
        assert (buffer.size, buffer.entries, buffer.dropped) == (11, 2, 1)
        # What follows is gathered again, in its place.
        buffer.append(b"wards")
        assert [bytes(chunk) for chunk in buffer.gather()] == [b"before", b"afterwards"]


def test_what_is_partly_written_is_never_dropped() -> None:
    """One byte of it with the kernel, and the rest must follow; with none there, it may go."""
    buffer = SendBuffer(Watermarks(high=1024, low=0, limit=1024))
    buffer.append(b"first")
    for text in (b"second", b"third"):
        buffer.append(Droppable(text))
    buffer.consume(5 + 1)
    buffer.drop_oldest(880)
    assert b"".join(buffer.gather()) == b"econd"
    assert buffer.dropped == 1
    # A whole one at the head, of which nothing is written.
    buffer.consume(5)
    buffer.append(Droppable(b"fourth"))
    buffer.drop_oldest(1024 - ENTRY_OVERHEAD)
    assert (buffer.size, buffer.entries, buffer.dropped) == (0, 0, 2)
    # No room was ever made that is not needed.
    buffer.append(Droppable(b"fifth"))
    buffer.drop_oldest(100)
    assert (buffer.size, buffer.dropped) == (5, 2)


def test_no_more_is_dropped_than_it_takes() -> None:
    """For every size: as few as make room for it, counting the entries that stay; and none where
    not even all of them would.
    """
    for n in range(1100):
        buffer = SendBuffer(Watermarks(high=1024, low=0, limit=1024))
        for _ in range(6):
            buffer.append(b"reply")
            buffer.append(Droppable(b"n" * 16))
        # Each drop gives back its bytes and its entry's share, until all six are gone.
        missing = buffer.memory + ENTRY_OVERHEAD + n - 1024
        needed = max(0, -(-missing // (16 + ENTRY_OVERHEAD)))
        buffer.drop_oldest(n)
        assert buffer.dropped == (needed if needed <= 6 else 0)
        assert b"".join(buffer.gather()) == (
            b"reply" * buffer.dropped + (b"reply" + b"n" * 16) * (6 - buffer.dropped)
        )


def test_nothing_is_dropped_without_a_limit() -> None:
    """With room for anything there is no reason."""
    buffer = SendBuffer(Watermarks(limit=None))
    buffer.append(Droppable(bytes(100000)))
    assert buffer.drop_oldest(2**40) is Crossing.NONE
    assert (buffer.size, buffer.dropped) == (100000, 0)


def test_dropping_may_sink_it() -> None:
    """A drop that brings it to the low mark is a crossing, told once."""
    buffer = SendBuffer(Watermarks(high=1000, low=500, limit=1500))
    buffer.append(Droppable(bytes(400)))
    assert buffer.append(Droppable(bytes(700))) is Crossing.HIGH
    assert buffer.drop_oldest(400) is Crossing.NONE
    assert (buffer.size, buffer.congested) == (700, True)
    assert buffer.drop_oldest(1000) is Crossing.LOW
    assert (buffer.size, buffer.congested) == (0, False)
    assert (buffer.pauses, buffer.resumes) == (1, 1)
    assert buffer.drop_oldest(1000) is Crossing.NONE


@pytest.mark.parametrize("n", [1, 65536, 1048576])
def test_crossings_come_in_pairs(n: int) -> None:
    """However large the sends, each rise above the high mark is told once, each fall once."""
    buffer = SendBuffer(Watermarks())
    told: list[tuple[Crossing, int]] = []
    for _ in range(3):
        while buffer.size <= buffer.high + 2 * n:
            told.append((buffer.append(bytes(n)), buffer.size))
        while buffer.size:
            told.append((buffer.consume(min(1000, buffer.size)), buffer.size))
    changes = [(crossing, size) for crossing, size in told if crossing is not Crossing.NONE]
    assert [crossing for crossing, _ in changes] == [Crossing.HIGH, Crossing.LOW] * 3
    for (_, high), (_, low) in zip(changes[::2], changes[1::2], strict=True):
        # At the first moment that it was so.
        assert buffer.high < high <= buffer.high + n
        assert buffer.low - 1000 < low <= buffer.low


def test_exactly_at_the_marks() -> None:
    """The high mark itself is not above it; the low mark itself is low enough."""
    buffer = SendBuffer(Watermarks(high=100, low=10))
    assert buffer.append(bytes(100)) is Crossing.NONE
    assert not buffer.congested
    assert buffer.append(b"x") is Crossing.HIGH
    assert buffer.append(b"x") is Crossing.NONE
    assert buffer.consume(91) is Crossing.NONE
    assert buffer.congested
    assert buffer.consume(1) is Crossing.LOW
    assert not buffer.congested
    assert buffer.consume(1) is Crossing.NONE
    # Up to just below the high mark and down again is no crossing.
    assert buffer.append(bytes(91)) is Crossing.NONE
    assert buffer.consume(100) is Crossing.NONE


def test_a_low_mark_of_zero_is_empty() -> None:
    """With a low mark of 0 a congested buffer stays so until it is empty."""
    buffer = SendBuffer(Watermarks(high=1, low=0))
    assert buffer.append(b"ab") is Crossing.HIGH
    assert buffer.consume(1) is Crossing.NONE
    assert buffer.consume(1) is Crossing.LOW


def test_a_million_small_sends() -> None:
    """A million sends of one byte are a few entries; what is counted is what is used."""
    buffer = SendBuffer(Watermarks(limit=None))
    for _ in range(1000000):
        buffer.append(b"x")
    assert buffer.size == 1000000
    assert buffer.entries <= 100
    assert buffer.memory <= 1010000
    # None of them so large that growing it would move much.
    assert max(map(len, buffer._chunks)) <= 16384
    used = sys.getsizeof(buffer._chunks) + sum(map(sys.getsizeof, buffer._chunks))
    # A bytearray grows by an eighth more than it needs.
    assert used <= 1.2 * buffer.memory


@pytest.mark.parametrize(
    ("n", "share"),
    # A bytearray grows by an eighth more than it needs.
    [(1, 1.2), (511, 1.2), (512, 1.01), (600, 1.01), (65536, 1.01)],
)
def test_overhead_is_counted(n: int, share: float) -> None:
    """For every size of send, what the queue really takes is no more than what is counted."""
    times = 4000000 // (n + 200)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        buffer = SendBuffer(Watermarks(limit=None))
        for i in range(times):
            # A new object each time, as from a user who makes messages.
            buffer.append(b"%08d" % i * (n // 8) + b"." * (n % 8))
        used = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert buffer.size == n * times
    assert used <= share * buffer.memory + 2000


def test_small_sends_in_pieces_leave_in_pieces() -> None:
    """A queue of small sends that drains as it grows neither loses a byte nor gathers entries."""
    buffer = SendBuffer(Watermarks())
    queued = consumed = 0
    for step in range(20000):
        n = step % 7 + 1
        buffer.append(numbered(queued, n))
        queued += n
        if step % 3 == 0:
            offered = b"".join(buffer.gather())
            assert offered == numbered(consumed, len(offered))
            n = max(1, len(offered) - 5)
            buffer.consume(n)
            consumed += n
        # What is left of the only entry is still the one to gather in.
        assert buffer.entries <= 1
    assert buffer.size == queued - consumed


@pytest.mark.parametrize("n", [512, 4096, 1048576])
def test_large_bytes_are_kept_by_reference(n: int) -> None:
    """A broadcast's message is one object in every queue, from its first write to its last."""
    message = bytes(n)
    buffers = [SendBuffer(Watermarks(limit=None)) for _ in range(100)]
    references = sys.getrefcount(message)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for buffer in buffers:
            buffer.append(message)
        assert tracemalloc.get_traced_memory()[0] - before < 50000
    finally:
        tracemalloc.stop()
    assert sys.getrefcount(message) == references + len(buffers)
    for buffer in buffers:
        (chunk,) = buffer.gather()
        assert chunk is message
        buffer.consume(n - 10)
        (rest,) = buffer.gather()
        assert isinstance(rest, memoryview)
        assert rest.obj is message
        buffer.consume(10)
        del chunk, rest
    assert sys.getrefcount(message) == references


@pytest.mark.parametrize(("n", "chunks"), [(1000, 64), (65536, 4), (100000, 3), (1000000, 1)])
def test_gather_bounds(n: int, chunks: int) -> None:
    """A gather write takes at most 64 chunks, and none beyond 256 KiB; one is always offered."""
    buffer = SendBuffer(Watermarks(limit=None))
    message = bytes(n)
    for _ in range(100):
        buffer.append(message)
    assert [len(chunk) for chunk in buffer.gather()] == [n] * chunks
    assert buffer.entries == 100


@given(
    limit=st.integers(1024, 100000),
    queued=st.lists(st.integers(1, 3000), max_size=40),
    n=st.integers(0, 120000),
)
@pure
def test_room(limit: int, queued: list[int], n: int) -> None:
    """What has room stays within the limit once it is queued, and what ever has, has it when empty.

    The limit counts the overhead of entries, so it holds for small sends as for large ones.
    """
    buffer = SendBuffer(Watermarks(high=1000, low=0, limit=limit))
    assert buffer.can_ever_hold(n) == buffer.has_room(n)
    for size in queued:
        if buffer.has_room(size):
            buffer.append(bytes(size))
    assert buffer.memory <= limit
    if buffer.has_room(n):
        assert buffer.memory + n <= limit
        assert buffer.can_ever_hold(n)
    buffer.consume(buffer.size)
    assert buffer.has_room(n) == buffer.can_ever_hold(n) == (n + ENTRY_OVERHEAD <= limit)


def test_no_limit() -> None:
    """Without a limit there is room for anything, always."""
    buffer = SendBuffer(Watermarks(limit=None))
    buffer.append(bytes(100000))
    assert buffer.has_room(2**40)
    assert buffer.can_ever_hold(2**40)


def test_bytes_view() -> None:
    """Whatever its items are, data is counted and sliced in bytes, also where there are none."""
    numbers = array.array("i", [1, 2, 3])
    for data in (numbers, memoryview(numbers), memoryview(numbers).cast("B").cast("B", (3, 4))):
        view = bytes_view(data)  # type: ignore[arg-type]
        assert len(view) == numbers.itemsize * 3
        assert view[4:].tobytes() == numbers.tobytes()[4:]
    for empty in (b"", bytearray(), memoryview(b""), memoryview(array.array("i"))):
        assert len(bytes_view(empty)) == 0
    with pytest.raises(TypeError):
        bytes_view(memoryview(b"every other")[::2])
    for no_data in (5, "text", None):
        with pytest.raises(TypeError):
            bytes_view(no_data)  # type: ignore[arg-type]


def test_kept() -> None:
    """What cannot change is kept as it is, and what can is copied."""
    fixed = bytes(range(100))
    assert kept(fixed) is fixed
    view = memoryview(fixed)[10:20]
    assert kept(view) is view
    data = bytearray(fixed)
    for part in (memoryview(data)[10:20], memoryview(data).toreadonly()[10:20]):
        copy = kept(part)
        data[15] ^= 0xFF
        assert copy == fixed[10:20]
        data[15] ^= 0xFF


def test_append_below() -> None:
    """It appends up to the high mark and within the limit, and beyond that does nothing."""
    buffer = SendBuffer(Watermarks(high=1200, low=10, limit=1200 + 2 * ENTRY_OVERHEAD))
    assert buffer.append_below(b"x" * 600)
    assert not buffer.append_below(b"y" * 601)
    assert buffer.append_below(b"y" * 600)
    assert (buffer.size, buffer.congested, buffer.entries) == (1200, False, 2)
    assert not buffer.append_below(b"z")
    assert buffer.consume(1199) is Crossing.NONE
    assert buffer.append_below(b"z")
    assert b"".join(map(bytes, buffer.gather())) == b"yz"


def test_append_below_at_the_limit() -> None:
    """The queue's own overhead counts: where an entry has no room, nothing is appended."""
    buffer = SendBuffer(Watermarks(high=1024, low=10, limit=1024))
    assert buffer.append_below(b"x" * (1024 - 2 * ENTRY_OVERHEAD))
    assert buffer.append_below(b"y" * ENTRY_OVERHEAD) is False
    assert buffer.entries == 1


def test_what_may_be_dropped_stays_an_entry_of_its_own() -> None:
    """`append_below` gathers small data, but not what may be dropped whole."""
    buffer = SendBuffer(Watermarks())
    for data in (b"a", b"b", Droppable(b"c"), b"d"):
        assert buffer.append_below(data)
    assert [bytes(chunk) for chunk in buffer.gather()] == [b"ab", b"c", b"d"]
