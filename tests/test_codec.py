"""Codec: what all codecs promise, `map`, `on_message`, and the types of messages."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import textwrap
from array import array
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import trioreactor
from tests.decoding import check_every_cut, decoded
from trioreactor import (
    NEED_MORE,
    Buffer,
    Codec,
    DelimiterCodec,
    FixedLengthCodec,
    FrameTooLarge,
    IncompleteFrame,
    JsonLinesCodec,
    LengthHeaderCodec,
    LineCodec,
    NeedMore,
    NetstringCodec,
    ProtocolError,
    TcpConnection,
    VarintCodec,
)
from trioreactor.codec import MESSAGES_PER_TURN

pytestmark = pytest.mark.pure

pure = settings(deadline=None, derandomize=True, max_examples=20)

# Each with a message of four bytes on the wire.
CODECS: list[tuple[Codec[Any], Any]] = [
    (LengthHeaderCodec(), b"four"),
    (LengthHeaderCodec(3, offset=2, checksum="crc32"), b"four"),
    (VarintCodec(), b"four"),
    (NetstringCodec(), b"four"),
    (FixedLengthCodec(4), b"four"),
    (LineCodec(), "four"),
    (LineCodec(None, ending="\r\n"), b"four"),
    (DelimiterCodec(b"--"), b"four"),
    (JsonLinesCodec(), 1234),
    (VarintCodec().map(str.encode, bytes.decode), "four"),
]
OF_BYTES = [codec for codec, message in CODECS if isinstance(message, bytes)]
each = pytest.mark.parametrize(
    ("codec", "message"), CODECS, ids=[f"{n}-{type(c).__name__}" for n, (c, _) in enumerate(CODECS)]
)


class FakeConnection:
    """What a `MessageDelivery` sees of a connection."""

    def __init__(self) -> None:
        self.delivering = True
        self.again = 0
        self.told: list[tuple[int, int]] = []

    def deliver_again(self) -> None:
        self.again += 1

    def decoded(self, messages: int, left_over: int) -> None:
        self.told.append((messages, left_over))


def fake() -> tuple[FakeConnection, TcpConnection]:
    """The same object twice, once for the test and once for the type checker."""
    conn = FakeConnection()
    return conn, cast(TcpConnection, conn)


@each
def test_nothing_is_decoded_from_nothing(codec: Codec[Any], message: Any) -> None:
    """An empty buffer holds no message, and needs more is not mistaken for one."""
    assert codec.decode(Buffer()) is NEED_MORE
    assert codec.decode(Buffer(codec.encode(message))) == message


@each
def test_one_codec_serves_many_connections(codec: Codec[Any], message: Any) -> None:
    """A codec keeps nothing between calls: streams that take turns byte by byte do not mix."""
    stream = codec.encode(message) * 2
    buffers = [Buffer() for _ in range(3)]
    got: list[list[Any]] = [[] for _ in buffers]
    for turn in range(len(stream) + len(buffers)):
        # Each is a byte behind the one before.
        for late, buffer in enumerate(buffers):
            buffer.append(stream[max(turn - late, 0) : max(turn - late + 1, 0)])
            message_or_not = codec.decode(buffer)
            if message_or_not is not NEED_MORE:
                got[late].append(message_or_not)
    assert got == [[message, message]] * 3


@each
def test_an_end_between_two_messages_is_fine_and_inside_one_is_not(
    codec: Codec[Any], message: Any
) -> None:
    """`check_end` raises `IncompleteFrame` after every beginning of a message but the empty one."""
    stream = codec.encode(message)
    for cut in range(len(stream)):
        buffer = Buffer(stream + stream[:cut])
        assert codec.decode(buffer) == message
        assert codec.decode(buffer) is NEED_MORE
        if not cut:
            codec.check_end(buffer)
            continue
        with pytest.raises(IncompleteFrame, match=f"inside a message, {cut} bytes into it"):
            codec.check_end(buffer)


@each
def test_what_is_sent_is_bytes(codec: Codec[Any], message: Any) -> None:
    """Whatever kind of bytes a message is, `bytes` go out and come back, independent of it."""
    if not isinstance(message, bytes):
        assert type(codec.encode(message)) is bytes
        return
    given_message = bytearray(message)
    encoded = [codec.encode(given_message), codec.encode(memoryview(given_message))]
    given_message[:] = bytes(len(given_message))
    for stream in encoded:
        assert type(stream) is bytes
        received = codec.decode(Buffer(bytearray(stream)))
        assert type(received) is bytes
        assert received == message


class Subclass(bytes):
    """Bytes that somebody has given a meaning."""


@pytest.mark.parametrize("codec", OF_BYTES, ids=lambda codec: type(codec).__name__)
@pytest.mark.parametrize(
    "message",
    [
        memoryview(b"four").cast("H"),
        memoryview(b"four").cast("I"),
        memoryview(b"four").cast("B", (2, 2)),
        memoryview(b"f-o-u-r-")[::2],
        Subclass(b"four"),
    ],
    ids=["wide", "wider", "square", "with gaps", "subclass"],
)
def test_a_view_is_sent_as_its_bytes(codec: Codec[Any], message: Any) -> None:
    """A length counts bytes, whatever the items of a memoryview are and wherever they lie."""
    stream = codec.encode(message)
    assert type(stream) is bytes
    assert stream == codec.encode(b"four")


@pytest.mark.parametrize("codec", OF_BYTES, ids=lambda codec: type(codec).__name__)
@pytest.mark.parametrize("message", ["four", [1, 2, 3, 4], 4, None, array("B", b"four")])
def test_what_is_no_bytes_cannot_be_sent(codec: Codec[Any], message: Any) -> None:
    """It is a `ValueError` that says which codec wants what, and not sent as something else."""
    advice = f"{type(codec).__name__} sends bytes, so pass bytes, a bytearray or a memoryview"
    with pytest.raises(ValueError, match=f"a message of type {type(message).__name__}: {advice}"):
        codec.encode(message)


@pytest.mark.parametrize(
    "make",
    [
        lambda max_frame: LengthHeaderCodec(max_frame=max_frame),
        lambda max_frame: VarintCodec(max_frame=max_frame),
        lambda max_frame: NetstringCodec(max_frame=max_frame),
        lambda max_frame: LineCodec(max_frame=max_frame),
        lambda max_frame: DelimiterCodec(b"\n", max_frame=max_frame),
        lambda max_frame: JsonLinesCodec(max_frame=max_frame),
    ],
)
def test_there_is_always_a_limit(make: Callable[[Any], Codec[Any]]) -> None:
    """`max_frame` is 64 KiB unless it is given, at least 1, a whole number, and never off."""
    assert make(17).max_frame == 17
    assert make(1).max_frame == 1
    with pytest.raises(TypeError, match="cannot be turned off, pass a number"):
        make(None)
    name = type(make(1)).__name__
    with pytest.raises(ValueError, match=rf"^{name}\(max_frame=0\): pass at least 1 bytes"):
        make(0)
    with pytest.raises(TypeError, match=rf"^{name}\("):
        make(None)
    for wrong in (1.5, "64", True):
        with pytest.raises(TypeError, match=r"Codec\(max_frame=.*\): pass a whole number of bytes"):
            make(wrong)


def test_the_default_limit() -> None:
    """64 KiB, and for messages of one size that size."""
    assert {codec.max_frame for codec, _ in CODECS} == {65536, 4}
    assert FixedLengthCodec(4).max_frame == 4


# -- map


@given(st.lists(st.text(max_size=6), min_size=1, max_size=3))
@pure
def test_mapped_messages_come_back_wherever_they_are_cut(messages: list[str]) -> None:
    """`map` changes the messages and nothing of the framing; and it can be applied twice."""
    codec = NetstringCodec().map(str.encode, bytes.decode).map(json.dumps, json.loads)
    stream = b"".join(map(codec.encode, messages))
    assert check_every_cut(codec, stream) == (messages, None, b"")


def test_a_mapped_codec_keeps_the_framing_s_limit() -> None:
    """The limit, its errors in both directions, and the check at the end are the framing's."""

    class Unending(VarintCodec):
        def check_end(self, buffer: Buffer) -> None:
            raise IncompleteFrame("as the framing says")

    codec = Unending(max_frame=10).map(str.encode, bytes.decode)
    assert codec.max_frame == 10
    with pytest.raises(ValueError, match="11 bytes, and at most 10"):
        codec.encode("x" * 11)
    with pytest.raises(FrameTooLarge):
        codec.decode(Buffer(b"\x0b"))
    with pytest.raises(IncompleteFrame, match="as the framing says"):
        codec.check_end(Buffer())


