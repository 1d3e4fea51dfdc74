"""Buffer: whatever is done to it, it is a queue of bytes; and it neither copies nor looks twice."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from trioreactor import Buffer

pytestmark = pytest.mark.pure

pure = settings(deadline=None, derandomize=True, max_examples=100)

WIDTHS = {8: "!b", 16: "!h", 32: "!i", 64: "!q"}
widths = st.sampled_from(sorted(WIDTHS))

# Few different bytes, so that delimiters occur, also across the seams of chunks.
short = st.binary(max_size=12).map(lambda data: bytes(byte % 3 + 97 for byte in data))
# Long enough to pass the size at which consumed bytes are deleted.
long = st.builds(lambda piece, times: piece * times, short, st.integers(1, 2000))
contents = st.one_of(short, short, long)
# All that append and prepend take.
kinds: st.SearchStrategy[Callable[[bytes], bytes | bytearray | memoryview]] = st.sampled_from(
    [bytes, bytearray, memoryview, lambda data: memoryview(bytearray(data))]
)
delimiters = st.binary(min_size=1, max_size=3).map(lambda d: bytes(byte % 4 + 97 for byte in d))


class BufferModel(RuleBasedStateMachine):
    """A Buffer beside the plain bytes that it stands for."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer = Buffer()
        self.model = b""
        # The largest piece that the buffer has been given, or has made of its whole content.
        self.chunk = 0

    @initialize(data=contents, kind=kinds)
    def start(self, data: bytes, kind: Callable[[bytes], bytes | bytearray | memoryview]) -> None:
        self.buffer = Buffer(kind(data))
        self.model = data
        self.chunk = len(data)

    @rule(data=contents, kind=kinds)
    def append(self, data: bytes, kind: Callable[[bytes], bytes | bytearray | memoryview]) -> None:
        self.buffer.append(kind(data))
        self.model += data
        self.chunk = max(self.chunk, len(data))

    @rule(data=contents, kind=kinds)
    def prepend(self, data: bytes, kind: Callable[[bytes], bytes | bytearray | memoryview]) -> None:
        self.buffer.prepend(kind(data))
        self.model = data + self.model
        self.chunk = max(self.chunk, len(self.model))

    @rule(share=st.floats(0, 1))
    def take(self, share: float) -> None:
        n = int(share * len(self.model))
        taken = self.buffer.take(n)
        assert type(taken) is bytes
        assert taken == self.model[:n]
        self.model = self.model[n:]

    @rule()
    def take_all(self) -> None:
        taken = self.buffer.take()
        assert type(taken) is bytes
        assert taken == self.model
        self.model = b""

    @rule(share=st.floats(0, 1))
    def discard(self, share: float) -> None:
        n = int(share * len(self.model))
        self.buffer.discard(n)
        self.model = self.model[n:]

    @rule(n=st.none() | st.integers(0, 20) | st.integers(0, 30000))
    def peek(self, n: int | None) -> None:
        peeked = self.buffer.peek(n)
        assert type(peeked) is bytes
        assert peeked == self.model[:n]

    @rule(delimiter=delimiters, start=st.just(0) | st.integers(0, 30) | st.integers(0, 30000))
    def find(self, delimiter: bytes, start: int) -> None:
        assert self.buffer.find(delimiter, start) == self.model.find(delimiter, start)

    @rule(width=widths, data=st.data())
    def append_int(self, width: int, data: st.DataObject) -> None:
        value = data.draw(st.integers(-(2 ** (width - 1)), 2 ** (width - 1) - 1))
        getattr(self.buffer, f"append_int{width}")(value)
        self.model += struct.pack(WIDTHS[width], value)

    @rule(width=widths, data=st.data())
    def prepend_int(self, width: int, data: st.DataObject) -> None:
        value = data.draw(st.integers(-(2 ** (width - 1)), 2 ** (width - 1) - 1))
        getattr(self.buffer, f"prepend_int{width}")(value)
        self.model = struct.pack(WIDTHS[width], value) + self.model
        self.chunk = max(self.chunk, len(self.model))

    @rule(width=widths, consume=st.booleans())
    def read_int(self, width: int, consume: bool) -> None:
        method = getattr(self.buffer, f"{'read' if consume else 'peek'}_int{width}")
        size = width // 8
        if len(self.model) < size:
            with pytest.raises(ValueError, match=f"asked for {size} bytes"):
                method()
        else:
            assert method() == struct.unpack(WIDTHS[width], self.model[:size])[0]
            if consume:
                self.model = self.model[size:]

    @precondition(lambda self: len(self.model) < 30000)
    @rule(extra=st.integers(1, 5))
    def ask_for_too_much(self, extra: int) -> None:
        for method in (self.buffer.take, self.buffer.discard):
            with pytest.raises(ValueError, match="asked for"):
                method(len(self.model) + extra)
            with pytest.raises(ValueError, match="asked for"):
                method(-extra)

    @invariant()
    def same_content(self) -> None:
        assert len(self.buffer) == self.buffer.size == len(self.model)
        assert bytes(self.buffer) == self.model

    @invariant()
    def bounded_memory(self) -> None:
        """What is consumed and still held is no more than what is readable, plus one chunk."""
        assert len(self.buffer._data) <= 2 * len(self.model) + max(4096, self.chunk)


