"""The demo's load: a client in a process of its own, so that the server has one for itself."""

from __future__ import annotations

import json
import socket
import sys
import time
from typing import Any

import trio

CONNECTIONS = 50
MESSAGE_SIZE = 64


async def make_load(port: int, seconds: float) -> dict[str, Any]:
    """Load *port* for so many *seconds*; gives ``round_trips``, ``seconds`` and ``wrong`` ones."""
    command = [sys.executable, "-m", "trioreactor.demo_load", str(port), str(seconds)]
    # In a session of its own, or a Ctrl-C for us would be one for it, too.
    done = await trio.run_process(command, capture_stdout=True, start_new_session=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def load(port: int, seconds: float) -> dict[str, Any]:
    """Send a message on each connection, await all the echoes, and again.

    Plain blocking sockets, which cost the least, so that the server is what is measured.
    """
    socks = [socket.create_connection(("127.0.0.1", port)) for _ in range(CONNECTIONS)]
    for sock in socks:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    round_trips = wrong = 0
    elapsed = 0.0
    begun = time.perf_counter()
    while elapsed < seconds:
        message = round_trips.to_bytes(MESSAGE_SIZE, "big")
        for sock in socks:
            sock.sendall(message)
        for sock in socks:
            wrong += sock.recv(MESSAGE_SIZE, socket.MSG_WAITALL) != message
        round_trips += len(socks)
        elapsed = time.perf_counter() - begun
    for sock in socks:
        sock.close()
    return {"round_trips": round_trips, "wrong": wrong, "seconds": elapsed}


if __name__ == "__main__":
    try:
        print(json.dumps(load(int(sys.argv[1]), float(sys.argv[2]))))
    except ConnectionError:
        # The server has gone: the demo was interrupted, or it will say that we failed.
        sys.exit(1)