@pytest.mark.parametrize(
    "raised", [ValueError, KeyError, RecursionError, MemoryError, ZeroDivisionError]
)
def test_what_a_decoder_raises_is_the_peer_s_fault(raised: type[Exception]) -> None:
    """Any error of the `decode` given to `map` becomes a `ProtocolError`, with its cause."""

    def decode(frame: bytes) -> str:
        raise raised("no good")

    codec = VarintCodec().map(str.encode, decode)
    with pytest.raises(ProtocolError, match=r"cannot be decoded: .*no good") as caught:
        codec.decode(Buffer(b"\x01a"))
    assert type(caught.value.__cause__) is raised


def test_what_is_no_error_of_the_decoder_passes_through_it() -> None:
    """Ctrl-C in a decoder stays what it is."""

    def decode(frame: bytes) -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        VarintCodec().map(str.encode, decode).decode(Buffer(b"\x01a"))


def test_what_an_encoder_raises_leaves_as_it_is() -> None:
    """An error of the `encode` given to `map` is the sender's own."""
    codec = VarintCodec().map(lambda number: (10 // number).to_bytes(1, "big"), int.from_bytes)
    assert codec.decode(Buffer(codec.encode(5))) == 2
    with pytest.raises(ZeroDivisionError):
        codec.encode(0)


# -- on_message


def test_all_messages_are_delivered_in_order() -> None:
    """One call delivers what there is; the beginning of another stays, and is reported."""
    seen: list[tuple[object, bytes]] = []
    fake_conn, conn = fake()
    delivery = VarintCodec().on_message(lambda c, m: seen.append((c, m)))
    buffer = Buffer(b"\x01a\x00\x02bc\x03d")
    delivery(conn, buffer)
    assert seen == [(conn, b"a"), (conn, b""), (conn, b"bc")]
    assert bytes(buffer) == b"\x03d"
    assert (fake_conn.told, fake_conn.again) == ([(3, 2)], 0)
    buffer.append(b"ef")
    delivery(conn, buffer)
    assert seen[3:] == [(conn, b"def")]
    assert (fake_conn.told[1:], fake_conn.again) == ([(1, 0)], 0)


@pytest.mark.parametrize("spare", [-1, 0, 1, MESSAGES_PER_TURN])
def test_a_turn_is_bounded(spare: int) -> None:
    """After 32 messages the others have their turn, and the rest is asked for if there is any.

    Each turn is reported: else a deadline would go on for a message that has long been complete.
    What has not been looked at does not count as begun, for it may be whole messages.
    """
    assert MESSAGES_PER_TURN == 32
    many = MESSAGES_PER_TURN + spare
    seen: list[bytes] = []
    fake_conn, conn = fake()
    delivery = FixedLengthCodec(1).on_message(lambda _, m: seen.append(m))
    buffer = Buffer(bytes(many))
    delivery(conn, buffer)
    first = min(many, MESSAGES_PER_TURN)
    assert len(seen) == first
    assert fake_conn.told == [(first, 0)]
    assert fake_conn.again == (1 if spare > 0 else 0)
    if spare > 0:
        delivery(conn, buffer)
        assert len(seen) == many
        assert fake_conn.told[1:] == [(spare, 0)]
        assert fake_conn.again == 1


@pytest.mark.parametrize("left", [b"", b"\x01b", b"\x02b"])
def test_nothing_is_delivered_after_a_stop(left: bytes) -> None:
    """A callback that stops reading, or closes, is not called again; the rest stays for later.

    Meanwhile no message counts as begun: the peer is not to blame for the pause.
    """
    seen: list[bytes] = []
    fake_conn, conn = fake()

    def callback(_: TcpConnection, message: bytes) -> None:
        seen.append(message)
        fake_conn.delivering = False

    buffer = Buffer(b"\x01a" + left)
    VarintCodec().on_message(callback)(conn, buffer)
    assert seen == [b"a"]
    assert bytes(buffer) == left
    assert (fake_conn.told, fake_conn.again) == ([(1, 0)], 0)


def test_messages_before_an_error_are_delivered() -> None:
    """What came before the peer's mistake is delivered, then the error leaves the callback."""
    seen: list[bytes] = []
    _, conn = fake()
    with pytest.raises(FrameTooLarge):
        VarintCodec(max_frame=5).on_message(lambda _, m: seen.append(m))(
            conn, Buffer(b"\x01a\x01b\x06")
        )
    assert seen == [b"a", b"b"]


def test_a_callback_s_error_leaves_it() -> None:
    """An error of the callback itself is not taken for the peer's."""
    _, conn = fake()
    buffer = Buffer(b"\x01a\x01b")
    with pytest.raises(KeyError):
        VarintCodec().on_message(lambda _, m: {}[m])(conn, buffer)
    assert bytes(buffer) == b"\x01b"


def test_the_peer_s_eof_is_checked_by_the_codec() -> None:
    """`at_eof`, which `dispatch` calls: inside a message an EOF is an `IncompleteFrame`."""
    delivery = VarintCodec().on_message(lambda *_: None)
    delivery.at_eof(Buffer())
    with pytest.raises(IncompleteFrame, match="1 bytes into it"):
        delivery.at_eof(Buffer(b"\x01"))


async def nobody_awaits(conn: TcpConnection, message: bytes) -> None:
    """What on_message cannot use."""


async def nobody_iterates(conn: TcpConnection, message: bytes) -> AsyncIterator[None]:
    """The same, with a yield in it."""
    yield


class Answers:
    """Its objects can be called, and have async methods."""

    async def __call__(self, conn: TcpConnection, message: bytes) -> None: ...

    async def method(self, conn: TcpConnection, message: bytes) -> None: ...

    @staticmethod
    async def static(conn: TcpConnection, message: bytes) -> None: ...


@pytest.mark.parametrize(
    "callback",
    [
        nobody_awaits,
        nobody_iterates,
        Answers(),
        Answers().method,
        Answers.static,
        partial(nobody_awaits),
        partial(partial(nobody_awaits), message=b""),
        partial(Answers()),
        partial(Answers().method),
    ],
    ids=lambda callback: re.sub(" at 0x.*", "", repr(callback)),
)
def test_an_async_callback_is_refused_at_once(callback: Callable[..., object]) -> None:
    """Else each message would be lost in a coroutine that nobody awaits."""
    with pytest.raises(
        TypeError,
        match=r"^VarintCodec\.on_message\(callback=.*\): nobody would await it: pass a plain "
        "function, or receive from a FramedChannel$",
    ):
        VarintCodec().on_message(callback)


@pytest.mark.parametrize("callback", [None, 5, "print", LineCodec()])
def test_what_cannot_be_called_is_refused_at_once(callback: Any) -> None:
    """Not with the first message of a peer, in the middle of a server's life."""
    told = rf"^VarintCodec\.on_message\(callback={re.escape(repr(callback))}\): pass a function of "
    with pytest.raises(TypeError, match=told + r"\(conn, message\)$"):
        VarintCodec().on_message(callback)


def test_whatever_is_called_and_not_awaited_is_a_callback() -> None:
    """A class, a built-in function, a method, a part of one, an object that can be called."""

    class Plain:
        seen: ClassVar[list[object]] = []

        def __init__(self, conn: object = None, message: object = None) -> None:
            self.seen.append(message)

        def __call__(self, conn: object, message: object) -> None:
            self.seen.append(message)

        async def unused(self) -> None: ...

    _, conn = fake()
    plain = Plain()
    Plain.seen.clear()
    for callback in (Plain, plain, plain.__call__, partial(plain), partial(partial(Plain))):
        FixedLengthCodec(1).on_message(callback)(conn, Buffer(b"x"))
    assert Plain.seen == [b"x"] * 5
    FixedLengthCodec(1).on_message(max)


# -- a codec of one's own


def test_a_codec_of_ones_own() -> None:
    """Two methods make a codec: the rest is inherited."""

    class Until(Codec[bytes]):
        def decode(self, buffer: Buffer) -> bytes | trioreactor.codec.NeedMore:
            end = buffer.find(b";")
            return NEED_MORE if end < 0 else buffer.take(end + 1)[:-1]

        def encode(self, message: bytes) -> bytes:
            return message + b";"

    assert decoded(Until(10), [b"a;b", b";c"]) == ([b"a", b"b"], None, b"c")
    with pytest.raises(IncompleteFrame):
        Until(10).check_end(Buffer(b"c"))
    with pytest.raises(ValueError, match=r"Until\(max_frame=0\)"):
        Until(0)
    with pytest.raises(TypeError, match="abstract"):
        Codec(10)  # type: ignore[abstract]


@pytest.mark.parametrize("count", [1, MESSAGES_PER_TURN - 1, MESSAGES_PER_TURN])
def test_a_codec_that_takes_nothing(count: int) -> None:
    """A turn of messages for no byte is a RuntimeError that names the codec; fewer, or a byte taken
    among them, are none.
    """

    class Repeating(Codec[int]):
        left = count
        takes = 0

        def decode(self, buffer: Buffer) -> int | NeedMore:
            if not self.left:
                return NEED_MORE
            self.left -= 1
            buffer.discard(self.takes)
            return self.left

        def encode(self, message: int) -> bytes:
            return b""

    codec = Repeating(10)
    _, conn = fake()
    seen: list[int] = []
    delivery = codec.on_message(lambda _, message: seen.append(message))
    if count < MESSAGES_PER_TURN:
        delivery(conn, Buffer(b"left"))
        assert len(seen) == count
        return
    with pytest.raises(RuntimeError, match=r"^Repeating\.decode gave 32 messages and took nothing"):
        delivery(conn, Buffer(b"left"))
    codec.left, codec.takes = count, 1
    delivery(conn, Buffer(bytes(count)))
    assert len(seen) == 2 * count


def test_need_more_says_what_it_is() -> None:
    """`NEED_MORE` is the one of its type, so a type checker can rule it out."""
    assert list(NeedMore) == [NEED_MORE]
    assert repr(NEED_MORE) == "<NeedMore.NEED_MORE: 'need more'>"


# -- types

SNIPPET = """
    from typing import Any, assert_type
    from trioreactor import (
        NEED_MORE, Buffer, Codec, DelimiterCodec, FixedLengthCodec, JsonLinesCodec,
        LengthHeaderCodec, LineCodec, NetstringCodec, TcpConnection, VarintCodec,
    )

    assert_type(LineCodec(), LineCodec[str])
    assert_type(LineCodec("latin-1"), LineCodec[str])
    assert_type(LineCodec(encoding="ascii", ending="any"), LineCodec[str])
    assert_type(LineCodec(None), LineCodec[bytes])
    assert_type(LineCodec(encoding=None, max_frame=5), LineCodec[bytes])
    text: Codec[str] = LineCodec()
    raw: list[Codec[bytes]] = [
        LineCodec(None), DelimiterCodec(b"x"), FixedLengthCodec(4), LengthHeaderCodec(),
        NetstringCodec(), VarintCodec(),
    ]
    anything: Codec[Any] = JsonLinesCodec()

    def number(frame: bytes) -> int:
        return int(frame)

    def digits(number: int) -> bytes:
        return b"%d" % number

    def of_text(text: str) -> int:
        return int(text)

    numbers = VarintCodec().map(digits, number)
    assert_type(numbers, Codec[int])
    message = numbers.decode(Buffer())
    if message is not NEED_MORE:
        assert_type(message, int)
    assert_type(numbers.encode(5), bytes)

    def on_number(conn: TcpConnection, message: int) -> None: ...
    async def serve(conn: TcpConnection) -> None:
        await conn.dispatch(numbers.on_message(on_number))

    LineCodec().encode(b"")  # error: arg-type
    LineCodec(None).encode("")  # error: arg-type
    LineCodec(ending="?")  # error: call-overload
    VarintCodec().map(digits, of_text)  # error: arg-type
    LineCodec().on_message(on_number)  # error: arg-type
    LengthHeaderCodec(byteorder="network")  # error: arg-type
    LengthHeaderCodec(checksum="md5")  # error: arg-type
"""


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")
def test_a_type_checker_knows_the_messages(tmp_path: Path) -> None:
    """`LineCodec()` is of str and `LineCodec(None)` of bytes, `map` gives what its functions say,
    and what mixes them up is found.
    """
    lines = textwrap.dedent(SNIPPET).splitlines()
    file = tmp_path / "snippet.py"
    file.write_text("\n".join(lines))
    package = Path(trioreactor.__file__).parent
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--hide-error-context",
         "--no-pretty", "--cache-dir", str(tmp_path / "cache"), str(file)],
        cwd=package.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = {
        (int(line.split(":")[1]), line.rsplit("[", 1)[1].rstrip("]"))
        for line in run.stdout.splitlines()
        if line.startswith(str(file)) and ": error:" in line
    }
    wanted = {
        (number, line.split("# error: ")[1])
        for number, line in enumerate(lines, 1)
        if "# error: " in line
    }
    assert found == wanted, run.stdout + run.stderr


# -- many at once


def one_by_one(codec: Codec[Any], buffer: Buffer, most: int) -> tuple[list[Any], bool, str]:
    """What `decode_into` is to do, by `decode`: messages, whether there are no more, the error."""
    messages: list[Any] = []
    try:
        while len(messages) < most:
            message = codec.decode(buffer)
            if message is NEED_MORE:
                return messages, True, ""
            messages.append(message)
    except ProtocolError as error:
        return messages, True, f"{type(error).__name__}: {error}"
    return messages, False, ""


def many_at_once(codec: Codec[Any], buffer: Buffer, most: int) -> tuple[list[Any], bool, str]:
    """The same by `decode_into`."""
    messages: list[Any] = []
    try:
        return messages, codec.decode_into(buffer, messages, most), ""
    except ProtocolError as error:
        return messages, True, f"{type(error).__name__}: {error}"


@each
@given(
    count=st.integers(0, 12),
    most=st.integers(1, 15),
    tail=st.binary(max_size=12),
    cuts=st.lists(st.integers(0, 100), max_size=3),
    before=st.booleans(),
)
@settings(deadline=None, derandomize=True, max_examples=150)
def test_many_at_once_are_those_one_by_one(
    codec: Codec[Any],
    message: Any,
    count: int,
    most: int,
    tail: bytes,
    cuts: list[int],
    before: bool,
) -> None:
    """`decode_into` gives what `decode` would, takes what that would take, and fails as that would,
    after the messages before the error; whatever the buffer is made of.
    """
    stream = codec.encode(message) * count + tail
    buffers = []
    for _ in range(2):
        buffer = Buffer()
        if before:
            # So that the cursor stands elsewhere.
            buffer.append(b"consumed")
        for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), len(stream)], strict=True):
            buffer.append(stream[start:stop])
        if before:
            buffer.discard(len(b"consumed"))
        buffers.append(buffer)
    expected = one_by_one(codec, buffers[0], most)
    assert many_at_once(codec, buffers[1], most) == expected
    if not expected[2]:
        assert bytes(buffers[1]) == bytes(buffers[0])


