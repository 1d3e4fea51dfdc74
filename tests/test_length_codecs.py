"""The codecs that know a message's length: on the wire as others have them, and safe from lies."""

from __future__ import annotations

import itertools
import struct
import tracemalloc
import zlib
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.decoding import check_every_cut, decoded, in_pieces
from trioreactor import (
    NEED_MORE,
    Buffer,
    Codec,
    FixedLengthCodec,
    FrameTooLarge,
    LengthHeaderCodec,
    NetstringCodec,
    ProtocolError,
    VarintCodec,
)

pytestmark = pytest.mark.pure

pure = settings(deadline=None, derandomize=True, max_examples=60)

Order = Literal["big", "little"]
Checksum = Literal["crc32", "adler32"]
CHECKSUMS: list[Checksum | None] = [None, "crc32", "adler32"]

few = st.lists(st.binary(max_size=6), min_size=1, max_size=3)


class WatchedBuffer(Buffer):
    """Counts what is looked at and not consumed."""

    __slots__ = ("looked_at",)

    def __init__(self) -> None:
        super().__init__()
        self.looked_at = 0

    def peek(self, n: int | None = None) -> bytes:
        got = super().peek(n)
        self.looked_at += len(got)
        return got

    def find(self, delimiter: bytes, start: int = 0) -> int:
        raise AssertionError("no need to search")

    def unpack(self, layout: struct.Struct, offset: int = 0) -> tuple[Any, ...]:
        self.looked_at += layout.size
        return super().unpack(layout, offset)


# -- LengthHeaderCodec: every combination of options

GRID = list(
    itertools.product(range(1, 9), ("big", "little"), (True, False), (True, False), CHECKSUMS)
)


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("adjustment", [-1, 0, 2])
def test_every_combination_of_options(offset: int, adjustment: int) -> None:
    """On the wire is what the options say, and it comes back wherever it is cut once."""
    for width, byteorder, signed, header_included, checksum in GRID:
        codec = LengthHeaderCodec(
            width,
            byteorder=byteorder,
            signed=signed,
            header_included=header_included,
            offset=offset,
            adjustment=adjustment,
            checksum=checksum,
        )
        messages = [b"abcdefg", b"\xff\x00\xff\x00\xff" + bytes(offset)]
        stream = b""
        for message in messages:
            rest = message[offset:]
            if checksum is not None:
                value = {"crc32": zlib.crc32, "adler32": zlib.adler32}[checksum](message)
                rest += value.to_bytes(4, byteorder)
            field = len(rest) - adjustment + (offset + width if header_included else 0)
            frame = message[:offset] + field.to_bytes(width, byteorder, signed=signed) + rest
            assert codec.encode(message) == frame
            stream += frame
        for cut in range(len(stream)):
            assert decoded(codec, [stream[:cut], stream[cut:]]) == (messages, None, b"")
        assert decoded(codec, [bytes([byte]) for byte in stream]) == (messages, None, b"")


@given(
    messages=few,
    width=st.integers(1, 8),
    byteorder=st.sampled_from(["big", "little"]),
    signed=st.booleans(),
    header_included=st.booleans(),
    offset=st.integers(0, 3),
    adjustment=st.integers(-3, 0),
    checksum=st.sampled_from(CHECKSUMS),
)
@pure
def test_frames_with_a_header_come_back_wherever_they_are_cut(
    messages: list[bytes], offset: int, **options: Any
) -> None:
    """Cut at one place, at two, and everywhere, the same messages come out."""
    codec = LengthHeaderCodec(offset=offset, **options)
    messages = [bytes(offset) + message for message in messages]
    stream = b"".join(map(codec.encode, messages))
    assert check_every_cut(codec, stream) == (messages, None, b"")
    # With its last byte missing, the last one is not there.
    assert decoded(codec, [stream[:-1]])[0] == messages[:-1]


@given(stream=st.binary(max_size=24), checksum=st.sampled_from(CHECKSUMS), signed=st.booleans())
@pure
def test_any_bytes_decode_alike_wherever_they_are_cut(
    stream: bytes, checksum: Checksum | None, signed: bool
) -> None:
    """Nonsense, too: the same messages, and an error in any case or in none."""
    codec = LengthHeaderCodec(1, max_frame=20, checksum=checksum, signed=signed, adjustment=-2)
    check_every_cut(codec, stream)


