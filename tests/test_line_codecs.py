"""The codecs that look for a message's end: they find the first, look once, and do not look far."""

from __future__ import annotations

import json
import math
import sys
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.decoding import check_every_cut, decoded, in_pieces
from trioreactor import (
    NEED_MORE,
    Buffer,
    Codec,
    DelimiterCodec,
    FrameTooLarge,
    JsonLinesCodec,
    LineCodec,
    ProtocolError,
)

pytestmark = pytest.mark.pure

pure = settings(deadline=None, derandomize=True, max_examples=60)

Ending = Literal["any", "\n", "\r\n"]
ENDINGS: list[Ending] = ["any", "\n", "\r\n"]

# Few different bytes, so that delimiters and halves of them occur.
telling = st.lists(st.sampled_from([b"\r", b"\n", b"\r\n", b"a", b"-"]), max_size=14).map(b"".join)


class Counting(bytearray):
    """Counts the bytes that searches have to look at."""

    searched = 0

    def find(self, what: Any, start: Any = 0, *end: Any) -> int:
        self.searched += len(self) - start
        return super().find(what, start, *end)


def counting_buffer() -> tuple[Buffer, Counting]:
    """A buffer of one byte, and what it keeps its bytes in."""
    buffer = Buffer(b"x")
    buffer._data = data = Counting(b"x")
    return buffer, data


# -- DelimiterCodec


@given(
    stream=telling,
    delimiter=st.sampled_from([b"\r", b"\r\n", b"--", b"a-a", b"aa"]),
    most=st.integers(1, 8),
)
@pure
def test_delimited_messages_are_what_split_gives(
    stream: bytes, delimiter: bytes, most: int
) -> None:
    """Wherever the stream is cut, they are what lies between delimiters, up to a too long one."""
    messages, error, left = check_every_cut(DelimiterCodec(delimiter, max_frame=most), stream)
    *wanted, rest = stream.split(delimiter)
    good = 0
    while good < len(wanted) and len(wanted[good]) <= most:
        good += 1
    assert messages == wanted[:good]
    if good < len(wanted) or len(rest) >= most + len(delimiter):
        assert error is FrameTooLarge
    else:
        assert (error, left) == (None, rest)


@given(
    message=telling,
    delimiter=st.sampled_from([b"\r", b"\r\n", b"--", b"-a-"]),
    most=st.integers(1, 9),
)
@settings(pure, max_examples=300)
def test_delimited_messages_that_are_sent_can_be_read(
    message: bytes, delimiter: bytes, most: int
) -> None:
    """What contains the delimiter, or would together with it, is a `ValueError`; so is too much."""
    codec = DelimiterCodec(delimiter, max_frame=most)
    readable = len(message) <= most and (message + delimiter).find(delimiter) == len(message)
    if readable:
        assert codec.encode(message) == message + delimiter
        assert decoded(codec, [codec.encode(message)]) == ([message], None, b"")
    else:
        with pytest.raises(ValueError, match=r"contains the delimiter|and at most"):
            codec.encode(message)


def test_a_delimiter_across_the_seam() -> None:
    """A message that ends with half a delimiter would be cut too early by the whole one."""
    with pytest.raises(ValueError, match="contains the delimiter b'--'"):
        DelimiterCodec(b"--").encode(b"a-")
    assert DelimiterCodec(b"-+").encode(b"a-") == b"a--+"


@pytest.mark.parametrize("delimiter", [b";", b"\r\n", b"abcd"])
def test_no_delimiter_is_waited_for_in_vain(delimiter: bytes) -> None:
    """The largest message and its delimiter are taken. Without one, as many bytes are too many."""
    codec = DelimiterCodec(delimiter, max_frame=100)
    largest = bytes(100) + delimiter
    assert decoded(codec, [largest[n : n + 1] for n in range(len(largest))])[0] == [bytes(100)]
    buffer = Buffer()
    with pytest.raises(FrameTooLarge, match="more than 100 bytes"):
        for _ in range(1000):
            buffer.append(b"x")
            assert codec.decode(buffer) is NEED_MORE
    assert buffer.size == len(largest)
    with pytest.raises(FrameTooLarge):
        codec.decode(Buffer(bytes(101) + delimiter))


