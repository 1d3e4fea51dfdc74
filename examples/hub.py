"""A hub: who has sent `sub TOPIC` is sent what others publish by `pub TOPIC TEXT`, as a line
`TOPIC TEXT`. It remembers nothing beyond a connection, so after a restart its clients have to
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
    Buffer,
    ProtocolError,
    TcpConnection,
    TcpServer,
    Watermarks,
    format_address,
    open_tcp_acceptors,
)

MAX_LINE = 1000
# What is queued for one who does not read; then that one is closed as a SLOW_CONSUMER.
WATERMARKS = Watermarks(high=65536, low=16384, limit=262144)


async def main(
    port: int, *, task_status: trio.TaskStatus[list[Acceptor]] = trio.TASK_STATUS_IGNORED
) -> None:
    subscribers: defaultdict[bytes, set[TcpConnection]] = defaultdict(set)

    def obey(conn: TcpConnection, line: bytes) -> None:
        match line.split(None, 2):
            case [b"sub", topic]:
                subscribers[topic].add(conn)
            case [b"pub", topic, text] if topic in subscribers:
                server.broadcast(b"%s %s\n" % (topic, text.rstrip()), to=subscribers[topic])
            case [b"pub", _, _]:
                pass
            case _:
                raise ProtocolError("a line that is neither sub TOPIC nor pub TOPIC TEXT")

    def on_message(conn: TcpConnection, buffer: Buffer) -> None:
        while 0 <= (end := buffer.find(b"\n")) <= MAX_LINE:
            obey(conn, buffer.take(end + 1))
        if len(buffer) > MAX_LINE:
            raise ProtocolError(f"a line of more than {MAX_LINE} bytes")

    async def serve_one(conn: TcpConnection) -> None:
        try:
            await conn.dispatch(on_message)
        finally:
            for topic in [topic for topic, conns in subscribers.items() if conn in conns]:
                subscribers[topic].remove(conn)
                if not subscribers[topic]:
                    del subscribers[topic]

    acceptors = await open_tcp_acceptors(port, host="127.0.0.1")
    print(f"hub on {format_address(acceptors[0].address)}", flush=True)
    server = TcpServer(serve_one, listeners=acceptors, watermarks=WATERMARKS)
    await server.serve(task_status=task_status)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=7055)
    try:
        trio.run(main, parser.parse_args().port)
    except* KeyboardInterrupt:
        pass