# -- LengthHeaderCodec on the wire


def test_muduo_s_codec_is_the_default() -> None:
    """Four bytes, big-endian, that count what follows: muduo's LengthHeaderCodec."""
    codec = LengthHeaderCodec()
    assert codec.encode(b"hello") == b"\x00\x00\x00\x05hello"
    assert codec.encode(b"") == b"\x00\x00\x00\x00"
    assert decoded(codec, [b"\x00\x00\x00\x00\x00\x00\x00\x05hello\x00"]) == (
        [b"", b"hello"], None, b"\x00",
    )  # fmt: skip
    # Its limit is 65536, that included.
    assert codec.decode(Buffer(b"\x00\x01\x00\x00" + bytes(65536))) == bytes(65536)
    with pytest.raises(FrameTooLarge, match="65537 bytes, and at most 65536"):
        codec.decode(Buffer(b"\x00\x01\x00\x01"))
    # Its length is signed, which is seen in those alone that are refused.
    signed = LengthHeaderCodec(signed=True)
    assert signed.encode(bytes(65536)) == codec.encode(bytes(65536))
    with pytest.raises(FrameTooLarge, match="4294967295 bytes, and at most 65536"):
        codec.decode(Buffer(b"\xff\xff\xff\xff"))
    with pytest.raises(ProtocolError, match="a frame of -1 bytes"):
        signed.decode(Buffer(b"\xff\xff\xff\xff"))


def test_muduo_s_checksum() -> None:
    """Tag and payload, then their Adler-32, all counted: muduo's ProtobufCodecLite."""
    codec = LengthHeaderCodec(checksum="adler32")
    # The usual worked example of Adler-32: "Wikipedia" gives 0x11E60398.
    assert codec.encode(b"Wikipedia") == b"\x00\x00\x00\x0dWikipedia\x11\xe6\x03\x98"
    assert codec.decode(Buffer(b"\x00\x00\x00\x0dWikipedia\x11\xe6\x03\x98")) == b"Wikipedia"
    little = LengthHeaderCodec(byteorder="little", checksum="adler32")
    assert little.encode(b"Wikipedia") == b"\x0d\x00\x00\x00Wikipedia\x98\x03\xe6\x11"


def test_crc_32_is_the_usual_one() -> None:
    """The check value that catalogues of CRCs give for CRC-32: 0xCBF43926."""
    codec = LengthHeaderCodec(2, checksum="crc32")
    assert codec.encode(b"123456789") == b"\x00\x0d123456789\xcb\xf4\x39\x26"
    assert codec.decode(Buffer(b"\x00\x0d123456789\xcb\xf4\x39\x26")) == b"123456789"
    # Over the offset's bytes, too, and not over the length.
    codec = LengthHeaderCodec(2, offset=4, checksum="crc32")
    assert codec.encode(b"123456789") == b"1234\x00\x0956789\xcb\xf4\x39\x26"
    assert codec.decode(Buffer(b"1234\x00\x0956789\xcb\xf4\x39\x26")) == b"123456789"


TEXT = b"HELLO, WORLD"


@pytest.mark.parametrize(
    ("codec", "frame", "message"),
    [
        (LengthHeaderCodec(2), b"\x00\x0c" + TEXT, TEXT),
        (LengthHeaderCodec(2, header_included=True), b"\x00\x0e" + TEXT, TEXT),
        (LengthHeaderCodec(2, adjustment=-2), b"\x00\x0e" + TEXT, TEXT),
        (
            LengthHeaderCodec(3, offset=2),
            b"\xca\xfe\x00\x00\x0c" + TEXT,
            b"\xca\xfe" + TEXT,
        ),
        (
            LengthHeaderCodec(3, adjustment=2),
            b"\x00\x00\x0c\xca\xfe" + TEXT,
            b"\xca\xfe" + TEXT,
        ),
        (
            LengthHeaderCodec(2, offset=1, adjustment=1),
            b"\xca\x00\x0c\xfe" + TEXT,
            b"\xca\xfe" + TEXT,
        ),
        (
            LengthHeaderCodec(2, offset=1, adjustment=-3),
            b"\xca\x00\x10\xfe" + TEXT,
            b"\xca\xfe" + TEXT,
        ),
        (
            LengthHeaderCodec(2, offset=1, header_included=True),
            b"\xca\x00\x10\xfe" + TEXT,
            b"\xca\xfe" + TEXT,
        ),
    ],
)
def test_netty_s_examples(codec: LengthHeaderCodec, frame: bytes, message: bytes) -> None:
    """The frames that Netty's LengthFieldBasedFrameDecoder is documented with, length taken out."""
    assert codec.encode(message) == frame
    assert decoded(codec, [frame * 2]) == ([message, message], None, b"")


