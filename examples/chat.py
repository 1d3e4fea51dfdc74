"""One room: the message that a client sends is sent to all, the sender too. A message is a length
of four bytes, big-endian, and so many bytes: muduo's chat. One who has stopped reading must not
delay the others: it is closed, or misses the oldest of its messages. One that announces a message
larger than we take is closed. An empty message goes back to its sender alone: so a client can ask
whether we are there, and show that it is, for in a quiet room --idle seconds of silence end it.

    python examples/chat.py --port 7023 --overflow drop_oldest --idle 60
    python examples/chat_client.py --port 7023 --name ann      in several terminals
"""

import argparse

import trio

from trioreactor import (
    Acceptor,
    LengthHeaderCodec,
    TcpConnection,
    TcpServer,
    Timeouts,
    Watermarks,
    format_address,
    open_tcp_acceptors,
)

CODEC = LengthHeaderCodec(max_frame=16384)
# What is queued for one who does not read.
WATERMARKS = Watermarks(high=65536, low=16384, limit=262144)


async def main(
    port: int,
    overflow: str = "close",
    idle: float | None = None,
    *,
    task_status: trio.TaskStatus[list[Acceptor]] = trio.TASK_STATUS_IGNORED,
) -> None:
    def on_message(conn: TcpConnection, message: bytes) -> None:
        if message:
            server.broadcast(CODEC.encode(message))
        else:
            conn.send(CODEC.encode(message))

    async def chat(conn: TcpConnection) -> None:
        try:
            await conn.dispatch(CODEC.on_message(on_message))
        finally:
            if dropped := conn.statistics().dropped:
                print(f"{format_address(conn.peer_address)} missed {dropped}", flush=True)

    acceptors = await open_tcp_acceptors(port, host="127.0.0.1")
    print(f"chat on {format_address(acceptors[0].address)}", flush=True)
    server = TcpServer(
        chat,
        listeners=acceptors,
        watermarks=WATERMARKS,
        timeouts=Timeouts(idle=idle),
        overflow="drop_oldest" if overflow == "drop_oldest" else "close",
    )
    await server.serve(task_status=task_status)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=7023)
    parser.add_argument("--overflow", choices=["close", "drop_oldest"], default="close")
    parser.add_argument("--idle", type=float, help="seconds")
    args = parser.parse_args()
    try:
        trio.run(main, args.port, args.overflow, args.idle)
    except* KeyboardInterrupt:
        pass
