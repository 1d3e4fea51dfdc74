"""Buffer: the bytes that have been received and not consumed yet.

Layout. One object holds the bytes, and a cursor says how many of them are consumed::

    _data   | consumed          | readable                 |
            0                 _start                    len(_data)

``_data`` is either

* ``bytes``, one chunk as the socket gave it. Consuming moves the cursor, and taking a whole
  untouched chunk hands that object itself over: no copy between the kernel and the user. Or
* ``bytearray``, as soon as a second chunk arrived before the first was consumed. Its append is
  amortised O(1), and CPython deletes from its front without moving the rest.

The consumed part of a ``bytearray`` is deleted when it outgrows the readable one, so memory is at
most twice what is readable plus one chunk, and each byte is moved O(1) times.
"""

from __future__ import annotations

import struct
from typing import Any

_INT8 = struct.Struct("!b")
_INT16 = struct.Struct("!h")
_INT32 = struct.Struct("!i")
_INT64 = struct.Struct("!q")

# Below this, deleting the consumed front costs more than keeping it.
_COMPACT_AT = 4096


class Buffer:
    """Bytes that arrive at the back and are consumed from the front.

    Integers are signed and in network byte order, as in muduo's Buffer. What is asked for and not
    there raises `ValueError` and consumes nothing.
    """

    __slots__ = ("_data", "_scan", "_start", "size")

    def __init__(self, data: bytes | bytearray | memoryview = b"") -> None:
        # Through a view, for bytes(5) would be five zeros.
        self._data: bytes | bytearray = bytes(memoryview(data))
        self._start = 0
        # What `len` says, for those who ask for every message: an attribute costs less.
        self.size = len(self._data)
        # How far the last unsuccessful `find` got: (delimiter, from, up to), relative to _start.
        self._scan: tuple[bytes, int, int] | None = None

    def __len__(self) -> int:
        return self.size

    def __bytes__(self) -> bytes:
        return self.peek()

    def __repr__(self) -> str:
        return f"<Buffer of {len(self)} bytes>"

    def append(self, data: bytes | bytearray | memoryview) -> None:
        """Add *data* at the back. A `bytes` object that meets an empty buffer is not copied."""
        if not self.size:
            self._data = data if type(data) is bytes else bytes(memoryview(data))
            self.size = len(self._data)
            return
        if type(self._data) is bytes:
            self._data = bytearray(memoryview(self._data)[self._start :])
            self._start = 0
        self._data += data
        self.size = len(self._data) - self._start

    def prepend(self, data: bytes | bytearray | memoryview) -> None:
        """Put *data* back at the front, before everything readable."""
        size = memoryview(data).nbytes
        if type(self._data) is bytearray and size <= self._start:
            self._data[self._start - size : self._start] = data
            self._start -= size
        else:
            self._data = bytes(data) + self._data[self._start :]
            self._start = 0
        self.size += size
        self._scan = None

    def peek(self, n: int | None = None) -> bytes:
        """Up to *n* bytes from the front, or all, without consuming them."""
        start = self._start
        if n is None:
            if type(self._data) is bytes and not start:
                return self._data
            return bytes(self._data[start:])
        if n < 0:
            raise ValueError(f"cannot peek at {n} bytes: pass a number >= 0")
        return bytes(self._data[start : start + n])

    def take(self, n: int | None = None) -> bytes:
        """Consume and return exactly *n* bytes, or all of them.

        A single chunk that nobody has touched is handed over without a copy.
        """
        start = self._start
        data = self._data
        if n is None or n == self.size:
            self._clear()
            return data if not start and type(data) is bytes else bytes(data[start:])
        if n < 0 or n > self.size:
            raise self._out_of_range(n)
        taken = bytes(data[start : start + n])
        self._advance(n)
        return taken

    def take_after(self, skip: int, n: int) -> bytes:
        """Discard *skip* bytes, then consume and return exactly *n*: what is behind a header."""
        total = skip + n
        if skip < 0 or n < 0 or total > self.size:
            raise self._out_of_range(total)
        start = self._start + skip
        taken = self._data[start : start + n]
        self._advance(total)
        return taken if type(taken) is bytes else bytes(taken)

    def window(self) -> tuple[bytes | bytearray, int, int]:
        """The bytes where they lie: an object, and where in it they begin and end. Good until the
        buffer changes. For those who look at many small parts before they `discard` them together.
        """
        return self._data, self._start, self._start + self.size

    def discard(self, n: int) -> None:
        """Consume exactly *n* bytes."""
        if n < 0 or n > self.size:
            raise self._out_of_range(n)
        self._advance(n)

    def find(self, delimiter: bytes, start: int = 0) -> int:
        """Where *delimiter* first begins at or after *start*, from the front; -1 if nowhere.

        A search that found nothing is remembered: asking again for the same delimiter after more
        bytes arrived looks at the new ones only, so waiting for a delimiter costs linear time.
        """
        if not delimiter:
            raise ValueError("an empty delimiter is everywhere: pass at least one byte")
        if start < 0:
            raise ValueError(f"cannot search from {start}: pass a number >= 0")
        begin = start
        scan = self._scan
        if scan is not None and scan[0] == delimiter and scan[1] <= start:
            begin = max(start, scan[2])
        found = self._data.find(delimiter, self._start + begin)
        if found >= 0:
            return found - self._start
        # A match can still begin in the last len-1 bytes, once more arrive.
        up_to = max(start, self.size - len(delimiter) + 1)
        self._scan = (bytes(delimiter), start, up_to)
        return -1

    def unpack(self, layout: struct.Struct, offset: int = 0) -> tuple[Any, ...]:
        """The fields of *layout*, *offset* bytes from the front, without consuming them."""
        if offset < 0:
            raise ValueError(f"cannot unpack from {offset}: pass a number >= 0")
        if self.size < offset + layout.size:
            raise self._out_of_range(offset + layout.size)
        return layout.unpack_from(self._data, self._start + offset)

    def peek_int8(self) -> int:
        """The signed 8-bit integer at the front."""
        return self._unpack(_INT8)

    def peek_int16(self) -> int:
        """The signed 16-bit integer at the front."""
        return self._unpack(_INT16)

    def peek_int32(self) -> int:
        """The signed 32-bit integer at the front."""
        return self._unpack(_INT32)

    def peek_int64(self) -> int:
        """The signed 64-bit integer at the front."""
        return self._unpack(_INT64)

    def read_int8(self) -> int:
        """Consume a signed 8-bit integer."""
        value = self._unpack(_INT8)
        self._advance(1)
        return value

    def read_int16(self) -> int:
        """Consume a signed 16-bit integer."""
        value = self._unpack(_INT16)
        self._advance(2)
        return value

    def read_int32(self) -> int:
        """Consume a signed 32-bit integer."""
        value = self._unpack(_INT32)
        self._advance(4)
        return value

    def read_int64(self) -> int:
        """Consume a signed 64-bit integer."""
        value = self._unpack(_INT64)
        self._advance(8)
        return value

    def append_int8(self, value: int) -> None:
        """Add a signed 8-bit integer at the back; `struct.error` if it does not fit."""
        self.append(_INT8.pack(value))

    def append_int16(self, value: int) -> None:
        """Add a signed 16-bit integer at the back; `struct.error` if it does not fit."""
        self.append(_INT16.pack(value))

    def append_int32(self, value: int) -> None:
        """Add a signed 32-bit integer at the back; `struct.error` if it does not fit."""
        self.append(_INT32.pack(value))

    def append_int64(self, value: int) -> None:
        """Add a signed 64-bit integer at the back; `struct.error` if it does not fit."""
        self.append(_INT64.pack(value))

    def prepend_int8(self, value: int) -> None:
        """Put a signed 8-bit integer at the front; `struct.error` if it does not fit."""
        self.prepend(_INT8.pack(value))

    def prepend_int16(self, value: int) -> None:
        """Put a signed 16-bit integer at the front; `struct.error` if it does not fit."""
        self.prepend(_INT16.pack(value))

    def prepend_int32(self, value: int) -> None:
        """Put a signed 32-bit integer at the front; `struct.error` if it does not fit."""
        self.prepend(_INT32.pack(value))

    def prepend_int64(self, value: int) -> None:
        """Put a signed 64-bit integer at the front; `struct.error` if it does not fit."""
        self.prepend(_INT64.pack(value))

    def _unpack(self, layout: struct.Struct) -> int:
        if self.size < layout.size:
            raise self._out_of_range(layout.size)
        value: int = layout.unpack_from(self._data, self._start)[0]
        return value

    def _advance(self, n: int) -> None:
        if n == self.size:
            self._clear()
            return
        self.size -= n
        start = self._start + n
        data = self._data
        if type(data) is bytearray and start >= _COMPACT_AT and start * 2 >= len(data):
            del data[:start]
            start = 0
        self._start = start
        if self._scan is not None:
            delimiter, begin, up_to = self._scan
            self._scan = (delimiter, max(0, begin - n), up_to - n) if up_to > n else None

    def _clear(self) -> None:
        self._data = b""
        self._start = 0
        self.size = 0
        self._scan = None

    def _out_of_range(self, n: int) -> ValueError:
        return ValueError(f"asked for {n} bytes of a buffer that holds {self.size}")