@pytest.mark.parametrize(
    ("width", "signed", "most"),
    [(1, True, 127), (1, False, 255), (2, True, 32767), (2, False, 65535), (3, False, 2**24 - 1)],
)
def test_the_largest_length_that_fits(width: int, signed: bool, most: int) -> None:
    """A message is sent up to what the field can say, and refused with `ValueError` above."""
    codec = LengthHeaderCodec(width, signed=signed, max_frame=2**30)
    frame = codec.encode(bytes(most))
    assert codec.decode(Buffer(frame)) == bytes(most)
    with pytest.raises(ValueError, match=f"its length does not fit into {width} bytes"):
        codec.encode(bytes(most + 1))


@pytest.mark.parametrize(("width", "most"), [(1, 255), (2, 65535)])
def test_a_narrow_field_counts_all_that_it_can(width: int, most: int) -> None:
    """Unless it is said to be signed, a length is not: no bit of a short one is given away."""
    codec = LengthHeaderCodec(width)
    frame = codec.encode(bytes(most))
    assert frame == b"\xff" * width + bytes(most)
    assert codec.decode(Buffer(frame)) == bytes(most)


def test_a_length_below_what_the_field_can_say() -> None:
    """With an adjustment, a message can be too short for an unsigned field."""
    codec = LengthHeaderCodec(2, adjustment=3)
    assert codec.encode(b"abc") == b"\x00\x00abc"
    with pytest.raises(ValueError, match="does not fit"):
        codec.encode(b"ab")
    # A signed one says it, below zero.
    codec = LengthHeaderCodec(2, signed=True, adjustment=3)
    assert codec.encode(b"ab") == b"\xff\xffab"
    assert codec.decode(Buffer(b"\xff\xffab")) == b"ab"


@given(message=st.binary(max_size=12), options=st.fixed_dictionaries({
    "width": st.integers(1, 8),
    "signed": st.booleans(),
    "header_included": st.booleans(),
    "offset": st.integers(0, 4),
    "adjustment": st.integers(-130, 260),
    "checksum": st.sampled_from(CHECKSUMS),
    "max_frame": st.integers(1, 16),
}))  # fmt: skip
@settings(pure, max_examples=300)
def test_what_is_sent_can_be_read(message: bytes, options: dict[str, Any]) -> None:
    """`encode` gives what `decode` takes, or raises `ValueError`."""
    codec = LengthHeaderCodec(**options)
    try:
        frame = codec.encode(message)
    except ValueError:
        return
    assert decoded(codec, [frame]) == ([message], None, b"")


@pytest.mark.parametrize("checksum", CHECKSUMS)
@pytest.mark.parametrize("offset", [0, 2])
def test_the_limit_counts_the_rest(checksum: Checksum | None, offset: int) -> None:
    """`max_frame` is of what follows the length, checksum included: in both directions the same."""
    tail = 0 if checksum is None else 4
    codec = LengthHeaderCodec(2, offset=offset, checksum=checksum, max_frame=10)
    fits = bytes(offset + 10 - tail)
    assert codec.decode(Buffer(codec.encode(fits))) == fits
    with pytest.raises(ValueError, match="a frame of 11 bytes, and at most 10"):
        codec.encode(fits + b"x")
    larger = LengthHeaderCodec(2, offset=offset, checksum=checksum, max_frame=11)
    header = larger.encode(fits + b"x")[: offset + 2]
    with pytest.raises(FrameTooLarge, match="a frame of 11 bytes, and at most 10"):
        codec.decode(Buffer(header))


