"""Clients send sudokus, a line `ID:BOARD` each, and get `ID:SOLUTION` or `ID:NoSolution`, each as
soon as it is found. Solving takes long, so it is done in threads, a few at once; and one who sends
boards faster than they are solved is not read from until it has had answers.

    python examples/sudoku.py --port 9981
    echo a:000000010400000000020000000000050407008000300001090000300400200050100000000806000 |
        nc 127.0.0.1 9981
"""

import argparse

import trio
from parts.sudoku_solver import solve

from trioreactor import (
    Acceptor,
    LineCodec,
    ProtocolError,
    TcpConnection,
    TcpServer,
    format_address,
    open_tcp_acceptors,
)

THREADS = 2
MAX_LINE = 200
# Of one connection, without an answer.
PAUSE_AT, RESUME_AT = 64, 32


class Player:
    """One connection, and how many boards of it are being solved."""

    def __init__(self, conn: TcpConnection, nursery: trio.Nursery, threads: trio.CapacityLimiter):
        self._conn = conn
        self._nursery = nursery
        self._threads = threads
        self.unanswered = 0

    def on_line(self, conn: TcpConnection, line: str) -> None:
        """A board, or nonsense."""
        name, _, board = line.rpartition(":")
        if len(board) != 81 or not board.isdecimal():
            raise ProtocolError("a line that is not ID:BOARD, of 81 digits")
        self.unanswered += 1
        if self.unanswered >= PAUSE_AT:
            conn.stop_reading()
        self._nursery.start_soon(self._answer, name, board)

    async def _answer(self, name: str, board: str) -> None:
        # The client may leave before; the thread keeps its permit until it ends.
        solution = await trio.to_thread.run_sync(
            solve, board, limiter=self._threads, abandon_on_cancel=True
        )
        self.unanswered -= 1
        if self._conn.send(CODEC.encode(f"{name}:{solution}")):
            self.resume()
        else:
            # It does not read its answers.
            self._conn.stop_reading()

    def resume(self, *_: object) -> None:
        """Read on, if there is reason to."""
        if self.unanswered <= RESUME_AT and not self._conn.congested:
            self._conn.start_reading()


CODEC = LineCodec("ascii", ending="any", max_frame=MAX_LINE)


async def main(
    port: int, *, task_status: trio.TaskStatus[list[Acceptor]] = trio.TASK_STATUS_IGNORED
) -> None:
    threads = trio.CapacityLimiter(THREADS)

    async def serve_one(conn: TcpConnection) -> None:
        # After the client's EOF the nursery waits for the last answers.
        async with trio.open_nursery() as nursery:
            player = Player(conn, nursery, threads)
            await conn.dispatch(CODEC.on_message(player.on_line), low_water_mark=player.resume)

    acceptors = await open_tcp_acceptors(port, host="127.0.0.1")
    print(f"sudoku on {format_address(acceptors[0].address)}", flush=True)
    await TcpServer(serve_one, listeners=acceptors).serve(task_status=task_status)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=9981)
    try:
        trio.run(main, parser.parse_args().port)
    except* KeyboardInterrupt:
        pass
