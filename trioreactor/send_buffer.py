"""SendBuffer: what has been sent by the user and not yet taken by the kernel.

Layout. A queue of chunks, written from the left, with small ones gathered at the right::

    _chunks   | memoryview | bytes | bytes | bytearray |
              ^ rest of a partly written one ^ tail: small sends are copied to its end

Large `bytes` are queued by reference, so a broadcast to a thousand connections holds its message
once. Small ones are gathered: a million one-byte sends are a few entries, not a million objects.

Nothing here does I/O or calls anybody. `append` and `consume` say which watermark was crossed and
leave it to the caller to act.
"""

from __future__ import annotations

import enum
from collections import deque
from itertools import islice
from typing import Self

from trioreactor.options import Watermarks

# Counted against the hard limit for each entry: a bytes object's header, its slot in the queue
# and the allocator's rounding (CPython 3.11 to 3.13, measured: 33 + 8 + up to 15 bytes).
ENTRY_OVERHEAD = 64

# A chunk below this is copied into the tail: copying 512 bytes costs less than an entry's
# share of a gather write.
_GATHER_BELOW = 512

# The tail is closed at this size, so that growing it never moves much.
_TAIL_LIMIT = 16384

# One gather write: Linux takes at most IOV_MAX (1024) chunks; the gain is flat after a few dozen.
_GATHER_CHUNKS = 64
_GATHER_BYTES = 262144


class Droppable(bytes):
    """A message that may be dropped whole while nothing of it has been written.

    One object serves every connection that a broadcast goes to.
    """

    __slots__ = ()

    def __new__(cls, data: bytes | bytearray | memoryview) -> Self:
        """A copy of *data*, as it is now."""
        # bytes would make zeros of a number.
        return super().__new__(cls, bytes_view(data))


class Crossing(enum.Enum):
    """What a change of the buffer's size did to its watermarks."""

    NONE = 0
    HIGH = 1
    """It rose above the high-water mark."""
    LOW = 2
    """It sank to the low-water mark or below, after it had been above the high one."""


