"""Codecs that know a message's length before they read it."""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING, Literal

from trioreactor.codec import NEED_MORE, Codec, NeedMore, as_bytes
from trioreactor.errors import FrameTooLarge, ProtocolError
from trioreactor.options import check_count, check_present

if TYPE_CHECKING:
    from collections.abc import Callable

    from trioreactor.buffer import Buffer

# muduo's chat codec.
DEFAULT_MAX_FRAME = 65536

# What one instruction unpacks; other widths are put together from bytes.
_FORMATS = {1: "b", 2: "h", 4: "i", 8: "q"}

_CHECKSUMS: dict[str, Callable[[bytes], int]] = {"crc32": zlib.crc32, "adler32": zlib.adler32}
_CHECKSUM_SIZE = 4

# What the widest length field can count.
_MOST = 2**64 - 1


class LengthHeaderCodec(Codec[bytes]):
    """A length, then so many bytes: the usual framing, and muduo's.

    The frame and the message::

        frame    | offset bytes | length | rest, checksum included if there is one |
        message  | offset bytes | rest without the checksum |

    The length field has *width* bytes, from 1 to 8, in *byteorder*. Its value, plus *adjustment*,
    is the size of the rest; with *header_included* it counts the offset and itself, too. A negative
    size is refused, and so is a rest of more than *max_frame* bytes. *checksum* is four bytes at
    the end, in *byteorder*, over the message.

    The field is unsigned, so that the whole of a narrow one counts. On the wire a signed one
    (muduo's int32) is the same for every length that both can say, and a negative length in it is
    read as a very large one: `FrameTooLarge`, unless *max_frame* reaches so far. With *signed* it
    is a plain `ProtocolError`, and a field may be negative if *adjustment* makes up for it.
    """

    __slots__ = (
        "_byteorder",
        "_checksum",
        "_extra",
        "_header",
        "_layout",
        "_offset",
        "_pack",
        "_signed",
        "_width",
    )

    def __init__(
        self,
        width: int = 4,
        *,
        byteorder: Literal["big", "little"] = "big",
        max_frame: int = DEFAULT_MAX_FRAME,
        signed: bool = False,
        header_included: bool = False,
        offset: int = 0,
        adjustment: int = 0,
        checksum: Literal["crc32", "adler32"] | None = None,
    ) -> None:
        super().__init__(max_frame)
        check_present("LengthHeaderCodec", width=width, offset=offset, adjustment=adjustment)
        check_count("LengthHeaderCodec", "width", width, least=1, most=8, unit="bytes")
        check_count("LengthHeaderCodec", "offset", offset, least=0, unit="bytes")
        check_count(
            "LengthHeaderCodec", "adjustment", adjustment, least=-_MOST, most=_MOST, unit="bytes"
        )
        if byteorder not in ("big", "little"):
            raise ValueError(f'LengthHeaderCodec(byteorder={byteorder!r}): pass "big" or "little"')
        if checksum is not None and checksum not in _CHECKSUMS:
            raise ValueError(
                f'LengthHeaderCodec(checksum={checksum!r}): pass "crc32", "adler32" or None'
            )
        self._width = width
        self._byteorder: Literal["big", "little"] = byteorder
        self._signed = signed
        self._offset = offset
        self._header = offset + width
        # From the field's value to the size of the rest.
        self._extra = adjustment - (self._header if header_included else 0)
        self._checksum = None if checksum is None else _CHECKSUMS[checksum]
        letter = _FORMATS.get(width)
        order = ">" if byteorder == "big" else "<"
        self._layout: struct.Struct | None = None
        if letter is not None:
            self._layout = struct.Struct(order + (letter if signed else letter.upper()))
        # For the frames that are no more than a length and a message, which most are.
        self._pack: Callable[[int], bytes] | None = None
        if self._layout is not None and not offset and checksum is None:
            self._pack = self._layout.pack

    def decode(self, buffer: Buffer) -> bytes | NeedMore:
        """The next message. `ProtocolError` for a negative size or a wrong checksum."""
        header = self._header
        if buffer.size < header:
            return NEED_MORE
        layout = self._layout
        if layout:
            size = buffer.unpack(layout, self._offset)[0] + self._extra
        else:
            field = buffer.peek(header)[self._offset :]
            size = int.from_bytes(field, self._byteorder, signed=self._signed) + self._extra
        if size < 0 or size > self.max_frame:
            raise self._refusal(size)
        if buffer.size < header + size:
            return NEED_MORE
        if not self._offset:
            message = buffer.take_after(header, size)
        else:
            front = buffer.take(header)[: self._offset]
            message = front + buffer.take(size)
        return message if self._checksum is None else self._checked(message, self._checksum)

    def decode_into(self, buffer: Buffer, messages: list[bytes], most: int) -> bool:
        """As `decode`, so many times; for plain frames in one go."""
        if self._pack is None or self._layout is None:
            return super().decode_into(buffer, messages, most)
        unpack, header, extra = self._layout.unpack_from, self._header, self._extra
        data, begin, end = buffer.window()
        at = begin
        try:
            for _ in range(most):
                front = at + header
                if front > end:
                    return True
                size = unpack(data, at)[0] + extra
                if size < 0 or size > self.max_frame:
                    raise self._refusal(size)
                if front + size > end:
                    return True
                at = front + size
                messages.append(bytes(data[front:at]))
            return False
        finally:
            buffer.discard(at - begin)

    def _refusal(self, size: int) -> ProtocolError:
        if size < 0:
            return ProtocolError(f"a frame of {size} bytes")
        return FrameTooLarge(f"a frame of {size} bytes, and at most {self.max_frame} are taken")

    def _checked(self, message: bytes, checksum: Callable[[bytes], int]) -> bytes:
        if len(message) < self._offset + _CHECKSUM_SIZE:
            raise ProtocolError("a frame without room for its checksum")
        message, found = message[:-_CHECKSUM_SIZE], message[-_CHECKSUM_SIZE:]
        if checksum(message) != int.from_bytes(found, self._byteorder):
            raise ProtocolError("a frame whose checksum is wrong")
        return message

    def encode(self, message: bytes) -> bytes:
        """*message* in its frame."""
        if type(message) is not bytes:
            message = as_bytes(self, message)
        if self._pack is not None and len(message) <= self.max_frame:
            try:
                return self._pack(len(message) - self._extra) + message
            except struct.error:
                pass  # below it is said better
        offset = self._offset
        if len(message) < offset:
            raise ValueError(f"a message of {len(message)} bytes: the offset alone has {offset}")
        tail = b""
        if self._checksum is not None:
            tail = self._checksum(message).to_bytes(_CHECKSUM_SIZE, self._byteorder)
        size = len(message) - offset + len(tail)
        if size > self.max_frame:
            raise ValueError(f"a frame of {size} bytes, and at most {self.max_frame} are allowed")
        try:
            if self._layout:
                field = self._layout.pack(size - self._extra)
            else:
                value = size - self._extra
                field = value.to_bytes(self._width, self._byteorder, signed=self._signed)
        except (struct.error, OverflowError):
            text = f"a frame of {size} bytes: its length does not fit into {self._width} bytes"
            raise ValueError(text) from None
        if not offset:
            return field + message + tail
        return b"".join((message[:offset], field, message[offset:], tail))


