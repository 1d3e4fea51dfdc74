"""What the tests of codecs share: decoding a stream that comes in pieces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import Any

from trioreactor import NEED_MORE, Buffer, Codec, ProtocolError

Outcome = tuple[list[Any], type[ProtocolError] | None, bytes]


def decoded(codec: Codec[Any], pieces: Iterable[bytes]) -> Outcome:
    """What *codec* makes of *pieces*: the messages, the error that ended them, and what was left.

    Checks that it takes nothing from the buffer while it needs more.
    """
    buffer = Buffer()
    messages: list[Any] = []
    for piece in pieces:
        buffer.append(piece)
        while True:
            before = bytes(buffer)
            try:
                message = codec.decode(buffer)
            except ProtocolError as error:
                return messages, type(error), b""
            if message is NEED_MORE:
                assert bytes(buffer) == before
                break
            assert buffer.size < len(before)
            messages.append(message)
    return messages, None, bytes(buffer)


def in_pieces(stream: bytes) -> Iterator[list[bytes]]:
    """*stream* cut at one place, at two, and everywhere."""
    for cut in range(len(stream) + 1):
        yield [stream[:cut], stream[cut:]]
    for first, second in combinations(range(1, len(stream)), 2):
        yield [stream[:first], stream[first:second], stream[second:]]
    yield [stream[at : at + 1] for at in range(len(stream))]


def check_every_cut(codec: Codec[Any], stream: bytes) -> Outcome:
    """Assert that it does not matter where *stream* is cut; give what it decodes to."""
    whole = decoded(codec, [stream])
    for pieces in in_pieces(stream):
        messages, error, left = decoded(codec, pieces)
        assert (messages, left) == (whole[0], whole[2]), pieces
        # A piece may be enough to know that a message is too long, and all of it to know more.
        assert (error is None) == (whole[1] is None), pieces
    return whole