@pytest.mark.parametrize("width", range(1, 9))
@pytest.mark.parametrize("byteorder", ["big", "little"])
def test_a_length_is_judged_with_its_last_byte(width: int, byteorder: Order) -> None:
    """A size that is too large or negative is refused before any byte of the message came."""
    for signed, lie, error in [
        (False, b"\xff" * width, FrameTooLarge),
        (True, b"\xff" * width, ProtocolError),
        (True, (2 ** (8 * width - 1) - 1).to_bytes(width, byteorder), FrameTooLarge),
        (True, (2 ** (8 * width - 1)).to_bytes(width, byteorder), ProtocolError),
    ]:
        codec = LengthHeaderCodec(
            width, byteorder=byteorder, signed=signed, offset=1, max_frame=100
        )
        stream = b"?" + lie
        assert codec.decode(Buffer(stream[:-1])) is NEED_MORE
        with pytest.raises(ProtocolError) as caught:
            codec.decode(Buffer(stream))
        assert type(caught.value) is error


@pytest.mark.parametrize(
    ("codec", "header"),
    [
        (LengthHeaderCodec(2, header_included=True), b"\x00\x01"),
        (LengthHeaderCodec(2, header_included=True, offset=3), b"abc\x00\x04"),
        (LengthHeaderCodec(2, adjustment=-3), b"\x00\x02"),
        (LengthHeaderCodec(3, adjustment=-3), b"\x00\x00\x02"),
    ],
)
def test_a_length_less_than_what_it_counts(codec: LengthHeaderCodec, header: bytes) -> None:
    """A length that would end the frame inside its own header is refused, not read backwards."""
    with pytest.raises(ProtocolError, match="a frame of -1 bytes"):
        codec.decode(Buffer(header + bytes(10)))
    # One more is an empty rest.
    exact = header[:-1] + bytes([header[-1] + 1])
    assert decoded(codec, [exact])[1] is None


@pytest.mark.parametrize("checksum", ["crc32", "adler32"])
def test_every_changed_bit_is_found(checksum: Checksum) -> None:
    """A frame with a checksum and one wrong bit in it is refused."""
    codec = LengthHeaderCodec(2, offset=1, checksum=checksum)
    frame = codec.encode(b"message")
    for place in itertools.chain(range(1), range(3, len(frame))):
        for bit in range(8):
            wrong = bytearray(frame)
            wrong[place] ^= 1 << bit
            with pytest.raises(ProtocolError, match="whose checksum is wrong"):
                codec.decode(Buffer(wrong))


@pytest.mark.parametrize("size", [0, 3])
@pytest.mark.parametrize("offset", [0, 5])
def test_a_frame_without_room_for_its_checksum(size: int, offset: int) -> None:
    """The offset's bytes are not taken for the missing ones of the checksum."""
    codec = LengthHeaderCodec(1, offset=offset, checksum="crc32")
    with pytest.raises(ProtocolError, match="without room for its checksum"):
        codec.decode(Buffer(bytes(offset) + bytes([size]) + bytes(10)))
    # Nothing but a checksum is an empty message.
    empty = codec.encode(bytes(offset))
    assert len(empty) == offset + 5
    assert codec.decode(Buffer(empty)) == bytes(offset)


def test_a_message_shorter_than_the_offset_cannot_be_sent() -> None:
    """The bytes before the length are the message's first ones, so it has them."""
    codec = LengthHeaderCodec(2, offset=3)
    assert codec.encode(b"abc") == b"abc\x00\x00"
    assert codec.decode(Buffer(b"abc\x00\x00")) == b"abc"
    with pytest.raises(ValueError, match="2 bytes: the offset alone has 3"):
        codec.encode(b"ab")


