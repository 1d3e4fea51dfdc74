"""Codec: cuts a stream of bytes into messages and back. It does no I/O, so it fits both modes."""

from __future__ import annotations

import enum
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, cast

from trioreactor.errors import IncompleteFrame, ProtocolError
from trioreactor.options import check_count, check_present

if TYPE_CHECKING:
    from trioreactor.buffer import Buffer
    from trioreactor.tcp_connection import TcpConnection

T = TypeVar("T")
U = TypeVar("U")


class NeedMore(enum.Enum):
    """The type of `NEED_MORE`."""

    NEED_MORE = "need more"


NEED_MORE: Final = NeedMore.NEED_MORE
"""What `Codec.decode` answers when the buffer does not hold a whole message yet."""

# Messages that one connection is given before the others have their turn. At a microsecond or two
# for each it is a turn of about the length that a read of 64 KiB takes: of what is usually sent at
# once, all, and few enough that one who is flooded delays the others by no more than they wait for
# each other anyway. (scripts/soak tests/soak/test_burst.py)
MESSAGES_PER_TURN = 32

# More than any header, and what a read may have brought behind a message.
READ_AHEAD = 65536


class Codec(ABC, Generic[T]):
    """Decodes from a `Buffer` and encodes to bytes. T is the type of a message.

    One of your own is a subclass with `decode` and `encode`, and passes its limit on:
    ``super().__init__(max_frame)``. A codec has no state: one serves any number of connections.
    What `decode` raises is a `ProtocolError`, and what a message cannot be encoded for is a
    `ValueError`. This library's codecs of bytes also encode a bytearray or a memoryview, as its
    bytes.
    """

    __slots__ = ("max_frame",)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for base in cls.__mro__:
            if "decode_into" in vars(base):
                break
            if "decode" in vars(base):
                # A faster way that is inherited would pass this `decode` by.
                cls.decode_into = Codec.decode_into  # type: ignore[method-assign]
                break

    def __init__(self, max_frame: int) -> None:
        check_max_frame(type(self).__name__, max_frame)
        self.max_frame = max_frame

    @abstractmethod
    def decode(self, buffer: Buffer) -> T | NeedMore:
        """Take one message from the front of *buffer*, or answer `NEED_MORE` and take nothing.

        Raises `FrameTooLarge` as soon as it is known, or another `ProtocolError`.
        """

    def decode_into(self, buffer: Buffer, messages: list[T], most: int) -> bool:
        """Append the next messages, at most so many, to *messages*. True: there is now no further
        whole one. What `decode` raises comes after the messages before it have been appended.

        For those who take messages together. A codec may have a faster way than this one.
        """
        for _ in range(most):
            message = self.decode(buffer)
            if message is NEED_MORE:
                return True
            messages.append(message)
        return False

    @abstractmethod
    def encode(self, message: T) -> bytes:
        """*message* as it goes on the wire. `ValueError` if it cannot be sent by this codec."""

    def check_end(self, buffer: Buffer) -> None:
        """The peer's EOF has come: raise `IncompleteFrame` if it is inside a message."""
        if buffer.size:
            raise IncompleteFrame(
                f"the peer's EOF came inside a message, {buffer.size} bytes into it"
            )

    def map(self, encode: Callable[[U], T], decode: Callable[[T], U]) -> Codec[U]:
        """The same framing with other messages: *decode* makes one of what this codec gives.

        What *decode* raises becomes a `ProtocolError`, what *encode* raises leaves as it is.
        """
        return MappedCodec(self, encode, decode)

    def on_message(self, callback: Callable[[TcpConnection, T], object]) -> MessageDelivery[T]:
        """A callback for `TcpConnection.dispatch` and `Callbacks`, which calls *callback* with each
        message: ``callback(conn, message)``. Send by ``conn.send(codec.encode(message))``.

        No message is delivered while the connection does not read (`stop_reading`) and after its
        close. When a connection has many, the others have their turn between them.

        `TypeError` for an async function, which nobody would await: async code receives from a
        `FramedChannel`.
        """
        check_callback(f"{type(self).__name__}.on_message", "callback", callback)
        return MessageDelivery(self, callback)


def as_bytes(codec: Codec[Any], message: object) -> bytes:
    """The bytes of *message*, a copy that nobody changes; `ValueError` if it has none to send.

    Codecs of bytes ask for whatever is no plain `bytes`.
    """
    if isinstance(message, (bytes, bytearray)):
        return bytes(message)
    if isinstance(message, memoryview):
        return message.tobytes()
    raise ValueError(
        f"a message of type {type(message).__name__}: {type(codec).__name__} sends bytes, so pass "
        "bytes, a bytearray or a memoryview"
    )


