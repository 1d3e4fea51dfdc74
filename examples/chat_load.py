"""How long the chat takes to tell all: many clients, one of them sends, and when all have its
message the next one does. Tells the percentiles of the times from the sending to each arrival, and
how many arrivals did not come within the patience.

    python examples/chat.py --port 7023
    python examples/chat_load.py --port 7023 --clients 1000 --messages 100 --size 100 --json
"""

import argparse
import json
import secrets
import sys
import time

import trio
from chat import CODEC

from trioreactor import ConnectError, TcpConnection, open_tcp_connection

# In seconds, for all clients to be in the room.
JOINING = 60


class Load:
    """The clients, and the message that is on its way to all of them."""

    def __init__(self, size: int, patience: float) -> None:
        self.size, self.patience = size, patience
        self.conns: list[TcpConnection] = []
        self.latencies: list[float] = []
        self.message, self.sent_at, self.missing = b"", 0.0, 0
        self.everywhere = trio.Event()

    async def client(
        self, port: int, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """One that listens."""
        async with await open_tcp_connection("127.0.0.1", port) as conn:
            self.conns.append(conn)
            task_status.started()
            await conn.dispatch(CODEC.on_message(self.received))
        raise trio.BrokenResourceError("the server has closed a connection")

    def received(self, _conn: TcpConnection, message: bytes) -> None:
        """Note the time, unless it is somebody else's, or has come too late."""
        if message == self.message:
            self.latencies.append(time.perf_counter() - self.sent_at)
            self.missing -= 1
            if not self.missing:
                self.everywhere.set()

    async def send(self, number: int) -> int:
        """Send one message; how many clients had to do without it."""
        self.message = secrets.token_hex(8).encode().ljust(self.size, b".")
        self.missing = len(self.conns)
        self.everywhere = trio.Event()
        frame = CODEC.encode(self.message)
        self.sent_at = time.perf_counter()
        self.conns[number % len(self.conns)].send(frame)
        with trio.move_on_after(self.patience):
            await self.everywhere.wait()
        return self.missing


async def main(
    port: int, clients: int, messages: int, size: int = 100, patience: float = 5
) -> dict[str, float]:
    load = Load(size, patience)
    async with trio.open_nursery() as nursery:
        for _ in range(clients):
            await nursery.start(load.client, port)
        # Connected is not accepted: the first ones may miss some.
        with trio.fail_after(JOINING):
            while await load.send(0):
                pass
        load.latencies.clear()
        begun = time.perf_counter()
        lost = sum([await load.send(number) for number in range(messages)])
        seconds = time.perf_counter() - begun
        nursery.cancel_scope.cancel()
    times = sorted(load.latencies) or [float("nan")]
    result = {"clients": clients, "messages": messages, "size": size, "lost": lost}
    return result | {
        "deliveries_per_second": round(len(load.latencies) / seconds),
        **{
            f"p{percent:g}_ms": round(1000 * times[int(percent / 100 * (len(times) - 1))], 3)
            for percent in (50, 99, 99.9)
        },
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=7023)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--messages", type=int, default=100)
    parser.add_argument("--size", type=int, default=100, help="of a message, 16 bytes or more")
    parser.add_argument("--patience", type=float, default=5, help="seconds to wait for a message")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    args = parser.parse_args()
    problem = ""
    try:
        result = trio.run(main, args.port, args.clients, args.messages, args.size, args.patience)
        if args.json:
            print(json.dumps(result))
        else:
            print("\n".join(f"{name:22} {number}" for name, number in result.items()))
    except* (trio.BrokenResourceError, trio.TooSlowError, ConnectError) as group:
        problem = str(group.exceptions[0]) or "the clients did not all get into the room"
    except* KeyboardInterrupt:
        pass
    sys.exit(problem or None)