@pytest.mark.parametrize(
    ("options", "error", "advice"),
    [
        ({"width": 0}, ValueError, r"width=0\): pass at least 1 bytes"),
        ({"width": 9}, ValueError, r"width=9\): pass at most 8 bytes"),
        ({"width": "4"}, TypeError, r"width='4'\): pass a whole number"),
        ({"width": None}, TypeError, r"width=None\).*pass a number"),
        ({"offset": -1}, ValueError, r"offset=-1\): pass at least 0 bytes"),
        ({"offset": None}, TypeError, r"offset=None\).*pass a number"),
        ({"offset": 1.0}, TypeError, r"offset=1.0\): pass a whole number"),
        ({"adjustment": 0.5}, TypeError, r"adjustment=0.5\): pass a whole number"),
        ({"adjustment": None}, TypeError, r"adjustment=None\).*pass a number"),
        ({"byteorder": "network"}, ValueError, r"byteorder='network'\): pass \"big\" or"),
        ({"byteorder": ">"}, ValueError, r"byteorder='>'\): pass \"big\" or"),
        ({"checksum": "md5"}, ValueError, r"checksum='md5'\): pass \"crc32\", \"adler32\" or None"),
    ],
)
def test_wrong_options(options: dict[str, Any], error: type[Exception], advice: str) -> None:
    """Whoever passes a wrong option reads which one, and what to pass."""
    with pytest.raises(error, match=r"LengthHeaderCodec\(" + advice):
        LengthHeaderCodec(**options)


# -- VarintCodec


@pytest.mark.parametrize(
    ("size", "head"),
    [
        (0, b"\x00"),
        (1, b"\x01"),
        (127, b"\x7f"),
        (128, b"\x80\x01"),
        # The two numbers of protobuf's own encoding guide.
        (150, b"\x96\x01"),
        (300, b"\xac\x02"),
        (16383, b"\xff\x7f"),
        (16384, b"\x80\x80\x01"),
        (2**21, b"\x80\x80\x80\x01"),
    ],
)
def test_varints_are_protobuf_s(size: int, head: bytes) -> None:
    """Seven bits a byte, lowest first, the top bit on all but the last."""
    codec = VarintCodec(max_frame=2**21)
    assert codec.encode(bytes(size)) == head + bytes(size)
    assert decoded(codec, [head + bytes(size)]) == ([bytes(size)], None, b"")


def test_a_delimited_protobuf_message() -> None:
    """``08 96 01``, protobuf's first example, as writeDelimitedTo sends it."""
    assert VarintCodec().encode(b"\x08\x96\x01") == b"\x03\x08\x96\x01"
    assert VarintCodec().decode(Buffer(b"\x03\x08\x96\x01")) == b"\x08\x96\x01"


def test_a_varint_may_be_longer_than_it_need_be() -> None:
    """Up to ten bytes, as protobuf reads them; without an end it is refused with the tenth."""
    codec = VarintCodec()
    assert codec.decode(Buffer(b"\x81\x00a")) == b"a"
    assert codec.decode(Buffer(b"\x81" + b"\x80" * 8 + b"\x00a")) == b"a"
    assert codec.decode(Buffer(b"\x81" + b"\x80" * 8)) is NEED_MORE
    with pytest.raises(ProtocolError, match="a length that does not end"):
        codec.decode(Buffer(b"\x81" + b"\x80" * 9))


@pytest.mark.parametrize("most", [1, 127, 128, 300, 65536])
def test_a_varint_is_refused_with_the_byte_that_makes_it_too_large(most: int) -> None:
    """Before its end, for what follows only adds to it."""
    codec = VarintCodec(max_frame=most)
    assert codec.decode(Buffer(codec.encode(bytes(most)))) == bytes(most)
    with pytest.raises(ValueError, match=f"{most + 1} bytes, and at most {most}"):
        codec.encode(bytes(most + 1))
    head = VarintCodec(max_frame=most + 1).encode(bytes(most + 1))[: -(most + 1)]
    for stream in (head, b"\xff" * 10):
        known = next(
            n for n in range(1, 11)
            if sum((byte & 127) << 7 * at for at, byte in enumerate(stream[:n])) > most
        )  # fmt: skip
        assert codec.decode(Buffer(stream[: known - 1])) is NEED_MORE
        with pytest.raises(FrameTooLarge, match=f"at most {most} are taken"):
            codec.decode(Buffer(stream[:known]))


