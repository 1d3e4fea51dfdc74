"""Asks a time server (RFC 868) again and again. It sends four bytes and closes, so every answer
costs a connection, and the client makes the next one by itself: about one a second, and fewer and
fewer, down to one in eight seconds, while the server is away. Failed attempts are in the log.

`async for` gives each connection in turn. `session` closes it at the end of its block, whatever
happens in there; that the server went, or sent nonsense, only ends that session.

    python examples/time_server.py --port 7037
    python examples/time_client.py --port 7037      and stop and start the server
"""

import argparse
from datetime import UTC, datetime

import trio

from trioreactor import Backoff, ProtocolError, TcpClient

# RFC 868 counts from 1900, Unix from 1970.
SECONDS_1900_TO_1970 = 2_208_988_800
# Chance takes half away, on average.
BACKOFF = Backoff(initial=2, maximum=16)


async def main(port: int, times: int | None = None, *, backoff: Backoff = BACKOFF) -> None:
    client = TcpClient("127.0.0.1", port, backoff=backoff)
    answers = 0
    async for conn in client:
        async with client.session(conn):
            word = b""
            while len(word) < 4 and (chunk := await conn.receive_some(4 - len(word))):
                word += chunk
            if len(word) < 4:
                raise ProtocolError(f"{conn.name}: {len(word)} bytes instead of 4")
            # The modulo goes on being right when the 32 bits overflow, in 2036.
            seconds = (int.from_bytes(word, "big") - SECONDS_1900_TO_1970) % 2**32
            print(datetime.fromtimestamp(seconds, UTC).isoformat(" "), flush=True)
            answers += 1
            # However short the connection was, the server works.
            client.reset_backoff()
        if answers == times:
            client.disconnect()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=7037)
    parser.add_argument("--times", type=int, help="end after so many answers")
    args = parser.parse_args()
    try:
        trio.run(main, args.port, args.times)
    except* KeyboardInterrupt:
        pass
