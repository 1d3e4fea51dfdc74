"""What the processes of one service say to each other, through Redis's publish and subscribe."""

import logging
import os
from collections.abc import Callable, Iterable
from typing import Any

import trio

from trioreactor import (
    NEED_MORE,
    Backoff,
    Buffer,
    Codec,
    ConnectAttempt,
    FrameTooLarge,
    Heartbeat,
    NeedMore,
    ProtocolError,
    TcpClient,
    TcpConnection,
    dispatch_messages,
)

MAX_DEPTH = 8
# A broker that is frozen, or whose machine is off, says nothing: this finds out.
HEARTBEAT: Heartbeat[Any] = Heartbeat(
    ping=[b"PING"], is_pong=lambda reply: reply == b"PONG", interval=5, timeout=15
)


class RespReplies(Codec[Any]):
    """RESP3 as a client has it: a request is a list of strings, a reply a string, a number, a list
    (sets and what is pushed are such, too; of a map, its keys and values in turn) or None.
    """

    def decode(self, buffer: Buffer) -> Any | NeedMore:
        """The next reply, if all of it is there."""
        head = buffer.peek(512)  # most are shorter
        while (found := parse(head, 0, MAX_DEPTH)) is None:
            if len(head) > self.max_frame:
                raise FrameTooLarge(f"a reply of more than {self.max_frame} bytes")
            if len(head) == len(buffer):
                return NEED_MORE
            head = buffer.peek(4 * len(head))
        buffer.discard(found[1])
        return found[0]

    def encode(self, message: Iterable[bytes]) -> bytes:
        """A request."""
        parts = list(message)
        bulks = [b"$%d\r\n%b\r\n" % (len(part), part) for part in parts]
        return b"*%d\r\n%b" % (len(parts), b"".join(bulks))


def parse(data: bytes, at: int, depth: int) -> tuple[Any, int] | None:
    """The reply that begins at *at*, and where the next begins; None if it has no end yet."""
    end = data.find(b"\r\n", at)
    if end < 0:
        return None
    kind, line, at = data[at : at + 1], data[at + 1 : end], end + 2
    match kind:
        case b"+" | b"#" | b"," | b"(":
            return line, at
        case b"-":
            raise ProtocolError(f"Redis says: {line.decode('utf-8', 'replace')}")
        case b"_":
            return None, at
        case b":" | b"$" | b"=" | b"*" | b"~" | b">" | b"%" if line.lstrip(b"-").isdigit():
            number = int(line)
        case _:
            raise ProtocolError(f"no reply of Redis begins with {kind + line[:20]!r}")
    if kind == b":" or number < 0:
        return (number if kind == b":" else None), at
    if kind in b"$=":
        size = at + number
        return (data[at:size], size + 2) if size + 2 <= len(data) else None
    if depth == 0:
        raise ProtocolError(f"a reply of more than {MAX_DEPTH} levels")
    items: list[Any] = []
    for _ in range(2 * number if kind == b"%" else number):
        found = parse(data, at, depth - 1)
        if found is None:
            return None
        items.append(found[0])
        at = found[1]
    return items, at


class RedisFanout:
    """Gives what this process publishes on *channel* to all the others that run this, at most once.

    *deliver* is called with what they publish, *changed* with whether it can be, when that is known
    first and whenever it changes. Redis keeps nothing: what is published while there is no
    connection is lost, and so may be what was under way when it broke. `lost` counts both.
    One connection is enough, for in RESP3 who subscribes may publish, too: Redis 6 or later.
    """

    def __init__(
        self,
        host: str,
        port: int,
        channel: bytes,
        deliver: Callable[[bytes], object],
        changed: Callable[[bool], object],
        backoff: Backoff,
    ) -> None:
        # Among those that we are sent are our own, which have this in front.
        self._origin = os.urandom(8)
        self._codec = RespReplies(1 << 20)
        self._channel = channel
        self._deliver = deliver
        self._changed = changed
        self._unanswered = 0
        self.lost = 0
        self.up: bool | None = None
        # It would say of every failed attempt what `changed` says once.
        logging.getLogger("trioreactor.connector").setLevel(logging.ERROR)
        self._client = TcpClient(
            host, port, self._handler, name="redis", backoff=backoff, on_attempt=self._on_attempt
        )

    async def run(self) -> None:
        """Stay connected, until cancelled."""
        await self._client.run()

    def publish(self, message: bytes) -> None:
        """Pass *message* on to the other processes, or count it as lost."""
        if self.up:
            try:
                self._send(b"PUBLISH", self._channel, self._origin + message)
                self._unanswered += 1
                return
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass
        self.lost += 1

    def _send(self, *request: bytes) -> None:
        self._client.send(self._codec.encode(request))

    async def _handler(self, conn: TcpConnection) -> None:
        self._send(b"HELLO", b"3")
        self._send(b"SUBSCRIBE", self._channel)
        try:
            await dispatch_messages(conn, self._codec, self._on_reply, heartbeat=HEARTBEAT)
        finally:
            self.lost += self._unanswered
            self._unanswered = 0
            self._set(False)

    def _on_reply(self, _conn: TcpConnection, reply: Any) -> None:
        match reply:
            case [b"message", _, payload]:
                if not payload.startswith(self._origin):
                    self._deliver(payload[len(self._origin) :])
            case [b"subscribe", *_]:
                # It works, however soon it breaks.
                self._client.reset_backoff()
                self._set(True)
            case int():
                self._unanswered -= 1
            case _:
                pass

    def _on_attempt(self, attempt: ConnectAttempt) -> None:
        if attempt.error is not None:
            self._set(False)

    def _set(self, up: bool) -> None:
        if up is not self.up:
            self.up = up
            self._changed(up)
