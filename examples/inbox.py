"""Keeps the messages that outbox.py sends: each line `SENDER NUMBER TEXT` is written to a file, and
then acknowledged by its number. A sender that has lost its connection sends again what was not
acknowledged, so some messages come twice: of each sender's, numbers that are not higher than the
last one kept are acknowledged, but not kept again.

All that it knows is in the file, so it may be killed at any moment (kill -9) and started again.
What is flushed is with the kernel, which outlives us; a power cut would ask for fsync.

    python examples/inbox.py --port 7060 FILE
    python examples/outbox.py --port 7060      and kill and start the inbox
"""

import argparse
import re
from typing import BinaryIO

import trio

from trioreactor import (
    Acceptor,
    Buffer,
    ProtocolError,
    TcpConnection,
    TcpServer,
    format_address,
    open_tcp_acceptors,
)

MAX_LINE = 1000
MESSAGE = re.compile(rb"(\w+) (\d+) .*\n")


class Inbox:
    """The file, and the last number that it has of each sender."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.last: dict[bytes, int] = {}
        file.seek(0)
        whole = 0
        for line in file:
            if found := MESSAGE.fullmatch(line):
                self.last[found[1]] = int(found[2])
                whole += len(line)
            elif line.endswith(b"\n"):
                raise ValueError(f"{file.name} has a line that is no message: {line!r}")
        # A kill can have cut the last one.
        file.truncate(whole)

    def keep(self, buffer: Buffer) -> list[bytes]:
        """Write the complete lines of *buffer*; the numbers to acknowledge."""
        numbers: list[bytes] = []
        while 0 <= (end := buffer.find(b"\n")) <= MAX_LINE:
            line = buffer.take(end + 1)
            if not (found := MESSAGE.fullmatch(line)):
                raise ProtocolError(f"not a message: {line!r}")
            sender, number = found.groups()
            if int(number) > self.last.get(sender, 0):
                self.last[sender] = int(number)
                self.file.write(line)
            else:
                print(f"{number.decode()} has come again", flush=True)
            numbers.append(number)
        if len(buffer) > MAX_LINE:
            raise ProtocolError(f"a line of more than {MAX_LINE} bytes")
        self.file.flush()
        return numbers


async def main(
    port: int,
    path: str,
    pause: float = 0.0,
    *,
    task_status: trio.TaskStatus[list[Acceptor]] = trio.TASK_STATUS_IGNORED,
) -> None:
    with open(path, "a+b") as file:  # noqa: ASYNC230 writes of a few bytes: no thread's worth
        inbox = Inbox(file)

        async def handler(conn: TcpConnection) -> None:
            buffer = Buffer()
            async for chunk in conn:
                buffer.append(chunk)
                numbers = inbox.keep(buffer)
                await trio.sleep(pause)
                await conn.send_all(b"".join(number + b"\n" for number in numbers))

        acceptors = await open_tcp_acceptors(port, host="127.0.0.1")
        print(f"inbox {path} on {format_address(acceptors[0].address)}", flush=True)
        await TcpServer(handler, listeners=acceptors).serve(task_status=task_status)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=7060)
    parser.add_argument("--pause", type=float, default=0, help="seconds before acknowledging")
    parser.add_argument("path", metavar="FILE")
    args = parser.parse_args()
    try:
        trio.run(main, args.port, args.path, args.pause)
    except* KeyboardInterrupt:
        pass
