"""Whatever bytes come, a codec decodes them or raises what it says, soon and in bounded memory.

Valid streams are changed at random, cut at random, and decoded. Each chunk of inputs follows from
its codec's name and its number alone, so a failure can be had again:
``fuzz("netstring", 17)``.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections import Counter
from typing import Any

import pytest

from tests.decoding import decoded
from tests.soak.conftest import Figure
from trioreactor import (
    NEED_MORE,
    Buffer,
    Codec,
    DelimiterCodec,
    FixedLengthCodec,
    IncompleteFrame,
    JsonLinesCodec,
    LengthHeaderCodec,
    LineCodec,
    NetstringCodec,
    ProtocolError,
    VarintCodec,
)

# However many inputs there are, each has to end.
pytestmark = [pytest.mark.soak, pytest.mark.timeout(0)]

INPUTS = int(os.environ.get("TRIOREACTOR_FUZZ_INPUTS", "50000"))
"""For each codec."""

CHUNK = 20_000
# A chunk takes well under a second: one that does not end is a hang.
CHUNK_SECONDS = 120

# Small, so that it is passed often.
MOST = 40
# At least what is around the longest message: eleven bytes of a header, a delimiter, digits.
OVERHEAD = 16

CODECS: dict[str, list[Codec[Any]]] = {
    "length-header": [
        LengthHeaderCodec(max_frame=MOST),
        LengthHeaderCodec(1, signed=True, max_frame=MOST, adjustment=-1),
        LengthHeaderCodec(2, byteorder="little", max_frame=MOST, header_included=True),
        LengthHeaderCodec(3, max_frame=MOST, offset=2, adjustment=1),
        LengthHeaderCodec(8, max_frame=MOST, header_included=True, offset=3),
    ],
    "length-header-checksum": [
        LengthHeaderCodec(max_frame=MOST, checksum="adler32"),
        LengthHeaderCodec(1, signed=True, max_frame=MOST, checksum="crc32", header_included=True),
        LengthHeaderCodec(5, byteorder="little", max_frame=MOST, checksum="crc32", offset=2),
    ],
    "varint": [VarintCodec(max_frame=MOST), VarintCodec(max_frame=200)],
    "netstring": [NetstringCodec(max_frame=MOST), NetstringCodec(max_frame=9)],
    "fixed-length": [FixedLengthCodec(1), FixedLengthCodec(7)],
    "line": [
        LineCodec(max_frame=MOST),
        LineCodec("ascii", ending="\n", max_frame=MOST),
        LineCodec("latin-1", ending="\r\n", max_frame=MOST),
        LineCodec(None, max_frame=5),
    ],
    "delimiter": [
        DelimiterCodec(b"\0", max_frame=MOST),
        DelimiterCodec(b"--", max_frame=MOST),
        DelimiterCodec(b"aba", max_frame=5),
    ],
    "json-lines": [JsonLinesCodec(max_frame=MOST)],
    "mapped": [
        NetstringCodec(max_frame=MOST).map(str.encode, bytes.decode),
        DelimiterCodec(b"\0", max_frame=MOST).map(str.encode, lambda frame: str(int(frame))),
    ],
}

# Bytes that mean something to one codec or another are put in more often than others.
TELLING = b'\x00\x01\x02\x7f\x80\xff:,0129\r\n-ab"[{}]\\N'

TEXTS = ["", "a", "5", "-17", "aba", "--", "ü€", "\r", "hello world", "x" * 9, "y" * 36]
JSON_VALUES = [None, 5, -1.5e300, "ü\n", [], [[1], {"a": [True]}], {"k": "v"}, "x" * 30]


def valid_streams(codec: Codec[Any], rng: random.Random) -> list[bytes]:
    """Streams of a few messages each that *codec* can send."""
    frames = []
    for value in [*TEXTS, *JSON_VALUES]:
        for message in (value, str(value).encode(), bytes(7), b"z"):
            try:
                frames.append(codec.encode(message))
            except (ValueError, TypeError):  # the second is of functions given to `map`
                continue
    return [b"".join(rng.choices(frames, k=rng.randrange(1, 5))) for _ in range(200)]


def mutated(stream: bytes, rng: random.Random) -> bytes:
    """*stream* with one change or a few."""
    data = bytearray(stream)
    uniform = rng.random
    for _ in range(1 + int(uniform() * uniform() * 4)):
        kind = int(uniform() * 6)
        at = int(uniform() * len(data))
        if kind == 0:
            data.insert(at, TELLING[int(uniform() * len(TELLING))])
        elif not data:
            data += b"\n"
        elif kind == 1:
            data[at] = TELLING[int(uniform() * len(TELLING))]
        elif kind == 2:
            data[at] ^= 1 << int(uniform() * 8)
        elif kind == 3:
            del data[at : at + 1 + int(uniform() * 4)]
        elif kind == 4:
            data[at:at] = data[int(uniform() * len(data)) :]
        else:
            data[at] = int(uniform() * 256)
    return bytes(data)


def many_at_once(codec: Codec[Any], pieces: list[bytes]) -> tuple[list[Any], bool]:
    """What is decoded of *pieces*, three messages at a time, and whether without an error."""
    buffer = Buffer()
    messages: list[Any] = []
    for piece in pieces:
        buffer.append(piece)
        try:
            while not codec.decode_into(buffer, messages, 3):
                pass
        except ProtocolError:
            return messages, False
    return messages, True


def outcome(codec: Codec[Any], pieces: list[bytes]) -> str:
    """Decode *pieces* as a connection would; check all promises; say how it ended."""
    buffer = Buffer()
    decode = codec.decode
    room = codec.max_frame + OVERHEAD
    for piece in pieces:
        buffer.append(piece)
        size = buffer.size
        try:
            while True:
                message = decode(buffer)
                if message is NEED_MORE:
                    break
                # Each message takes some, so there is an end to them.
                assert buffer.size < size
                size = buffer.size
        except ProtocolError as error:
            return type(error).__name__
        assert buffer.size == size, "something was taken and nothing given"
        assert size <= room, "more is kept than a message can have"
    try:
        codec.check_end(buffer)
    except IncompleteFrame:
        assert buffer.size
        return "IncompleteFrame"
    assert not buffer.size
    return "all decoded"


def fuzz(name: str, chunk: int, inputs: int = CHUNK) -> Counter[str]:
    """Decode so many mutated inputs; count how they ended."""
    rng = random.Random(f"{name} {chunk}")
    uniform = rng.random
    pools = [(codec, valid_streams(codec, rng)) for codec in CODECS[name]]
    ends: Counter[str] = Counter()
    for number in range(inputs):
        codec, pool = pools[number % len(pools)]
        data = mutated(pool[int(uniform() * len(pool))], rng)
        first, second = int(uniform() * len(data)), int(uniform() * len(data))
        if first > second:
            first, second = second, first
        pieces = [data[:first], data[first:second], data[second:]]
        try:
            ends[outcome(codec, pieces)] += 1
            if not number % 16:
                # How it was cut makes no difference, nor whether it is decoded one by one.
                whole, cut = decoded(codec, [data]), decoded(codec, pieces)
                assert (whole[0], whole[1] is None) == (cut[0], cut[1] is None)
                assert many_at_once(codec, pieces) == (cut[0], cut[1] is None)
        except Exception as error:
            kind = type(codec).__name__
            raise AssertionError(f"{kind}, input {number} of {name} {chunk}: {pieces}") from error
    return ends


def _fuzz(job: tuple[str, int, int]) -> Counter[str]:
    return fuzz(*job)


@pytest.mark.parametrize("name", CODECS)
def test_mutated_streams(name: str, figure: Figure) -> None:
    """No error but `ProtocolError`, no hang, nothing kept beyond a frame, and no message without
    bytes of its own; and the inputs are such that some are fine and some are not.
    """
    processes = len(os.sched_getaffinity(0))
    jobs = [(name, at // CHUNK, min(CHUNK, INPUTS - at)) for at in range(0, INPUTS, CHUNK)]
    ends: Counter[str] = Counter()
    begun = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(min(processes, len(jobs))) as pool:
        results = pool.imap_unordered(_fuzz, jobs)
        for _ in jobs:
            ends += results.next(CHUNK_SECONDS)
    seconds = time.perf_counter() - begun
    assert ends.total() == INPUTS
    figure("inputs", f"{INPUTS} in {seconds:.1f} s, {processes} processes")
    figure("ended", ", ".join(f"{count} {end}" for end, count in ends.most_common()))
    assert ends["all decoded"] > INPUTS // 1000
    if name != "fixed-length":
        assert ends["FrameTooLarge"] + ends["ProtocolError"] > INPUTS // 1000
