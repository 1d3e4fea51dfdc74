"""Five services on five ports in one program and one loop: a busy one does not keep the others
waiting, and leaving the nursery ends all five.

    python examples/all_in_one.py --port 7000      echo on 7007, discard on 7009, and so on
"""

import argparse
import time
from collections.abc import Mapping
from datetime import UTC, datetime

import trio

from trioreactor import SocketAddress, TcpConnection, TcpServer, format_address

LINES = b"".join(bytes(0x20 + (i + j) % 95 for j in range(72)) + b"\r\n" for i in range(95))


async def echo(conn: TcpConnection) -> None:
    async for data in conn:
        await conn.send_all(data)


async def discard(conn: TcpConnection) -> None:
    async for _ in conn:
        pass


async def daytime(conn: TcpConnection) -> None:
    await conn.send_all(f"{datetime.now(UTC):%A, %B %d, %Y %H:%M:%S-%Z}\r\n".encode())


async def chargen(conn: TcpConnection) -> None:
    while True:
        await conn.send_all(LINES)


async def time_since_1900(conn: TcpConnection) -> None:
    await conn.send_all(((int(time.time()) + 2_208_988_800) % 2**32).to_bytes(4, "big"))


# Under the ports of their RFCs, which are added to --port.
SERVICES = {7: echo, 9: discard, 13: daytime, 19: chargen, 37: time_since_1900}


async def main(
    port: int,
    *,
    task_status: trio.TaskStatus[Mapping[str, SocketAddress]] = trio.TASK_STATUS_IGNORED,
) -> None:
    addresses: dict[str, SocketAddress] = {}
    async with trio.open_nursery() as nursery:
        for offset, handler in SERVICES.items():
            # Port 0: each has a free one of its own.
            server = TcpServer(handler, port and port + offset, host="127.0.0.1")
            await nursery.start(server.serve)
            (addresses[handler.__name__],) = server.addresses
        for name, address in addresses.items():
            print(f"{name} on {format_address(address)}", flush=True)
        task_status.started(addresses)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=7000)
    try:
        trio.run(main, parser.parse_args().port)
    except* KeyboardInterrupt:
        pass