# -- NetstringCodec


def test_netstrings_are_bernstein_s() -> None:
    """``12:hello world!,`` and ``0:,``, the two examples of their specification."""
    codec = NetstringCodec()
    assert codec.encode(b"hello world!") == b"12:hello world!,"
    assert codec.encode(b"") == b"0:,"
    assert decoded(codec, [b"12:hello world!,0:,3:"]) == ([b"hello world!", b""], None, b"3:")


@pytest.mark.parametrize(
    "stream",
    [
        b":,",
        b"x",
        b"1x",
        b"-1:",
        b"+1:a,",
        b" 1:a,",
        b"1 :a,",
        b"00:,",
        b"01:a,",
        b"1_0:",
        b"\xb2:",
    ],
)
def test_what_is_no_netstring(stream: bytes) -> None:
    """No length, another character in it, a sign, a space, a leading zero: refused."""
    with pytest.raises(ProtocolError, match="a netstring without a"):
        NetstringCodec().decode(Buffer(stream))


@pytest.mark.parametrize("stream", [b"x", b"1x", b"00", b":", b"-"])
def test_a_netstring_s_first_wrong_byte_is_enough(stream: bytes) -> None:
    """It is refused with the byte that makes it wrong, and not before."""
    codec = NetstringCodec()
    assert codec.decode(Buffer(stream[:-1])) is NEED_MORE
    with pytest.raises(ProtocolError):
        codec.decode(Buffer(stream))


def test_a_netstring_without_its_comma() -> None:
    """Any other byte in the comma's place is refused; no byte there is waited for."""
    codec = NetstringCodec()
    assert codec.decode(Buffer(b"1:a")) is NEED_MORE
    for wrong in (b";", b"1", b":"):
        with pytest.raises(ProtocolError, match="without its comma"):
            codec.decode(Buffer(b"1:a" + wrong))


@pytest.mark.parametrize(
    ("most", "fits", "too_large"),
    [(9, b"9", b"10"), (10, b"10", b"11"), (10, b"10", b"20"), (99, b"99", b"100"),
     (65536, b"65536", b"65537"), (65536, b"6553", b"99999")],
)  # fmt: skip
def test_a_netstring_is_refused_with_the_digit_that_makes_it_too_large(
    most: int, fits: bytes, too_large: bytes
) -> None:
    """No colon is waited for, so endless digits are refused, too."""
    codec = NetstringCodec(max_frame=most)
    size = int(fits)
    assert codec.decode(Buffer(fits + b":" + bytes(size) + b",")) == bytes(size)
    assert codec.decode(Buffer(too_large[:-1])) is NEED_MORE
    for more in (b"", b":", b"0", b"0" * 5000):
        with pytest.raises(FrameTooLarge, match=f"at most {most} are taken"):
            codec.decode(Buffer(too_large + more))
    with pytest.raises(ValueError, match=f"{most + 1} bytes, and at most {most}"):
        codec.encode(bytes(most + 1))


# -- FixedLengthCodec


def test_messages_of_one_size() -> None:
    """So many bytes are a message; another size cannot be sent."""
    codec = FixedLengthCodec(3)
    assert decoded(codec, [b"abcdefgh"]) == ([b"abc", b"def"], None, b"gh")
    assert codec.encode(b"abc") == b"abc"
    for wrong in (b"", b"ab", b"abcd"):
        with pytest.raises(ValueError, match=f"of {len(wrong)} bytes: each has 3"):
            codec.encode(wrong)


def test_a_wrong_size() -> None:
    """The size is a whole number of bytes, and the error calls it by its name."""
    for wrong, error, advice in [
        (0, ValueError, "pass at least 1 bytes"),
        (-1, ValueError, "pass at least 1 bytes"),
        (None, TypeError, "pass a number"),
        ("4", TypeError, "pass a whole number of bytes"),
    ]:
        with pytest.raises(error, match=rf"FixedLengthCodec\(size={wrong!r}\).*{advice}"):
            FixedLengthCodec(wrong)  # type: ignore[arg-type]


# -- all of them


