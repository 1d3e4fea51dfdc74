"""One process of a chat that has several, on one machine or many: the room of chat.py, whose
messages go to the other processes through Redis, with a load balancer in front. chat_client.py is
its client. See docs/scaling.md, and deploy/ for haproxy, systemd and Kubernetes.

Who is connected here is sent a message at once, the others by way of Redis; so all have the same
messages, not all in the same order. While Redis is away each process is a room of its own, and its
clients are told. At SIGTERM they are sent all that was said, then the end, and go elsewhere.

Behind a balancer that says whose connections it passes on (the PROXY protocol: send-proxy-v2 in
haproxy), --proxy-protocol names the balancers to believe. Nobody else is served then, and the
output tells who has come.

    python examples/chat_cluster.py --port 7023 --redis 127.0.0.1:6379
    python examples/chat_cluster.py --port 7024 --redis 127.0.0.1:6379
    python examples/chat_client.py --port 7023 --name ann      and bob, at 7024
"""

import argparse
import sys
from collections.abc import Sequence
from ipaddress import ip_network
from typing import Any

import trio
from chat import CODEC, WATERMARKS
from parts.redis_fanout import RedisFanout

from trioreactor import (
    Backoff,
    Callbacks,
    ConnectionState,
    ProxyProtocol,
    TcpConnection,
    TcpServer,
    Timeouts,
    format_address,
    inherited_acceptors,
    open_tcp_acceptors,
    serve_until_signalled,
)

# Full jitter: the processes that lost the same broker do not come back to it as one.
BACKOFF = Backoff(initial=0.2, maximum=5)
# Clients ask for a sign of life every 10 s: one that does not has gone, whatever TCP thinks.
TIMEOUTS = Timeouts(idle=60)
ALONE = CODEC.encode(b"* other servers are out of reach: only those on this one read you")
TOGETHER = CODEC.encode(b"* other servers are back: all read you again")


class Room:
    """Who is connected here, and what ties them to the others."""

    def __init__(self, redis: tuple[str, int], **options: Any) -> None:
        self.alone = False
        self.fanout = RedisFanout(*redis, b"chat", self._broadcast, self._on_fanout, BACKOFF)
        callbacks = Callbacks(
            message=CODEC.on_message(self._on_message),
            connection=self._on_connection,
            draining=TcpConnection.shutdown,
        )
        self.server = TcpServer(callbacks, watermarks=WATERMARKS, timeouts=TIMEOUTS, **options)

    def _on_connection(self, conn: TcpConnection) -> None:
        if conn.state is ConnectionState.CONNECTED:
            # One without a source is the balancer itself, which asks whether we are well.
            if conn.proxy_header is not None and conn.proxy_header.source is not None:
                print(f"{format_address(conn.peer_address)} has come", flush=True)
            if self.alone:
                conn.send(ALONE)

    def _on_message(self, conn: TcpConnection, message: bytes) -> None:
        if message:
            self._broadcast(message)
            self.fanout.publish(message)
        elif not conn.draining.is_set():
            conn.send(CODEC.encode(message))

    def _broadcast(self, message: bytes) -> None:
        self.server.broadcast(CODEC.encode(message))

    def _on_fanout(self, up: bool) -> None:
        how = "works" if up else "is lost"
        print(f"fan-out {how}; messages lost so far: {self.fanout.lost}", flush=True)
        if self.alone is up:
            self.alone = not up
            self.server.broadcast(TOGETHER if up else ALONE)


async def main(
    port: int, host: str, redis: tuple[str, int], grace: float, trusted: Sequence[Any]
) -> int:
    acceptors = inherited_acceptors(name="chat") or await open_tcp_acceptors(port, host=host)
    proxies = ProxyProtocol(trusted=trusted) if trusted else None
    room = Room(redis, listeners=acceptors, proxy_protocol=proxies)
    print(f"chat on {format_address(acceptors[0].address)}", flush=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(room.fanout.run)
        code = await serve_until_signalled(room.server, grace=grace)
        nursery.cancel_scope.cancel()
    closed = {reason.value: count for reason, count in room.server.statistics().closed.items()}
    print(f"drained: {closed}")
    return code


def address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=7023)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--redis", type=address, default="127.0.0.1:6379", metavar="HOST:PORT")
    parser.add_argument("--drain-seconds", type=float, default=5)
    parser.add_argument("--proxy-protocol", action="append", type=ip_network, metavar="NETWORK")
    args = parser.parse_args()
    trusted = args.proxy_protocol or ()
    sys.exit(trio.run(main, args.port, args.host, args.redis, args.drain_seconds, trusted))