class SendBuffer:
    """A queue of bytes with two watermarks and a hard limit.

    `size` is the number of bytes queued. `congested` is True from the moment the size rises above
    `Watermarks.high` until it sinks to `Watermarks.low` or below: each change of it is reported
    once, as a `Crossing`.
    """

    __slots__ = (
        "_chunks",
        "congested",
        "droppable",
        "dropped",
        "high",
        "limit",
        "low",
        "pauses",
        "refused",
        "resumes",
        "size",
        "told",
    )

    def __init__(self, watermarks: Watermarks) -> None:
        self._chunks: deque[bytes | bytearray | memoryview] = deque()
        self.high = watermarks.high
        self.low = watermarks.low
        self.limit = watermarks.limit
        self.size = 0
        self.congested = False
        # Crossings, counted so that anybody can see that they come in pairs.
        self.pauses = 0
        self.resumes = 0
        # What `memory` would be less by if all that may be dropped were.
        self.droppable = 0
        # Messages that were dropped for want of room.
        self.dropped = 0
        # Those of them that were never queued, and those that whoever offers has heard of.
        self.refused = 0
        self.told = 0

    def __len__(self) -> int:
        return self.size

    @property
    def entries(self) -> int:
        """How many chunks are queued."""
        return len(self._chunks)

    @property
    def memory(self) -> int:
        """What counts against `Watermarks.limit`: the bytes and the queue's own overhead."""
        return self.size + ENTRY_OVERHEAD * len(self._chunks)

    def has_room(self, n: int) -> bool:
        """Whether *n* more bytes stay within `Watermarks.limit` now."""
        return self.limit is None or self.memory + ENTRY_OVERHEAD + n <= self.limit

    def can_ever_hold(self, n: int) -> bool:
        """Whether *n* bytes stay within `Watermarks.limit` when nothing else is queued."""
        return self.limit is None or ENTRY_OVERHEAD + n <= self.limit

    def could_have_room(self, n: int) -> bool:
        """`has_room`, if what may be dropped for it were."""
        return self.has_room(n - self.droppable)

    @property
    def must_go(self) -> int:
        """`memory` without what may be dropped."""
        return self.memory - self.droppable

    def append(self, data: bytes | memoryview) -> Crossing:
        """Queue *data*, which must not be empty and, if a memoryview, must be of bytes.

        The caller has asked `has_room` before.
        """
        self._put(data, len(data))
        if self.size > self.high and not self.congested:
            self.congested = True
            self.pauses += 1
            return Crossing.HIGH
        return Crossing.NONE

    def append_below(self, data: bytes | memoryview) -> bool:
        """`append`, if that crosses no mark and there is room. Whether it was done."""
        n = len(data)
        size = self.size + n
        chunks = self._chunks
        if size > self.high or (
            self.limit is not None and size + ENTRY_OVERHEAD * (len(chunks) + 1) > self.limit
        ):
            return False
        self._put(data, n)
        return True

    def _put(self, data: bytes | memoryview, n: int) -> None:
        chunks = self._chunks
        if n < _GATHER_BELOW and type(data) is not Droppable:
            tail = chunks[-1] if chunks else None
            if type(tail) is bytearray and len(tail) < _TAIL_LIMIT:
                tail += data
            else:
                chunks.append(bytearray(data))
        else:
            chunks.append(data)
            if type(data) is Droppable:
                self.droppable += n + ENTRY_OVERHEAD
        self.size += n

    def gather(self) -> list[bytes | bytearray | memoryview]:
        """The chunks for one gather write, in order: at least one if any is queued."""
        chunks = self._chunks
        if len(chunks) == 1:
            return [chunks[0]]
        total = 0
        batch: list[bytes | bytearray | memoryview] = []
        for chunk in islice(chunks, _GATHER_CHUNKS):
            batch.append(chunk)
            total += len(chunk)
            if total >= _GATHER_BYTES:
                break
        return batch

    def consume(self, n: int) -> Crossing:
        """Drop the first *n* bytes: the kernel has them. *n* is at most `size`."""
        chunks = self._chunks
        self.size -= n
        while n:
            head = chunks[0]
            if type(head) is Droppable:
                self.droppable -= len(head) + ENTRY_OVERHEAD
            if n < len(head):
                if type(head) is bytearray and len(chunks) == 1:
                    # It is the tail too and may yet grow, which a view would forbid.
                    del head[:n]
                else:
                    chunks[0] = memoryview(head)[n:]
                break
            n -= len(head)
            chunks.popleft()
        return self._sunk()

    def _sunk(self) -> Crossing:
        if self.congested and self.size <= self.low:
            self.congested = False
            self.resumes += 1
            return Crossing.LOW
        return Crossing.NONE

    def pin(self, n: int) -> None:
        """The first *n* bytes are as good as written: none of their messages may be dropped."""
        chunks = self._chunks
        index = 0
        while n > 0:
            chunk = chunks[index]
            if type(chunk) is Droppable:
                self.droppable -= len(chunk) + ENTRY_OVERHEAD
                chunks[index] = memoryview(chunk)
            n -= len(chunk)
            index += 1

    def refuse(self) -> None:
        """A message is dropped before it is queued."""
        self.dropped += 1
        self.refused += 1

    def drop_oldest(self, n: int) -> Crossing:
        """Drop the oldest `Droppable` messages until *n* more bytes have room; none, if not even
        all of them would make that.
        """
        room = self.has_room(n)
        if not room and not self.could_have_room(n):
            return Crossing.NONE
        chunks = self._chunks
        stay: list[bytes | bytearray | memoryview] = []
        while chunks and not room:
            chunk = chunks.popleft()
            if type(chunk) is Droppable:
                self.size -= len(chunk)
                self.droppable -= len(chunk) + ENTRY_OVERHEAD
                self.dropped += 1
                room = self.limit is None or (
                    self.memory + ENTRY_OVERHEAD * (len(stay) + 1) + n <= self.limit
                )
            else:
                stay.append(chunk)
        chunks.extendleft(reversed(stay))
        return self._sunk()

    def clear(self) -> None:
        """Drop everything. No crossing: whoever clears has closed the connection."""
        self._chunks.clear()
        self.size = self.droppable = 0
        self.congested = False


def bytes_view(data: bytes | bytearray | memoryview) -> memoryview:
    """*data* as a view of single bytes, whatever its items are."""
    view = memoryview(data)
    # An empty view cannot be cast.
    return view.cast("B") if view.nbytes else memoryview(b"")


def kept(data: bytes | memoryview) -> bytes | memoryview:
    """*data* in a form that may be kept: a view of anything but bytes would change under us."""
    return data if isinstance(data, bytes) or isinstance(data.obj, bytes) else bytes(data)
