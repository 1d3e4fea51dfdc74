"""Reads topics of a hub, and goes on when the hub was restarted: what was asked of a connection
ends with it, so the client keeps its own list of topics and asks for them again at the beginning
of each connection. What was published while there was none is missed, but for the last text of a
topic if the hub was there: see outbox.py for messages that must arrive.

`run` calls the handler for each connection; `on_attempt` is told of every attempt to connect.

    python examples/hub.py --port 7055
    python examples/resubscribe.py --port 7055 news weather      and stop and start the hub
    telnet 127.0.0.1 7055      and type: pub news It works.
"""

import argparse
import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial

import trio

from trioreactor import (
    Backoff,
    ConnectAttempt,
    LineCodec,
    NotConnected,
    TcpClient,
    TcpConnection,
)

LINES = LineCodec(None, max_frame=2000)


class Subscriber:
    """A client of the hub; *show* is called with each line that it sends."""

    def __init__(self, port: int, topics: Iterable[str], show: Callable[[str], None]) -> None:
        self.topics = set(topics)
        self.show = show
        self.client = TcpClient(
            "127.0.0.1",
            port,
            self._handler,
            backoff=Backoff(initial=0.25, maximum=5, reset_after=5),
            on_attempt=self._on_attempt,
        )

    def subscribe(self, topic: str) -> None:
        """From now on, whether there is a connection at the moment or not."""
        self.topics.add(topic)
        with suppress(NotConnected):
            self.client.send(b"sub %s\n" % topic.encode())

    def unsubscribe(self, topic: str) -> None:
        """No more of it, though what is on its way still comes."""
        self.topics.discard(topic)
        with suppress(NotConnected):
            self.client.send(b"unsub %s\n" % topic.encode())

    async def _handler(self, conn: TcpConnection) -> None:
        for topic in self.topics:
            conn.send(b"sub %s\n" % topic.encode())
        await conn.dispatch(LINES.on_message(self._on_line))
        self.show("! the hub has gone")

    def _on_line(self, _conn: TcpConnection, line: bytes) -> None:
        self.show(line.decode("utf-8", "replace"))

    def _on_attempt(self, attempt: ConnectAttempt) -> None:
        then = "" if attempt.delay is None else f"; the next in {attempt.delay:.2f} s"
        self.show(f"! attempt {attempt.number}: {attempt}{then}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=7055)
    parser.add_argument("topics", nargs="+", metavar="TOPIC")
    args = parser.parse_args()
    # It would say of each failed attempt what `on_attempt` does.
    logging.getLogger("trioreactor.connector").setLevel(logging.ERROR)
    try:
        trio.run(Subscriber(args.port, args.topics, partial(print, flush=True)).client.run)
    except* KeyboardInterrupt:
        pass