def check_max_frame(owner: str, max_frame: int) -> None:
    """Raise unless *max_frame* is a number of bytes."""
    check_present(owner, max_frame=max_frame)
    check_count(owner, "max_frame", max_frame, least=1, unit="bytes")


def check_taken(codec: Codec[T], messages: int, taken: int) -> None:
    """Raise if so many messages took no bytes from the buffer: the same would come for ever."""
    if taken <= 0:
        raise RuntimeError(
            f"{type(codec).__name__}.decode gave {messages} messages and took nothing "
            "from the buffer: it must take each message that it gives, and answer NEED_MORE "
            "(not None) when there is no whole one"
        )


def check_codec(owner: str, codec: object) -> None:
    """Raise unless *codec* is one."""
    if not isinstance(codec, Codec):
        raise TypeError(f"{owner}(codec={codec!r}): pass a Codec, such as LineCodec()")


def check_callback(owner: str, name: str, callback: object) -> None:
    """Raise unless *callback* is a function of a connection and a message, to be called only."""
    if not callable(callback):
        raise TypeError(f"{owner}({name}={callback!r}): pass a function of (conn, message)")
    if _is_async(callback):
        raise TypeError(
            f"{owner}({name}={callback!r}): nobody would await it: pass a plain function, or "
            "receive from a FramedChannel"
        )


def _is_async(function: Any) -> bool:
    """Whether a call makes a coroutine or the like, as far as can be told without one."""
    while isinstance(function, partial):
        function = cast("Any", function.func)
    return any(
        inspect.iscoroutinefunction(called) or inspect.isasyncgenfunction(called)
        for called in (function, type(function).__call__)
    )


class MessageDelivery(Generic[T]):
    """What `Codec.on_message` gives."""

    __slots__ = ("_callback", "_codec", "_decode", "room")

    def __init__(self, codec: Codec[T], callback: Callable[[TcpConnection, T], object]) -> None:
        self._codec = codec
        self._decode = codec.decode
        self._callback = callback
        # `Watermarks.receive_limit` is for what a callback leaves: a codec leaves what is no whole
        # message yet, and has a limit of its own for that. With its header, and what came with it.
        self.room = codec.max_frame + READ_AHEAD

    def __call__(self, conn: TcpConnection, buffer: Buffer) -> None:
        """Decode and deliver what there is, up to a turn's worth."""
        decode, callback = self._decode, self._callback
        count, size = 0, buffer.size
        while count < MESSAGES_PER_TURN:
            message = decode(buffer)
            if message is NEED_MORE:
                conn.decoded(count, buffer.size)
                return
            count += 1
            callback(conn, message)
            if not conn.delivering:
                # Until it goes on, nothing is expected of the peer.
                conn.decoded(count, 0)
                return
        check_taken(self._codec, count, size - buffer.size)
        # What has not been looked at may be whole messages.
        conn.decoded(count, 0)
        if buffer.size:
            conn.deliver_again()

    def at_eof(self, buffer: Buffer) -> None:
        """`dispatch` has met the peer's EOF: raise `IncompleteFrame` if it is inside a message."""
        self._codec.check_end(buffer)


class CodecOnFrames(Codec[U], Generic[U, T]):
    """A codec whose messages are those of another, its *framing*, decoded one by one."""

    __slots__ = ("_framing",)

    _framing: Codec[T]

    @abstractmethod
    def _decoded(self, frame: T) -> U:
        """The message of *frame*."""

    def decode(self, buffer: Buffer) -> U | NeedMore:
        """What the framing gives, decoded."""
        frame = self._framing.decode(buffer)
        return NEED_MORE if frame is NEED_MORE else self._decoded(frame)

    def decode_into(self, buffer: Buffer, messages: list[U], most: int) -> bool:
        """As the framing does it."""
        frames: list[T] = []
        try:
            return self._framing.decode_into(buffer, frames, most)
        finally:
            # Those before an error come before it.
            for frame in frames:
                messages.append(self._decoded(frame))

    def check_end(self, buffer: Buffer) -> None:
        """As the framing."""
        self._framing.check_end(buffer)


class MappedCodec(CodecOnFrames[U, T]):
    """A codec around another one: see `Codec.map`."""

    __slots__ = ("_decode", "_encode")

    def __init__(
        self, framing: Codec[T], encode: Callable[[U], T], decode: Callable[[T], U]
    ) -> None:
        super().__init__(framing.max_frame)
        self._framing = framing
        self._encode = encode
        self._decode = decode

    def _decoded(self, frame: T) -> U:
        try:
            return self._decode(frame)
        except Exception as error:
            # Whatever a decoder raises (json even RecursionError), the peer's bytes made it.
            raise ProtocolError(f"the message cannot be decoded: {error}") from error

    def encode(self, message: U) -> bytes:
        """The encoded message in its frame."""
        return self._framing.encode(self._encode(message))