@pytest.mark.parametrize(
    "codec",
    [
        DelimiterCodec(b"\n", max_frame=50_000),
        DelimiterCodec(b"abcdefgh", max_frame=50_000),
        LineCodec(max_frame=50_000),
        LineCodec(None, ending="\r\n", max_frame=50_000),
        JsonLinesCodec(max_frame=50_000),
    ],
)
def test_waiting_for_the_end_costs_linear_time(codec: Codec[Any]) -> None:
    """However small the pieces, each byte is looked at a few times, not once for each piece."""
    buffer, data = counting_buffer()
    while buffer.size < 50_000:
        buffer.append(b"x")
        assert codec.decode(buffer) is NEED_MORE
    assert buffer._data is data
    assert data.searched >= 49_999, "nothing was counted"
    # A delimiter of eight bytes may have begun seven bytes before.
    assert data.searched <= 50_000 * 8


@pytest.mark.parametrize(
    ("delimiter", "advice"),
    [(b"", "pass bytes, at least one"), ("\n", "pass bytes, at least one"), (10, "pass bytes")],
)
def test_a_wrong_delimiter(delimiter: Any, advice: str) -> None:
    """Whoever passes what delimits nothing reads what to pass."""
    with pytest.raises(ValueError, match=rf"DelimiterCodec\(.*\): {advice}"):
        DelimiterCodec(delimiter)


# -- LineCodec


@pytest.mark.parametrize("ending", ENDINGS)
@given(stream=telling, most=st.integers(1, 8))
@pure
def test_lines_are_what_lies_between_endings(ending: Ending, stream: bytes, most: int) -> None:
    """Wherever the stream is cut, the lines are the same, and no line is longer than allowed."""
    messages, error, left = check_every_cut(LineCodec(None, ending=ending, max_frame=most), stream)
    *wanted, rest = stream.split(b"\r\n" if ending == "\r\n" else b"\n")
    if ending == "any":
        wanted = [line.removesuffix(b"\r") for line in wanted]
    good = 0
    while good < len(wanted) and len(wanted[good]) <= most:
        good += 1
    assert messages == wanted[:good]
    if good < len(wanted):
        assert error is FrameTooLarge
    elif error is None:
        assert left == rest
        assert len(rest) <= most + 1
    else:
        assert len(rest) > most


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "shift-jis", "gb18030", None])
@given(text=st.text(st.sampled_from("a\u0d0a\u0a0d\xe4\r\n\ud800€"), max_size=6))
@settings(pure, max_examples=100)
def test_lines_that_are_sent_can_be_read(encoding: str | None, ending: Ending, text: str) -> None:
    """In every encoding, of two bytes or one: what would not come back alike is a `ValueError`."""
    codec: Codec[Any]
    line: Any
    if encoding is None:
        codec, line = LineCodec(None, ending=ending, max_frame=8), text.encode("utf-8", "ignore")
    else:
        codec, line = LineCodec(encoding, ending=ending, max_frame=8), text
    try:
        stream = codec.encode(line)
    except ValueError:
        return
    assert decoded(codec, [stream + stream]) == ([line, line], None, b"")


def test_text_lines() -> None:
    """Plain use: either ending is understood, the short one is sent."""
    codec = LineCodec()
    assert codec.encode("grüße") == "grüße\n".encode()
    assert codec.encode("") == b"\n"
    assert decoded(codec, ["a\nb\r\n\n\r\nü\r\n".encode()])[0] == ["a", "b", "", "", "ü"]
    assert LineCodec("latin-1").decode(Buffer(b"\xfc\n")) == "ü"
    assert LineCodec(None).decode(Buffer(b"\xff\r\n")) == b"\xff"


