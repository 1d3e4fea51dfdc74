"""Typed messages: thermometers report what they read, and whoever asks is told the mean of a place.
msgspec checks each message against these classes as it decodes it; one that does not fit ends its
connection. Needs `pip install trioreactor[msgspec]`.

    python examples/msgspec_messages.py --port 7060
    python examples/msgspec_messages.py --port 7060 --ask cellar
"""

import argparse

import msgspec
import trio

from trioreactor import (
    Acceptor,
    FramedChannel,
    LengthHeaderCodec,
    ProtocolError,
    TcpConnection,
    TcpServer,
    format_address,
    open_tcp_acceptors,
    open_tcp_connection,
)

MAX_PLACES = 1000


class Reading(msgspec.Struct, tag=True, frozen=True):
    """A thermometer's."""

    place: str
    celsius: float


class Question(msgspec.Struct, tag=True, frozen=True):
    """Asks for the mean there."""

    place: str


class Mean(msgspec.Struct, tag=True, frozen=True):
    """The answer; without a number if there were no readings."""

    place: str
    celsius: float | None
    readings: int


Message = Reading | Question | Mean
decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
CODEC = LengthHeaderCodec(max_frame=4096).map(msgspec.msgpack.encode, decoder.decode)


async def main(
    port: int, *, task_status: trio.TaskStatus[list[Acceptor]] = trio.TASK_STATUS_IGNORED
) -> None:
    # The sum of the readings at a place, and how many they are.
    places: dict[str, tuple[float, int]] = {}

    def note(reading: Reading) -> None:
        if reading.place not in places and len(places) >= MAX_PLACES:
            raise ProtocolError(f"a place more than {MAX_PLACES}")
        total, count = places.get(reading.place, (0.0, 0))
        places[reading.place] = total + reading.celsius, count + 1

    async def serve_one(conn: TcpConnection) -> None:
        channel = FramedChannel(conn, CODEC)
        async for message in channel:
            match message:
                case Reading():
                    note(message)
                case Question(place):
                    total, count = places.get(place, (0.0, 0))
                    await channel.send(Mean(place, total / count if count else None, count))
                case Mean():
                    raise ProtocolError("an answer, which nobody asked for")

    acceptors = await open_tcp_acceptors(port, host="127.0.0.1")
    print(f"thermometers on {format_address(acceptors[0].address)}", flush=True)
    await TcpServer(serve_one, listeners=acceptors).serve(task_status=task_status)


async def ask(port: int, place: str) -> None:
    conn = await open_tcp_connection("127.0.0.1", port)
    async with FramedChannel(conn, CODEC) as channel:
        await channel.send(Question(place))
        print(await channel.receive())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=7060)
    parser.add_argument("--ask", metavar="PLACE")
    args = parser.parse_args()
    try:
        if args.ask is None:
            trio.run(main, args.port)
        else:
            trio.run(ask, args.port, args.ask)
    except* KeyboardInterrupt:
        pass
