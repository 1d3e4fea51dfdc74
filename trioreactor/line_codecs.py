"""Codecs that look for the end of a message."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast, overload

from trioreactor.codec import (
    NEED_MORE,
    Codec,
    CodecOnFrames,
    MappedCodec,
    NeedMore,
    as_bytes,
    check_max_frame,
)
from trioreactor.errors import FrameTooLarge, ProtocolError
from trioreactor.length_codecs import DEFAULT_MAX_FRAME

if TYPE_CHECKING:
    from trioreactor.buffer import Buffer


class DelimiterCodec(Codec[bytes]):
    """Messages that end with *delimiter*, which no message contains."""

    __slots__ = ("_delimiter", "told")

    def __init__(self, delimiter: bytes, *, max_frame: int = DEFAULT_MAX_FRAME) -> None:
        super().__init__(max_frame)
        if not isinstance(delimiter, bytes) or not delimiter:
            raise ValueError(f"DelimiterCodec({delimiter!r}): pass bytes, at least one")
        self._delimiter = delimiter
        # The limit that errors tell of.
        self.told = max_frame

    def decode(self, buffer: Buffer) -> bytes | NeedMore:
        """The next message, without its delimiter. Waiting for it costs linear time."""
        size = len(self._delimiter)
        end = buffer.find(self._delimiter)
        if end < 0:
            if buffer.size >= self.max_frame + size:
                raise self._too_large()
            return NEED_MORE
        if end > self.max_frame:
            raise self._too_large()
        message = buffer.take(end)
        buffer.discard(size)
        return message

    def decode_into(self, buffer: Buffer, messages: list[bytes], most: int) -> bool:
        """As `decode`, so many times, in one go."""
        delimiter, size = self._delimiter, len(self._delimiter)
        # The buffer remembers how far it has searched for the end of the first.
        first = buffer.find(delimiter)
        if first < 0:
            return self.decode(buffer) is NEED_MORE
        data, begin, end = buffer.window()
        at, found = begin, begin + first
        try:
            for _ in range(most):
                if found < 0:
                    break
                if found - at > self.max_frame:
                    raise self._too_large()
                messages.append(bytes(data[at:found]))
                at = found + size
                found = data.find(delimiter, at, end)
            else:
                return False
        finally:
            buffer.discard(at - begin)
        return self.decode(buffer) is NEED_MORE

    def _too_large(self) -> FrameTooLarge:
        return FrameTooLarge(f"a message of more than {self.told} bytes")

    def encode(self, message: bytes) -> bytes:
        """*message* and its delimiter. `ValueError` if it contains that."""
        if type(message) is not bytes:
            message = as_bytes(self, message)
        if len(message) > self.max_frame:
            raise ValueError(
                f"a message of {len(message)} bytes, and at most {self.max_frame} are allowed"
            )
        framed = message + self._delimiter
        # Together they may have one that neither has alone.
        if framed.find(self._delimiter) != len(message):
            raise ValueError(f"a message that contains the delimiter {self._delimiter!r}")
        return framed


Text = TypeVar("Text", str, bytes)
Ending = Literal["any", "\n", "\r\n"]


class LineCodec(CodecOnFrames[Text, bytes], Generic[Text]):
    r"""Lines: messages of text in *encoding*, or of bytes if that is None.

    *ending* says what ends one: ``"\n"``, ``"\r\n"``, or ``"any"`` of the two, and then lines are
    sent with ``"\n"``. *max_frame* counts bytes, without the ending. A line that is not in the
    encoding is a `ProtocolError`, and a last one without an ending an `IncompleteFrame`.
    """

    __slots__ = ("_any", "_encoding")

    @overload
    def __init__(
        self: LineCodec[str],
        encoding: str = "utf-8",
        *,
        ending: Ending = "any",
        max_frame: int = DEFAULT_MAX_FRAME,
    ) -> None: ...

    @overload
    def __init__(
        self: LineCodec[bytes],
        encoding: None,
        *,
        ending: Ending = "any",
        max_frame: int = DEFAULT_MAX_FRAME,
    ) -> None: ...

    def __init__(
        self,
        encoding: str | None = "utf-8",
        *,
        ending: Ending = "any",
        max_frame: int = DEFAULT_MAX_FRAME,
    ) -> None:
        super().__init__(max_frame)
        if ending not in ("any", "\n", "\r\n"):
            raise ValueError(f'LineCodec(ending={ending!r}): pass "\\n", "\\r\\n" or "any"')
        if encoding is not None:
            try:
                newline = "\n".encode(encoding)
            # "undefined" is an encoding that nothing can be encoded in; a NUL is in no name.
            except (LookupError, TypeError, ValueError):
                text = "pass the name of a text encoding, or None for bytes"
                raise ValueError(f"LineCodec({encoding!r}): {text}") from None
            if newline != b"\n":
                raise ValueError(
                    f"LineCodec({encoding!r}): its line ending is {newline!r}; pass an encoding in "
                    "which that is one byte, or use DelimiterCodec"
                )
        self._encoding = encoding
        self._any = ending == "any"
        self._framing = lines = DelimiterCodec(
            b"\r\n" if ending == "\r\n" else b"\n", max_frame=max_frame + self._any
        )
        lines.told = max_frame

    def _decoded(self, frame: bytes) -> Text:
        if self._any:
            if frame.endswith(b"\r"):
                frame = frame[:-1]
            if len(frame) > self.max_frame:
                raise FrameTooLarge(f"a line of more than {self.max_frame} bytes")
        message: object = frame
        try:
            if self._encoding is not None:
                message = frame.decode(self._encoding)
        except UnicodeError as error:
            raise ProtocolError(f"a line that is not {self._encoding}: {error}") from None
        return cast("Text", message)

    def encode(self, message: Text) -> bytes:
        """The line with its ending. `ValueError` if it contains one."""
        if self._encoding is None:
            line = message if type(message) is bytes else as_bytes(self, message)
        elif isinstance(message, str):
            line = message.encode(self._encoding)
        else:
            raise ValueError(
                f"a line of type {type(message).__name__}: LineCodec({self._encoding!r}) sends "
                "text, so pass str"
            )
        if self._any and line.endswith(b"\r"):
            raise ValueError("a line that ends with a carriage return: it would be taken off")
        if len(line) > self.max_frame:
            raise ValueError(
                f"a line of {len(line)} bytes, and at most {self.max_frame} are allowed"
            )
        return self._framing.encode(line)


class JsonLinesCodec(MappedCodec[Any, bytes]):
    """A JSON value on each line. `ProtocolError` for what is not JSON, such as NaN, and for numbers
    that a float cannot hold, such as 1e999, which would become an infinity.
    """

    __slots__ = ()

    def __init__(self, *, max_frame: int = DEFAULT_MAX_FRAME) -> None:
        check_max_frame("JsonLinesCodec", max_frame)
        super().__init__(LineCodec(None, max_frame=max_frame), _to_json, _from_json)


def _to_json(value: Any) -> bytes:
    try:
        # No line breaks, for strings have theirs escaped.
        return _ENCODER.encode(value).encode()
    except (TypeError, RecursionError) as error:
        raise ValueError(f"a message that is not JSON: {error}") from error


def _from_json(line: bytes) -> Any:
    return _DECODER.decode(line.decode())


def _finite_float(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError("a number beyond a float's range")
    return number


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


# With options, json's own functions make a new one for each message.
_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_DECODER = json.JSONDecoder(parse_float=_finite_float, parse_constant=_refuse_constant)