@pytest.mark.parametrize("kind", [LengthHeaderCodec, DelimiterCodec])
def test_a_decode_of_ones_own_is_used_for_many(kind: type[Any]) -> None:
    """A subclass that decodes in its own way does so, too, where many are taken together."""

    class Mine(kind):  # type: ignore[misc]
        def decode(self, buffer: Buffer) -> bytes | NeedMore:
            message = super().decode(buffer)
            return message if message is NEED_MORE else b"mine: " + message

    codec = Mine(b"--") if kind is DelimiterCodec else Mine()
    messages: list[bytes] = []
    assert codec.decode_into(Buffer(codec.encode(b"one") + codec.encode(b"two")), messages, 9)
    assert messages == [b"mine: one", b"mine: two"]


def test_a_line_without_end_is_searched_once() -> None:
    """Taken many at once, too, a line that grows byte by byte is searched in linear time."""
    codec = DelimiterCodec(b"\n", max_frame=1 << 20)
    buffer = Buffer(b"one\n")
    messages: list[bytes] = []
    assert codec.decode_into(buffer, messages, 5)
    buffer.append(b"x" * 1000)
    assert codec.decode_into(buffer, messages, 5)
    # What was searched is remembered.
    assert buffer._scan == (b"\n", 0, 1000)
    assert messages == [b"one"]


def test_a_mixin_may_decode() -> None:
    """Whichever class a `decode` comes from, messages that are taken together are decoded by it."""

    class Upper:
        """Decodes what the next class decodes, in capitals."""

        def decode(self, buffer: Buffer) -> Any:
            message = super().decode(buffer)  # type: ignore[misc]
            return message.upper() if isinstance(message, bytes) else message

    class UpperCodec(Upper, LengthHeaderCodec):
        """Both."""

    class Further(UpperCodec):
        """And one that has nothing of its own."""

    for codec in (UpperCodec(), Further()):
        messages: list[bytes] = []
        buffer = Buffer(codec.encode(b"one") + codec.encode(b"two"))
        assert codec.decode_into(buffer, messages, 9)
        assert messages == [b"ONE", b"TWO"]
