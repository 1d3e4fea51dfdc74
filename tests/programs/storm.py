"""A crowd of clients: connects in batches, and closes or resets each batch before the next.

Arguments: host, port, number of batches, connections in each. Prints a line after each batch.
"""

from __future__ import annotations

import socket
import struct
import sys

RESET = struct.pack("ii", 1, 0)


def main(host: str, port: int, batches: int, size: int) -> None:
    for batch in range(batches):
        # Each batch has an address of its own, so that the ports of the last are no matter.
        source = (f"127.0.1.{1 + batch % 250}", 0)
        socks = [socket.create_connection((host, port), source_address=source) for _ in range(size)]
        for number, sock in enumerate(socks):
            if number % 2:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            sock.close()
        print(batch, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
