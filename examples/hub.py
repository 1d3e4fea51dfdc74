"""A hub: who has sent `sub TOPIC` is sent what others publish by `pub TOPIC TEXT`, as a line
`TOPIC TEXT`, until `unsub TOPIC`; and first the last one that there was, so that newcomers need not
wait for news. It remembers nothing beyond its own end, so after a restart its clients have to
subscribe again: see resubscribe.py.

    python examples/hub.py --port 7055
    telnet 127.0.0.1 7055      and type: sub news
    telnet 127.0.0.1 7055      in another terminal, and type: pub news It works.
"""

import argparse
from collections import defaultdict

import trio

from trioreactor import (
    Acceptor,
    LineCodec,
    ProtocolError,
    TcpConnection,
    TcpServer,
    Watermarks,
    format_address,
    open_tcp_acceptors,
)

LINES = LineCodec(None, max_frame=1000)
# What is queued for one who does not read; then that one is closed as a SLOW_CONSUMER.
WATERMARKS = Watermarks(high=65536, low=16384, limit=262144)
# Topics that one connection may subscribe to, and those whose last text is kept.
MAX_SUBSCRIPTIONS = 1000
MAX_KEPT = 10_000


class Hub:
    """Who reads which topic, and the last text of each."""

    def __init__(self) -> None:
        self.subscribers: defaultdict[bytes, set[TcpConnection]] = defaultdict(set)
        self.last: dict[bytes, bytes] = {}
        self.server: TcpServer

    async def __call__(self, conn: TcpConnection) -> None:
        """Serve *conn*."""
        topics: set[bytes] = set()
        conn.context = topics
        try:
            await conn.dispatch(LINES.on_message(self.obey))
        finally:
            for topic in topics:
                self.leave(conn, topic)

    def obey(self, conn: TcpConnection, line: bytes) -> None:
        """Do as a line says."""
        topics: set[bytes] = conn.context
        match line.split(None, 2):
            case [b"sub", topic]:
                if topic in topics:
                    return
                if len(topics) == MAX_SUBSCRIPTIONS:
                    raise ProtocolError(f"more than {MAX_SUBSCRIPTIONS} subscriptions")
                topics.add(topic)
                self.subscribers[topic].add(conn)
                if topic in self.last:
                    conn.send(self.last[topic])
            case [b"unsub", topic]:
                if topic in topics:
                    topics.remove(topic)
                    self.leave(conn, topic)
            case [b"pub", topic, text]:
                # The topics that nothing was published on for the longest come first.
                self.last.pop(topic, None)
                self.last[topic] = news = LINES.encode(b"%s %s" % (topic, text.rstrip()))
                if len(self.last) > MAX_KEPT:
                    del self.last[next(iter(self.last))]
                self.server.broadcast(news, to=self.subscribers.get(topic, ()))
            case _:
                raise ProtocolError("neither sub TOPIC nor unsub TOPIC nor pub TOPIC TEXT")

    def leave(self, conn: TcpConnection, topic: bytes) -> None:
        """No more of *topic* for *conn*, its last reader perhaps."""
        self.subscribers[topic].remove(conn)
        if not self.subscribers[topic]:
            del self.subscribers[topic]


async def main(
    port: int, *, task_status: trio.TaskStatus[list[Acceptor]] = trio.TASK_STATUS_IGNORED
) -> None:
    acceptors = await open_tcp_acceptors(port, host="127.0.0.1")
    print(f"hub on {format_address(acceptors[0].address)}", flush=True)
    hub = Hub()
    hub.server = TcpServer(hub, listeners=acceptors, watermarks=WATERMARKS)
    await hub.server.serve(task_status=task_status)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=7055)
    try:
        trio.run(main, parser.parse_args().port)
    except* KeyboardInterrupt:
        pass
