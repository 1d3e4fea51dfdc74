"""The peer that has no framework, a loop around epoll: `python bare_epoll_peer.py loop WORK`."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable
from functools import partial
from typing import ClassVar

from common import (
    BLOCK,
    BROADCAST_LIMIT,
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

# Level-triggered: edges cost more, for they come for reading and writing alike, and what is not
# read to its end has to be remembered.
READ, WRITE = select.EPOLLIN, select.EPOLLOUT


class Connection:
    """Echoes. It reads while nothing waits to be sent, and is told of nothing but that."""

    def __init__(self, sock: socket.socket, poller: select.epoll) -> None:
        self.sock = sock
        self.poller = poller
        self.unsent = bytearray()
        poller.register(sock, READ)

    def readable(self) -> None:
        data = self.sock.recv(CHUNK)
        if data:
            self.received(data)
        else:
            self.close()

    def received(self, data: bytes) -> None:
        self.send(data)

    def send(self, data: bytes) -> None:
        if not self.unsent:
            try:
                sent = self.sock.send(data)
            except BlockingIOError:
                sent = 0
            if sent == len(data):
                return
            data = data[sent:]
            self.poller.modify(self.sock, WRITE)
        self.unsent += data

    def writable(self) -> None:
        sent = self.sock.send(self.unsent)
        del self.unsent[:sent]
        if not self.unsent:
            self.poller.modify(self.sock, READ)

    def close(self) -> None:
        # The poller forgets what is closed; the loop does when the descriptor is another's.
        self.sock.close()
        self.unsent.clear()


class Conversation(Connection):
    def __init__(self, answer: Answer, sock: socket.socket, poller: select.epoll) -> None:
        super().__init__(sock, poller)
        self.answer = answer
        self.rest = b""

    def received(self, data: bytes) -> None:
        if self.rest:
            data = self.rest + data
        answers, self.rest = self.answer(data)
        if answers:
            self.send(answers)


class Sink(Connection):
    def received(self, data: bytes) -> None:
        pass


class Source(Connection):
    """Sends whenever it can, one block at a time, and reads nothing."""

    def __init__(self, sock: socket.socket, poller: select.epoll) -> None:
        super().__init__(sock, poller)
        self.poller.modify(sock, WRITE)
        self.block = memoryview(BLOCK)
        self.rest = self.block

    def writable(self) -> None:
        sent = self.sock.send(self.rest)
        self.rest = self.rest[sent:] or self.block


class Chat(Conversation):
    clients: ClassVar[set[Chat]] = set()

    def __init__(self, sock: socket.socket, poller: select.epoll) -> None:
        super().__init__(whole_lines, sock, poller)
        self.clients.add(self)

    def received(self, data: bytes) -> None:
        if self.rest:
            data = self.rest + data
        lines, self.rest = self.answer(data)
        if lines:
            for client in list(self.clients):
                client.tell(lines)

    def tell(self, lines: bytes) -> None:
        if len(self.unsent) > BROADCAST_LIMIT:
            self.close()
            return
        try:
            self.send(lines)
        except OSError:
            self.close()

    def close(self) -> None:
        self.clients.discard(self)
        super().close()


def serve(connect: Callable[[socket.socket, select.epoll], Connection]) -> None:
    listener = listening_socket()
    listener.setblocking(False)
    poller = select.epoll()
    poller.register(listener, READ)
    connections: dict[int, Connection] = {}

    def accept() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except BlockingIOError:
                return
            sock.setblocking(False)
            connections[sock.fileno()] = connect(sock, poller)

    while True:
        for fd, events in poller.poll():
            connection = connections.get(fd)
            if connection is None:
                accept()
                continue
            try:
                if events & WRITE:
                    connection.writable()
                else:
                    connection.readable()
            except BlockingIOError:
                # Told of a connection that was closed, whose descriptor is another's now.
                pass
            except (OSError, FramingError):
                connection.close()


if __name__ == "__main__":
    main(
        {
            "loop": works(
                serve,
                echo=Connection,
                lines=partial(Conversation, answer_lines),
                framed=partial(Conversation, answer_frames),
                sink=Sink,
                source=Source,
                broadcast=Chat,
            )
        }
    )
