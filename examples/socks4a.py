"""A client names a host, by its address or (SOCKS4a) by its name; we connect to it, and relay. One
who asks for nonsense, or takes for ever to ask, costs us some bytes for some seconds.

    python examples/socks4a.py --port 7080
    curl --socks4a 127.0.0.1:7080 http://localhost:8000/
"""

import argparse
import struct
from contextlib import suppress

import trio
from tcprelay import relay

from trioreactor import (
    Acceptor,
    ConnectError,
    ProtocolError,
    TcpConnection,
    TcpServer,
    format_address,
    open_tcp_acceptors,
    open_tcp_connection,
)

CONNECT, BIND = 1, 2
GRANTED, REJECTED = b"\0\x5a" + bytes(6), b"\0\x5b" + bytes(6)
LONGEST_REQUEST = 8 + 256 + 256  # two names of 255 bytes, the longest in the DNS
REQUEST_SECONDS = 10


def parse(data: bytes) -> tuple[int, str, int, bytes] | None:
    """Command, host, port, and what follows the request; None while that is incomplete."""
    if data[0] != 4:
        raise ProtocolError(f"a request of version {data[0]}, not of SOCKS4")
    if len(data) >= 8:
        command, port, address = struct.unpack_from("!xBH4s", data)
        # 0.0.0.x, but not 0.0.0.0, says that a host's name follows the user's.
        named = 0 < int.from_bytes(address) < 256
        names = data[8:].split(b"\0", 1 + named)
        if len(names) == 2 + named:
            host = names[1].decode("latin-1") if named else ".".join(map(str, address))
            if command not in (CONNECT, BIND) or not host or not port:
                raise ProtocolError(f"no such request: command {command}, {host!r}, port {port}")
            return command, host, port, names[-1]
    if len(data) >= LONGEST_REQUEST:
        raise ProtocolError(f"a request longer than {LONGEST_REQUEST} bytes")
    return None


async def receive_request(client: TcpConnection) -> tuple[int, str, int, bytes] | None:
    """What `parse` gives; None if the client leaves before, or takes too long."""
    data = b""
    with trio.move_on_after(REQUEST_SECONDS):
        while more := await client.receive_some(LONGEST_REQUEST - len(data)):
            data += more
            if request := parse(data):
                return request
    return None


async def proxy(client: TcpConnection) -> None:
    if (request := await receive_request(client)) is None:
        return
    command, host, port, rest = request
    with suppress(ConnectError):
        if command == CONNECT:
            async with await open_tcp_connection(host, port) as server:
                client.send(GRANTED)
                await relay(client, server, begin=rest)
                return
    await client.send_all(REJECTED)


async def main(
    port: int, *, task_status: trio.TaskStatus[list[Acceptor]] = trio.TASK_STATUS_IGNORED
) -> None:
    acceptors = await open_tcp_acceptors(port, host="127.0.0.1")
    print(f"SOCKS4a on {format_address(acceptors[0].address)}", flush=True)
    await TcpServer(proxy, listeners=acceptors).serve(task_status=task_status)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=7080)
    try:
        trio.run(main, parser.parse_args().port)
    except* KeyboardInterrupt:
        pass
