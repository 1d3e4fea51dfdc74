"""The gevent peer: `python gevent_peer.py greenlets WORK`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial

import gevent
from common import (
    BLOCK,
    BROADCAST_LIMIT,
    BURST,
    CHUNK,
    Answer,
    FramingError,
    answer_frames,
    answer_lines,
    listening_socket,
    main,
    whole_lines,
    works,
)
from gevent.queue import SimpleQueue
from gevent.server import StreamServer
from gevent.socket import socket

Handler = Callable[[socket], object]


def serve(handler: Handler) -> None:
    def guarded(sock: socket, _address: object) -> None:
        with suppress(OSError, FramingError):
            handler(sock)

    listener = listening_socket()
    listener.setblocking(False)
    StreamServer(listener, guarded).serve_forever()


def echo(sock: socket) -> None:
    while chunk := sock.recv(CHUNK):
        sock.sendall(chunk)


def converse(answer: Answer, sock: socket) -> None:
    rest = b""
    while chunk := sock.recv(CHUNK):
        answers, rest = answer(rest + chunk)
        if answers:
            sock.sendall(answers)


def sink(sock: socket) -> None:
    while True:
        for _ in range(BURST):
            if not sock.recv(CHUNK):
                return
        gevent.sleep(0)


def source(sock: socket) -> None:
    while True:
        for _ in range(BURST):
            sock.sendall(BLOCK)
        gevent.sleep(0)


class Client:
    """With a greenlet that sends what is queued, so that nobody waits for one that is slow."""

    def __init__(self, sock: socket) -> None:
        self.sock = sock
        self.queue: SimpleQueue[bytes] = SimpleQueue()
        self.queued = 0

    def tell(self, lines: bytes) -> None:
        self.queued += len(lines)
        if self.queued > BROADCAST_LIMIT:
            self.sock.close()
        else:
            self.queue.put(lines)

    def send(self) -> None:
        try:
            while True:
                lines = self.queue.get()
                self.sock.sendall(lines)
                self.queued -= len(lines)
        except OSError:
            self.sock.close()


clients: set[Client] = set()


def chat(sock: socket) -> None:
    client = Client(sock)
    clients.add(client)
    sender = gevent.spawn(client.send)
    rest = b""
    try:
        while chunk := sock.recv(CHUNK):
            lines, rest = whole_lines(rest + chunk)
            if lines:
                for other in clients:
                    other.tell(lines)
    finally:
        clients.discard(client)
        sender.kill(block=False)


if __name__ == "__main__":
    main(
        {
            "greenlets": works(
                serve,
                echo=echo,
                lines=partial(converse, answer_lines),
                framed=partial(converse, answer_frames),
                sink=sink,
                source=source,
                broadcast=chat,
            )
        }
    )
