"""Messages that arrive once, though the connection may be lost at any moment. A connection cannot
promise that: what `send` took may be in its buffer, on the way, or with the other side when it
breaks. So each message has a number and waits until that number is acknowledged; on the next
connection those still waiting are sent again; and the other side drops what it has already.

`deliver` returns when its message has arrived. Cancelled, as by a deadline, it gives up, and the
message may have arrived or not, as far as we know. So nothing is lost in silence.

    python examples/inbox.py --port 7060 FILE
    python examples/outbox.py --port 7060      and kill and start the inbox
"""

import argparse
from contextlib import suppress
from itertools import count
from uuid import uuid4

import trio

from trioreactor import Backoff, Buffer, ProtocolError, TcpClient, TcpConnection


class Outbox:
    """The messages that wait to be acknowledged. `handler` is for a `TcpClient`."""

    def __init__(self) -> None:
        # Another run must not be taken for this one: its numbers begin at 1, too.
        self.sender = uuid4().hex
        self.numbers = count(1)
        # By number, which is oldest first.
        self.waiting: dict[int, tuple[bytes, trio.Event]] = {}
        self.sent_again = 0
        # Only when it has been sent what waited: a newer message must not overtake those.
        self.conn: TcpConnection | None = None

    async def deliver(self, text: str) -> None:
        """Return when it has arrived. Cancelled: given up."""
        number = next(self.numbers)
        line = f"{self.sender} {number} {text}\n".encode()
        acknowledged = trio.Event()
        self.waiting[number] = line, acknowledged
        try:
            if self.conn is not None:
                # If that one is broken, it goes by the next.
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    self.conn.send(line)
            await acknowledged.wait()
        finally:
            self.waiting.pop(number, None)

    async def handler(self, conn: TcpConnection) -> None:
        """Send what waits, then hear what arrived."""
        for line, _ in self.waiting.values():
            conn.send(line)
            self.sent_again += 1
        self.conn = conn
        try:
            await conn.dispatch(self._on_message)
        finally:
            self.conn = None

    def _on_message(self, _conn: TcpConnection, buffer: Buffer) -> None:
        while (end := buffer.find(b"\n")) >= 0:
            number = buffer.take(end + 1).rstrip()
            if not number.isdigit():
                raise ProtocolError(f"not a number: {number!r}")
            # One that was given up has gone.
            if waited := self.waiting.pop(int(number), None):
                waited[1].set()


async def main(port: int, patience: float) -> None:
    outbox = Outbox()

    async def deliver(text: str) -> None:
        with trio.move_on_after(patience):
            await outbox.deliver(text)
            print(f"{text}: arrived", flush=True)
            return
        print(f"{text}: given up after {patience:g} s", flush=True)

    backoff = Backoff(initial=0.2, maximum=2)
    client = TcpClient("127.0.0.1", port, outbox.handler, backoff=backoff)
    async with client, trio.open_nursery() as nursery:
        for number in count(1):
            nursery.start_soon(deliver, f"message {number}")
            await trio.sleep(0.5)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=7060)
    parser.add_argument("--patience", type=float, default=10, help="seconds")
    args = parser.parse_args()
    try:
        trio.run(main, args.port, args.patience)
    except* KeyboardInterrupt:
        pass