@pytest.mark.parametrize(
    ("ending", "wire", "lines"),
    [
        ("any", b"a\n", [b"a", b"b", b"\rc\r"]),
        ("\n", b"a\n", [b"a\r", b"b", b"\rc\r\r"]),
        ("\r\n", b"a\r\n", [b"a", b"b\n\rc\r"]),
    ],
)
def test_each_kind_of_ending(ending: Ending, wire: bytes, lines: list[bytes]) -> None:
    """What is no ending belongs to the line."""
    codec = LineCodec(None, ending=ending)
    assert codec.encode(b"a") == wire
    assert decoded(codec, [b"a\r\nb\n\rc\r\r\n"]) == (lines, None, b"")


@pytest.mark.parametrize(
    ("ending", "refused", "allowed"),
    [
        ("any", ["a\nb", "a\r\nb", "a\r", "\n"], ["a\rb", "\ra"]),
        ("\n", ["a\nb", "\n"], ["a\rb", "a\r"]),
        ("\r\n", ["a\r\nb", "\r\n"], ["a\rb", "a\nb", "a\r", "a\n"]),
    ],
)
def test_a_line_does_not_contain_its_ending(
    ending: Ending, refused: list[str], allowed: list[str]
) -> None:
    """A message that would arrive as two, or shorter, is a `ValueError`: nobody smuggles lines."""
    codec = LineCodec(ending=ending)
    for text in refused:
        with pytest.raises(ValueError, match=r"contains the delimiter|ends with a carriage return"):
            codec.encode(text)
    for text in allowed:
        assert codec.decode(Buffer(codec.encode(text))) == text


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_limit_of_lines_counts_no_ending(ending: Ending) -> None:
    """The longest line is as long with either ending; it is of bytes and not of characters."""
    codec = LineCodec(ending=ending, max_frame=4)
    for end in {"any": ["\n", "\r\n"]}.get(ending, [ending]):
        for pieces in in_pieces(f"ä12{end}".encode()):
            assert decoded(codec, pieces)[0] == ["ä12"]
        for pieces in in_pieces(f"ä123{end}".encode()):
            assert decoded(codec, pieces) == ([], FrameTooLarge, b"")
    assert codec.decode(Buffer(codec.encode("ä12"))) == "ä12"
    with pytest.raises(ValueError, match="a line of 5 bytes, and at most 4"):
        codec.encode("ä123")


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_the_limit_is_told_as_it_was_given(ending: Ending, end: bytes) -> None:
    """Whenever it is found, the error names `max_frame`, not what an ending adds to it."""
    for n in range(11, 15):
        if not end and n == 11 and ending != "\n":
            # It may yet be the longest line and a half of its ending.
            continue
        with pytest.raises(FrameTooLarge, match="of more than 10 bytes"):
            LineCodec(max_frame=10, ending=ending).decode(Buffer(b"x" * n + end))
    with pytest.raises(FrameTooLarge, match="of more than 10 bytes"):
        JsonLinesCodec(max_frame=10).decode(Buffer(b"1" * 12 + end))


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_line_without_an_end(ending: Ending) -> None:
    """It is refused when it is as long as the longest with the longest ending, and not before."""
    codec = LineCodec(ending=ending, max_frame=100)
    buffer = Buffer()
    with pytest.raises(FrameTooLarge):
        for _ in range(1000):
            buffer.append(b"x")
            assert codec.decode(buffer) is NEED_MORE
    assert buffer.size == (101 if ending == "\n" else 102)


@pytest.mark.parametrize(
    ("encoding", "stream"),
    [("utf-8", b"\xff\n"), ("utf-8", b"\xc3\n"), ("utf-8", b"\xed\xa0\x80\n"),
     ("utf-8", b"\xc0\x80\n"), ("ascii", b"\x80\n"), ("shift-jis", b"\x81\n")],
)  # fmt: skip
def test_a_line_that_is_not_in_the_encoding(encoding: str, stream: bytes) -> None:
    """Broken, surrogate and overlong UTF-8, and bytes above ASCII: a `ProtocolError`."""
    with pytest.raises(ProtocolError, match=f"a line that is not {encoding}"):
        LineCodec(encoding).decode(Buffer(stream))