class VarintCodec(Codec[bytes]):
    """A length of seven bits a byte, lowest first, then so many bytes: delimited protobuf."""

    __slots__ = ()

    def __init__(self, *, max_frame: int = DEFAULT_MAX_FRAME) -> None:
        super().__init__(max_frame)

    def decode(self, buffer: Buffer) -> bytes | NeedMore:
        """The next message. `ProtocolError` for a length of more than ten bytes."""
        head = buffer.peek(_VARINT_MOST)
        size = 0
        for index, byte in enumerate(head):
            size |= (byte & 0x7F) << (7 * index)
            if size > self.max_frame:
                raise FrameTooLarge(
                    f"a frame of {size} bytes or more, and at most {self.max_frame} are taken"
                )
            if byte < 0x80:
                if buffer.size < index + 1 + size:
                    return NEED_MORE
                buffer.discard(index + 1)
                return buffer.take(size)
        if len(head) == _VARINT_MOST:
            raise ProtocolError("a length that does not end")
        return NEED_MORE

    def encode(self, message: bytes) -> bytes:
        """*message* behind its length."""
        if type(message) is not bytes:
            message = as_bytes(self, message)
        size = len(message)
        if size > self.max_frame:
            raise ValueError(f"a frame of {size} bytes, and at most {self.max_frame} are allowed")
        head = bytearray()
        while size > 0x7F:
            head.append(size & 0x7F | 0x80)
            size >>= 7
        head.append(size)
        return bytes(head) + message


# What 64 bits need.
_VARINT_MOST = 10


class NetstringCodec(Codec[bytes]):
    """A decimal length, a colon, so many bytes, a comma: D. J. Bernstein's netstrings."""

    __slots__ = ("_digits",)

    def __init__(self, *, max_frame: int = DEFAULT_MAX_FRAME) -> None:
        super().__init__(max_frame)
        self._digits = len(str(max_frame))

    def decode(self, buffer: Buffer) -> bytes | NeedMore:
        """The next message. `ProtocolError` for what is no netstring."""
        head = buffer.peek(self._digits + 1)
        digits, colon, _ = head.partition(b":")
        if digits and not (digits.isdigit() and (digits == b"0" or digits[:1] != b"0")):
            raise ProtocolError("a netstring without a proper length")
        if colon and not digits:
            raise ProtocolError("a netstring without a length")
        size = int(digits or b"0")
        if size > self.max_frame:
            raise FrameTooLarge(
                f"a netstring of {size} bytes or more, and at most {self.max_frame} are taken"
            )
        if not colon:
            return NEED_MORE
        if buffer.size < len(digits) + size + 2:
            return NEED_MORE
        buffer.discard(len(digits) + 1)
        message = buffer.take(size)
        if buffer.take(1) != b",":
            raise ProtocolError("a netstring without its comma")
        return message

    def encode(self, message: bytes) -> bytes:
        """*message* as a netstring."""
        if type(message) is not bytes:
            message = as_bytes(self, message)
        if len(message) > self.max_frame:
            raise ValueError(
                f"a netstring of {len(message)} bytes, and at most {self.max_frame} are allowed"
            )
        return b"%d:%b," % (len(message), message)


class FixedLengthCodec(Codec[bytes]):
    """Messages that all have the same *size*, in bytes."""

    __slots__ = ()

    def __init__(self, size: int) -> None:
        check_present("FixedLengthCodec", size=size)
        check_count("FixedLengthCodec", "size", size, least=1, unit="bytes")
        super().__init__(size)

    def decode(self, buffer: Buffer) -> bytes | NeedMore:
        """The next message."""
        return buffer.take(self.max_frame) if buffer.size >= self.max_frame else NEED_MORE

    def encode(self, message: bytes) -> bytes:
        """*message* itself. `ValueError` if it has another size."""
        if type(message) is not bytes:
            message = as_bytes(self, message)
        if len(message) != self.max_frame:
            raise ValueError(f"a message of {len(message)} bytes: each has {self.max_frame}")
        return message