@pytest.mark.parametrize("codec", [VarintCodec(), NetstringCodec()], ids=["varint", "netstring"])
@given(messages=few, stream=st.binary(max_size=16))
@pure
def test_messages_come_back_wherever_they_are_cut(
    codec: Codec[bytes], messages: list[bytes], stream: bytes
) -> None:
    """Cut at one place, at two, and everywhere; and whatever nonsense follows, it is all one."""
    valid = b"".join(map(codec.encode, messages))
    assert check_every_cut(codec, valid) == (messages, None, b"")
    small = type(codec)(max_frame=6)
    assert check_every_cut(small, valid + stream)[0][: len(messages)] == messages
    digits = bytes(b"0123459::,"[byte % 10] for byte in stream)
    check_every_cut(small, digits)


@given(messages=st.lists(st.binary(min_size=3, max_size=3), max_size=5), rest=st.binary(max_size=2))
@pure
def test_messages_of_one_size_come_back_wherever_they_are_cut(
    messages: list[bytes], rest: bytes
) -> None:
    """Cut at one place, at two, and everywhere."""
    assert check_every_cut(FixedLengthCodec(3), b"".join(messages) + rest) == (messages, None, rest)


LARGE = 2**30
PROMISES: list[tuple[Codec[bytes], bytes]] = [
    (LengthHeaderCodec(max_frame=LARGE), LARGE.to_bytes(4, "big")),
    (LengthHeaderCodec(7, max_frame=LARGE), LARGE.to_bytes(7, "big")),
    (LengthHeaderCodec(offset=2, max_frame=LARGE, checksum="crc32"), b"xx\x40\x00\x00\x00"),
    (VarintCodec(max_frame=LARGE), b"\x80\x80\x80\x80\x04"),
    (NetstringCodec(max_frame=LARGE), b"%d:" % LARGE),
    (FixedLengthCodec(LARGE), b""),
]


@pytest.mark.parametrize(("codec", "header"), PROMISES)
def test_a_length_is_no_reason_to_allocate(codec: Codec[bytes], header: bytes) -> None:
    """A peer that says a gigabyte follows has sent a few bytes, and they are all that is kept."""
    buffer = Buffer(header)
    tracemalloc.start()
    try:
        for _ in range(10):
            assert codec.decode(buffer) is NEED_MORE
            buffer.append(b"x")
        assert tracemalloc.get_traced_memory()[1] < 65536
    finally:
        tracemalloc.stop()
    assert bytes(buffer) == header + b"x" * 10


@pytest.mark.parametrize(("codec", "header"), PROMISES)
def test_waiting_for_a_message_looks_at_its_header_only(codec: Codec[bytes], header: bytes) -> None:
    """A message that comes byte by byte costs the same for each: linear time in all."""
    buffer = WatchedBuffer()
    for byte in header + bytes(20_000):
        buffer.append(bytes([byte]))
        assert codec.decode(buffer) is NEED_MORE
    assert buffer.looked_at <= buffer.size * 20


@pytest.mark.parametrize(
    ("codec", "header", "error"),
    [
        (LengthHeaderCodec(max_frame=20), b"\x00\x00\x00\x15", FrameTooLarge),
        (LengthHeaderCodec(8, max_frame=20), b"\xff" * 8, FrameTooLarge),
        (LengthHeaderCodec(8, signed=True, max_frame=20), b"\x7f" + b"\xff" * 7, FrameTooLarge),
        (LengthHeaderCodec(8, signed=True, max_frame=20), b"\x80" + b"\x00" * 7, ProtocolError),
        (VarintCodec(max_frame=20), b"\x15", FrameTooLarge),
        (NetstringCodec(max_frame=20), b"21", FrameTooLarge),
    ],
)
def test_messages_before_a_wrong_one_are_given(
    codec: Codec[bytes], header: bytes, error: type[ProtocolError]
) -> None:
    """However they came, what the peer sent before its mistake is decoded before that is raised."""
    stream = codec.encode(b"first") + codec.encode(b"") + header
    for pieces in in_pieces(stream):
        assert decoded(codec, pieces) == ([b"first", b""], error, b"")