def test_a_line_that_the_encoding_does_not_have() -> None:
    """A text that cannot be encoded is a `ValueError`, and so is what is no text."""
    with pytest.raises(ValueError, match="ascii"):
        LineCodec("ascii").encode("ü")
    with pytest.raises(ValueError, match="surrogates not allowed"):
        LineCodec().encode("\ud800")
    wrong: Any
    for wrong in (b"a", bytearray(b"a"), None, 5):
        told = (
            rf"a line of type {type(wrong).__name__}: LineCodec\('utf-8'\) sends text, so pass str"
        )
        with pytest.raises(ValueError, match=told):
            LineCodec().encode(wrong)


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"ending": "\r"}, r"ending='\\r'\): pass \"\\n\", \"\\r\\n\" or \"any\""),
        ({"ending": b"\n"}, r"ending=b'\\n'\): pass \"\\n\""),
        ({"ending": None}, r"ending=None\): pass \"\\n\""),
        ({"encoding": "utf-9"}, r"'utf-9'\): pass the name of a text encoding, or None for bytes"),
        ({"encoding": "hex"}, r"'hex'\): pass the name of a text encoding, or None for bytes"),
        (
            {"encoding": "utf-16"},
            r"'utf-16'\): its line ending is b'.+'; pass an encoding in which",
        ),
        ({"encoding": "utf-16-le"}, r"'utf-16-le'\): its line ending is b'\\n\\x00'; pass"),
        ({"encoding": "utf-32-be"}, r"'utf-32-be'\): its line ending is"),
        ({"encoding": "utf-8-sig"}, r"'utf-8-sig'\): its line ending is b'\\xef\\xbb\\xbf\\n'"),
        ({"encoding": "cp037"}, r"'cp037'\): its line ending is b'%'; .* or use DelimiterCodec"),
        ({"encoding": "undefined"}, r"'undefined'\): pass the name of a text encoding, or None"),
        ({"encoding": "utf-8\0"}, r"'utf-8\\x00'\): pass the name of a text encoding, or None"),
        ({"encoding": "\ud800"}, r"'\\ud800'\): pass the name of a text encoding, or None"),
        ({"encoding": ""}, r"''\): pass the name of a text encoding, or None"),
        ({"encoding": 8}, r"8\): pass the name of a text encoding, or None for bytes"),
    ],
)
def test_wrong_options(options: dict[str, Any], advice: str) -> None:
    """Whoever passes a wrong option reads which one, and what to pass."""
    with pytest.raises(ValueError, match=r"LineCodec\(" + advice):
        LineCodec(**options)


# -- JsonLinesCodec

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2)
    | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=3,
)  # fmt: skip


@given(messages=st.lists(values, min_size=1, max_size=2))
@settings(pure, max_examples=30)
def test_json_comes_back_wherever_it_is_cut(messages: list[Any]) -> None:
    """Line breaks in strings and characters beyond ASCII included."""
    codec = JsonLinesCodec()
    stream = b"".join(map(codec.encode, messages))
    assert stream.count(b"\n") == len(messages)
    assert check_every_cut(codec, stream) == (messages, None, b"")


def test_json_lines_on_the_wire() -> None:
    """One compact value a line, in ASCII; received with spaces, either ending, and UTF-8."""
    codec = JsonLinesCodec()
    assert codec.encode({"a": [1, None, "ü\n"]}) == b'{"a":[1,null,"\\u00fc\\n"]}\n'
    stream = ' {"a" : 1}\r\n"ü"\n5\n'.encode()
    assert decoded(codec, [stream]) == ([{"a": 1}, "ü", 5], None, b"")