BufferModel.TestCase.settings = settings(
    deadline=None, derandomize=True, max_examples=60, stateful_step_count=40
)
TestBufferModel = BufferModel.TestCase


def test_a_single_chunk_passes_through() -> None:
    """A chunk that nobody touched is handed over as the very object that was appended."""
    chunk = bytes(range(256)) * 256
    for consume in (
        lambda buffer: buffer.take(),
        lambda buffer: buffer.take(len(chunk)),
        lambda buffer: buffer.peek(),
    ):
        buffer = Buffer()
        buffer.append(chunk)
        assert consume(buffer) is chunk
    # Looking at it is not touching it, and the buffer may have been used before.
    buffer = Buffer(b"earlier")
    buffer.append(b" bytes")
    buffer.take()
    buffer.append(chunk)
    assert buffer.find(b"not there") == -1
    assert buffer.peek_int32() == struct.unpack("!i", chunk[:4])[0]
    assert buffer.take() is chunk
    assert len(buffer) == 0


def test_a_consumed_buffer_keeps_nothing() -> None:
    """An empty buffer holds no memory of what went through it."""
    for consume in (
        lambda buffer: buffer.take(),
        lambda buffer: buffer.discard(len(buffer)),
        lambda buffer: [buffer.read_int8() for _ in range(len(buffer))],
    ):
        buffer = Buffer(bytes(5000))
        buffer.append(bytes(5000))
        consume(buffer)
        assert buffer._data == b""


def test_what_was_appended_may_change_afterwards() -> None:
    """A bytearray belongs to its owner: changing it later does not change the buffer."""
    data = bytearray(b"before")
    buffer = Buffer(data)
    buffer.append(data)
    other = Buffer()
    other.append(data)
    other.prepend(data)
    data[:] = b"after!"
    assert buffer.take() == b"beforebefore"
    assert other.take() == b"beforebefore"


def test_what_was_taken_does_not_change_afterwards() -> None:
    """What peek and take returned stays what it was, whatever becomes of the buffer."""
    buffer = Buffer(b"abc")
    buffer.append(b"def")
    peeked, taken = buffer.peek(), buffer.take(2)
    buffer.append(b"ghi")
    buffer.prepend(b"xy")
    assert (peeked, taken) == (b"abcdef", b"ab")


# Pieces of delimiters, so that they come in parts, and numbers of bytes to consume in between.
steps = st.lists(st.sampled_from([b"", b"a", b"b", b"ab", b"ba", b"aa", 1, 2, 5]), max_size=30)


@given(steps=steps, delimiter=st.sampled_from([b"a", b"ab", b"aba", b"bb"]))
@settings(pure, max_examples=400)
def test_find_across_chunks(steps: list[bytes | int], delimiter: bytes) -> None:
    """A delimiter is found as soon as its last byte has come, however it is split."""
    buffer = Buffer()
    model = b""
    for step in steps:
        if isinstance(step, bytes):
            buffer.append(step)
            model += step
        else:
            n = min(step, len(model))
            buffer.discard(n)
            model = model[n:]
        assert buffer.find(delimiter) == model.find(delimiter)


