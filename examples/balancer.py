"""Each client goes to the backend that has the fewest; if that one cannot be reached, to another,
and for a few seconds it is the last to be tried. On Ctrl-C we tell how many clients each had.

    python examples/balancer.py --port 7200 127.0.0.1:7007 127.0.0.1:7008
"""

import argparse
import logging
from collections import Counter
from collections.abc import Sequence

import trio
from tcprelay import relay

from trioreactor import (
    Acceptor,
    ConnectAttempt,
    ConnectError,
    Endpoint,
    TcpConnection,
    TcpServer,
    format_address,
    open_tcp_acceptors,
    open_tcp_connection,
)

REST_SECONDS = 5


class Balancer:
    """A handler that knows which backend has how many clients, and which has just failed."""

    def __init__(self, backends: Sequence[Endpoint]) -> None:
        self.clients, self.served = Counter[Endpoint](), Counter[Endpoint]()
        self.rests_until = dict.fromkeys(backends, 0.0)

    async def __call__(self, client: TcpConnection) -> None:  # noqa: ASYNC910 connecting has one
        """Serve *client* by a backend."""
        mine: list[Endpoint] = []

        def choose(left: Sequence[Endpoint]) -> Endpoint:
            now = trio.current_time()
            mine.append(min(left, key=lambda b: (self.rests_until[b] > now, self.clients[b])))
            self.clients.update(mine)  # at once, for others choose while we connect
            return mine[0]

        def attempted(attempt: ConnectAttempt) -> None:
            if attempt.error:
                self.clients.subtract([mine.pop()])
                self.rests_until[attempt.endpoint] = trio.current_time() + REST_SECONDS

        try:
            async with await open_tcp_connection(
                endpoints=self.rests_until, chooser=choose, on_attempt=attempted, connect_timeout=2
            ) as server:
                self.served.update(mine)
                await relay(client, server)
        except ConnectError:
            client.force_close(reset=True)
        finally:
            self.clients.subtract(mine)


async def main(
    port: int,
    *backends: str,
    task_status: trio.TaskStatus[list[Acceptor]] = trio.TASK_STATUS_IGNORED,
) -> None:
    places = [(host, int(number)) for host, _, number in (b.rpartition(":") for b in backends)]
    balancer = Balancer(places)
    acceptors = await open_tcp_acceptors(port, host="127.0.0.1")
    print(f"balancer on {format_address(acceptors[0].address)}", flush=True)
    try:
        await TcpServer(balancer, listeners=acceptors).serve(task_status=task_status)
    finally:
        for place in places:
            print(f"{format_address(place)} had {balancer.served[place]} clients", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=7200)
    parser.add_argument("backends", nargs="*", default=["127.0.0.1:7007", "127.0.0.1:7008"])
    args = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    try:
        trio.run(main, args.port, *args.backends)
    except* KeyboardInterrupt:
        pass
