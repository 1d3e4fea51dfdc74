"""A server on sockets that it was started with, which greets each client by its socket's name.

Its arguments are the names, and bind addresses. It prints what it has found, tells the service
manager, and drains at SIGTERM.
"""

from __future__ import annotations

import json
import os
import signal
import sys

import trio

from trioreactor import (
    Acceptor,
    ServiceNotifier,
    TcpConnection,
    TcpServer,
    inherited_acceptors,
    open_acceptors,
)


def greeter(name: str, acceptors: list[Acceptor]) -> TcpServer:
    async def greet(conn: TcpConnection) -> None:
        await conn.send_all(f"{name}\n".encode())

    return TcpServer(greet, listeners=acceptors, name=name)


async def main(names: str, bind: str) -> None:
    notifier = ServiceNotifier()
    found = {name: inherited_acceptors(name=name) for name in names.split()}
    found |= {text: await open_acceptors(text) for text in bind.split()}
    report = {
        "found": {name: [a.name for a in acceptors] for name, acceptors in found.items()},
        "left": len(inherited_acceptors()),
        "variables": [name for name in os.environ if name.startswith("LISTEN_")],
        "inheritable": [
            os.get_inheritable(a.socket.fileno()) for acceptors in found.values() for a in acceptors
        ],
    }
    servers = [greeter(name, acceptors) for name, acceptors in found.items()]
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            for server in servers:
                await nursery.start(server.serve)
            nursery.start_soon(notifier.keep_watchdog)
            notifier.ready("serving")
            print(json.dumps(report), flush=True)
            await anext(signals)
            notifier.stopping()
            for server in servers:
                await server.drain(1)
            nursery.cancel_scope.cancel()


trio.run(main, *sys.argv[1:])