@pytest.mark.parametrize("delimiter", [b"\n", b"\r\n", b"--end--"])
def test_find_never_looks_twice(delimiter: bytes) -> None:
    """Waiting for a delimiter looks at each byte once, but for those that it may begin in.

    Before each search a delimiter is hidden in what was searched already: a search that looked
    there again would find it.
    """
    buffer = Buffer()
    searched = 0
    for round_ in range(200):
        buffer.append(b"." * 50)
        if round_ % 7 == 6:
            # Consuming from the front does not make it forget.
            assert buffer.take(20) == b"." * 20
            searched = max(0, searched - 20)
        hidden = max(0, searched - len(delimiter))
        content = buffer._data
        at = slice(buffer._start + hidden, buffer._start + hidden + len(delimiter))
        if round_:
            assert isinstance(content, bytearray)
            content[at] = delimiter
        assert buffer.find(delimiter) == -1
        if round_:
            assert isinstance(content, bytearray)
            content[at] = b"." * len(delimiter)
        # All but the bytes in which a delimiter can still begin.
        searched = len(buffer) - len(delimiter) + 1
    buffer.append(delimiter)
    assert buffer.find(delimiter) == len(buffer) - len(delimiter)


def test_find_remembers_the_question_too() -> None:
    """What is remembered of one search is not used for another one."""
    buffer = Buffer(b"one;two\nthree")
    assert buffer.find(b"\r") == -1
    assert buffer.find(b"\n") == 7
    # It looked from 8 on only, which says nothing of what lies before.
    assert buffer.find(b"\n", 8) == -1
    assert buffer.find(b"\n") == 7
    assert buffer.find(b";", 4) == -1
    assert buffer.find(b";", 0) == 3


def test_find_forgets_what_is_gone() -> None:
    """New content is searched from its own beginning."""
    buffer = Buffer(b"no delimiter in here")
    assert buffer.find(b"\n") == -1
    buffer.take()
    buffer.append(b"\n")
    assert buffer.find(b"\n") == 0
    buffer = Buffer(b"none")
    assert buffer.find(b"\n") == -1
    buffer.prepend(b"a\n")
    assert buffer.find(b"\n") == 1


@pytest.mark.parametrize("width", sorted(WIDTHS))
def test_integers_are_signed_and_in_network_order(width: int) -> None:
    """Every width goes through at its bounds, most significant byte first."""
    size = width // 8
    largest, smallest = 2 ** (width - 1) - 1, -(2 ** (width - 1))
    buffer = Buffer()
    append = getattr(buffer, f"append_int{width}")
    prepend = getattr(buffer, f"prepend_int{width}")
    read = getattr(buffer, f"read_int{width}")
    peek = getattr(buffer, f"peek_int{width}")
    append(smallest)
    append(-1)
    prepend(largest)
    assert bytes(buffer) == (
        largest.to_bytes(size, "big") + b"\x80" + bytes(size - 1) + b"\xff" * size
    )
    assert peek() == largest
    assert [read(), read(), read()] == [largest, smallest, -1]
    assert len(buffer) == 0


@pytest.mark.parametrize("width", sorted(WIDTHS))
def test_an_integer_that_does_not_fit(width: int) -> None:
    """An integer out of range raises struct.error, and the buffer is as before."""
    buffer = Buffer(b"content")
    for value in (2 ** (width - 1), -(2 ** (width - 1)) - 1):
        for method in ("append", "prepend"):
            with pytest.raises(struct.error):
                getattr(buffer, f"{method}_int{width}")(value)
    assert bytes(buffer) == b"content"


def test_errors_consume_nothing() -> None:
    """What is asked for and not there raises, says how much there is, and changes nothing."""
    buffer = Buffer(b"ab")
    buffer.append(b"c")
    for call in (
        lambda: buffer.take(4),
        lambda: buffer.take(-1),
        lambda: buffer.discard(4),
        lambda: buffer.discard(-1),
        buffer.read_int32,
        buffer.peek_int64,
        buffer.read_int64,
    ):
        with pytest.raises(ValueError, match="buffer that holds 3"):
            call()
    with pytest.raises(ValueError, match="pass a number >= 0"):
        buffer.peek(-1)
    with pytest.raises(ValueError, match="pass at least one byte"):
        buffer.find(b"")
    with pytest.raises(ValueError, match="pass a number >= 0"):
        buffer.find(b"a", -1)
    assert buffer.take() == b"abc"