@pytest.mark.parametrize(
    "line",
    [b"", b"{", b"{'a': 1}", b"1 2", b"[1,]", b"NaN", b"[Infinity]", b"-Infinity", b'"\xff"',
     b"\xff\xfe1\x00", b"9" * 5000, b"[" * 60_000, b'{"a":' * 12_000, b'"\t"',
     b"\xef\xbb\xbf1"],
    ids=lambda line: repr(line[:8]),
)  # fmt: skip
def test_what_is_not_json(line: bytes) -> None:
    """Half a value, two, NaN, bad UTF-8, UTF-16, numbers and nesting without measure: refused."""
    with pytest.raises(ProtocolError, match="the message cannot be decoded"):
        JsonLinesCodec().decode(Buffer(line + b"\n"))


@pytest.mark.parametrize("number", [b"1e999", b"-1e999", b"1E+309", b"1" * 400 + b".0"])
@pytest.mark.parametrize("line", [b"%b", b"[1,[%b]]", b'{"a":{"b":%b}}', b" %b "])
def test_a_number_that_no_float_can_hold(number: bytes, line: bytes) -> None:
    """It is refused like the infinity that it would become, which could not be sent on."""
    with pytest.raises(ProtocolError, match="cannot be decoded: a number beyond a float's range"):
        JsonLinesCodec().decode(Buffer(line % number + b"\n"))


def test_floats_that_are_received_can_be_sent() -> None:
    """From the smallest to the largest of either sign; in a string, digits are only text."""
    codec = JsonLinesCodec()
    largest = sys.float_info.max
    numbers = [largest, -largest, 5e-324, -0.0, 0.1, 1e16, 2.5]
    assert codec.decode(Buffer(codec.encode(numbers))) == numbers
    assert codec.decode(Buffer(b'["1e999",1e-999,1e308]\n')) == ["1e999", 0.0, 1e308]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (math.nan, "JSON compliant"),
        ([math.inf], "JSON compliant"),
        ({"a": -math.inf}, "JSON compliant"),
        ({math.inf: 1}, "JSON compliant"),
        ("x" * 19, "at most 20"),
        (object(), "object is not JSON serializable"),
        ([{1, 2}], "set is not JSON serializable"),
        (b"bytes", "bytes is not JSON serializable"),
        ({(1, 2): 3}, "keys must be str"),
    ],
)
def test_what_json_cannot_say(value: Any, reason: str) -> None:
    """Whatever the reason is, it is a `ValueError` that tells it."""
    with pytest.raises(ValueError, match=reason):
        JsonLinesCodec(max_frame=20).encode(value)


def test_json_without_an_end_cannot_be_sent() -> None:
    """Circles, and nesting without measure, are a `ValueError`, too."""
    codec = JsonLinesCodec(max_frame=20)
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(ValueError, match="Circular"):
        codec.encode(circle)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match="a message that is not JSON: "):
        codec.encode(deep)
    assert codec.decode(Buffer(codec.encode("x" * 18))) == "x" * 18


def test_json_as_long_as_allowed() -> None:
    """A frame full of one value is read, one byte more is refused unread."""
    codec = JsonLinesCodec(max_frame=100)
    assert codec.decode(Buffer(json.dumps("x" * 98).encode() + b"\n")) == "x" * 98
    with pytest.raises(FrameTooLarge):
        codec.decode(Buffer(json.dumps("x" * 99).encode() + b"\n"))


@pytest.mark.parametrize("codec", [DelimiterCodec(b"--", max_frame=10**6), LineCodec(None)])
def test_waiting_for_an_end_costs_linear_time(
    codec: Codec[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """S: also where messages are taken together, what has been searched is not searched again."""
    looked = 0

    class Counting(bytearray):
        """Counts the bytes that a search for something that is not there looks at."""

        def find(self, *args: Any) -> int:
            nonlocal looked
            looked += len(self) - (args[1] if len(args) > 1 else 0)
            return super().find(*args)

    buffer = Buffer()
    for _ in range(600):
        buffer.append(b"x" * 100)
        data, _, _ = buffer.window()
        if not isinstance(data, Counting):
            monkeypatch.setattr(buffer, "_data", Counting(data))
        assert codec.decode_into(buffer, [], 32)
    assert looked < 3 * 60_000