def test_an_int_is_no_data() -> None:
    """A number is refused: Python would read it as that many zero bytes."""
    with pytest.raises(TypeError):
        Buffer(5)  # type: ignore[arg-type]
    for buffer in (Buffer(), Buffer(b"content")):
        with pytest.raises(TypeError):
            buffer.append(5)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            buffer.prepend(5)  # type: ignore[arg-type]


def test_a_long_stream_through_a_short_buffer() -> None:
    """A reader that always leaves a little unconsumed costs no memory that grows."""
    buffer = Buffer()
    chunk = bytes(65536)
    largest = 0
    for _ in range(500):
        buffer.append(chunk)
        largest = max(largest, len(buffer._data))
        buffer.discard(len(buffer) - 10)
        largest = max(largest, len(buffer._data))
    assert len(buffer) == 10
    assert largest <= 3 * len(chunk)


def test_consumed_bytes_are_let_go() -> None:
    """While a large content is consumed little by little, so is the memory."""
    buffer = Buffer()
    for _ in range(1000):
        buffer.append(bytes(1000))
    while buffer.size:
        buffer.discard(1000)
        assert len(buffer._data) <= 2 * buffer.size + 4096


def test_repr_shows_the_size_and_not_the_content() -> None:
    """A log line about a buffer is short, and gives away nothing of what is in it."""
    assert repr(Buffer(b"secret" * 1000)) == "<Buffer of 6000 bytes>"


def test_views_of_larger_items_count_in_bytes() -> None:
    """A memoryview of wider items is the bytes it stands for."""
    view = memoryview(bytes(range(8))).cast("i")
    buffer = Buffer(view)
    buffer.append(view)
    buffer.prepend(view)
    assert bytes(buffer) == bytes(range(8)) * 3
    buffer.discard(9)
    buffer.prepend(view)
    assert bytes(buffer) == bytes(range(8)) + (bytes(range(8)) * 3)[9:]


@given(head=contents, tail=contents, skipped=st.integers(0, 40), offset=st.integers(0, 40))
@pure
def test_unpack_is_struct_s_own_on_what_is_readable(
    head: bytes, tail: bytes, skipped: int, offset: int
) -> None:
    """`unpack` looks at what lies *offset* bytes from the front, and consumes nothing."""
    buffer = Buffer(head)
    buffer.append(tail)
    buffer.discard(min(skipped, buffer.size))
    readable = bytes(buffer)
    for layout in map(struct.Struct, ["!b", "<h", "!iH", "<q", "!3s"]):
        if offset + layout.size <= len(readable):
            assert buffer.unpack(layout, offset) == layout.unpack_from(readable, offset)
        else:
            with pytest.raises(ValueError, match=f"asked for {offset + layout.size} bytes"):
                buffer.unpack(layout, offset)
        assert bytes(buffer) == readable


def test_unpack_does_not_look_behind_the_front() -> None:
    """What has been consumed is gone, also for an offset that would point back to it."""
    buffer = Buffer(b"abcd")
    buffer.append(b"efgh")
    buffer.discard(2)
    with pytest.raises(ValueError, match="cannot unpack from -2: pass a number >= 0"):
        buffer.unpack(struct.Struct("!h"), -2)
    assert buffer.unpack(struct.Struct("!2s")) == (b"cd",)


@pytest.mark.parametrize("chunks", [[b"head-and-body"], [b"head", b"-and-body"]])
def test_take_after(chunks: list[bytes]) -> None:
    """What is behind a header comes alone, from one chunk as from several; both are consumed."""
    buffer = Buffer()
    for chunk in chunks:
        buffer.append(chunk)
    assert (buffer.take_after(5, 3), bytes(buffer)) == (b"and", b"-body")
    assert (buffer.take_after(0, 1), bytes(buffer)) == (b"-", b"body")
    taken = buffer.take_after(2, 2)
    assert (type(taken), taken, len(buffer)) == (bytes, b"dy", 0)
    assert buffer.take_after(0, 0) == b""


@pytest.mark.parametrize(("skip", "n"), [(3, 3), (6, 0), (0, 6), (-1, 2), (2, -1)])
def test_take_after_what_is_not_there(skip: int, n: int) -> None:
    """Raises, and consumes nothing."""
    buffer = Buffer(b"12345")
    with pytest.raises(ValueError, match="of a buffer that holds 5"):
        buffer.take_after(skip, n)
    assert bytes(buffer) == b"12345"
