"""The Twisted peer, on its epoll reactor: `python twisted_peer.py protocol WORK`."""

from __future__ import annotations

from typing import Any, ClassVar, cast

from common import BACKLOG, BLOCK, BROADCAST_LIMIT, MAX_MESSAGE, PONG, announce, main, works
from twisted.internet import epollreactor
from twisted.internet.interfaces import IPushProducer
from twisted.internet.protocol import Protocol, ServerFactory
from twisted.protocols.basic import Int32StringReceiver, LineOnlyReceiver
from zope.interface import implementer


def serve(protocol: type[Any]) -> None:
    cast(Any, epollreactor).install()
    from twisted.internet import reactor

    loop = cast(Any, reactor)
    factory = ServerFactory.forProtocol(protocol)
    port = loop.listenTCP(0, factory, backlog=BACKLOG, interface="127.0.0.1")
    announce(port.getHost().port)
    loop.run()


class Sink(Protocol):  # type: ignore[misc, unused-ignore]
    transport: Any

    def connectionMade(self) -> None:  # noqa: N802 Twisted's name
        self.transport.setTcpNoDelay(True)


class Paced(Sink):
    def connectionMade(self) -> None:  # noqa: N802 Twisted's name
        super().connectionMade()
        # A transport whose send buffer is full stops its producer: itself, from reading.
        self.transport.registerProducer(self.transport, True)


class Echo(Paced):
    def dataReceived(self, data: bytes) -> None:  # noqa: N802 Twisted's name
        self.transport.write(data)


class Lines(Paced, LineOnlyReceiver):  # type: ignore[misc, unused-ignore]
    delimiter = b"\r\n"
    MAX_LENGTH = MAX_MESSAGE

    def lineReceived(self, line: bytes) -> None:  # noqa: N802 Twisted's name
        self.transport.write(PONG)

    def lineLengthExceeded(self, line: bytes) -> None:  # noqa: N802 Twisted's name
        # Losing it, as is usual, would wait for a producer that is paused.
        self.transport.abortConnection()


class Framed(Sink, Int32StringReceiver):  # type: ignore[misc, unused-ignore]
    MAX_LENGTH = MAX_MESSAGE

    def connectionMade(self) -> None:  # noqa: N802 Twisted's name
        super().connectionMade()
        # Unlike the transport, it also stops delivering what was read.
        self.transport.registerProducer(self, True)

    def stringReceived(self, string: bytes) -> None:  # noqa: N802 Twisted's name
        self.sendString(string)


@implementer(IPushProducer)
class Source(Sink):
    def connectionMade(self) -> None:  # noqa: N802 Twisted's name
        super().connectionMade()
        self.transport.registerProducer(self, True)
        self.resumeProducing()

    def resumeProducing(self) -> None:  # noqa: N802 Twisted's name
        self.paused = False
        while not self.paused:
            self.transport.write(BLOCK)

    def pauseProducing(self) -> None:  # noqa: N802 Twisted's name
        self.paused = True

    stopProducing = pauseProducing  # noqa: N815 Twisted's name


@implementer(IPushProducer)
class Chat(Lines):
    delimiter = b"\n"
    clients: ClassVar[set[Chat]] = set()
    paused = False
    behind = 0

    def connectionMade(self) -> None:  # noqa: N802 Twisted's name
        self.transport.setTcpNoDelay(True)
        self.transport.registerProducer(self, True)
        self.clients.add(self)

    def connectionLost(self, reason: object = None) -> None:  # noqa: N802 Twisted's name
        self.clients.discard(self)

    def pauseProducing(self) -> None:  # noqa: N802 Twisted's name
        # Who sends faster than it reads is slowed down.
        self.transport.pauseProducing()
        self.paused = True

    def resumeProducing(self) -> None:  # noqa: N802 Twisted's name
        self.transport.resumeProducing()
        self.paused = False
        self.behind = 0

    def stopProducing(self) -> None:  # noqa: N802 Twisted's name
        pass

    def lineReceived(self, line: bytes) -> None:  # noqa: N802 Twisted's name
        line += b"\n"
        for client in self.clients:
            client.tell(line)

    def tell(self, line: bytes) -> None:
        if self.paused:
            self.behind += len(line)
            if self.behind > BROADCAST_LIMIT:
                self.transport.abortConnection()
                return
        self.transport.write(line)


if __name__ == "__main__":
    main(
        {
            "protocol": works(
                serve,
                echo=Echo,
                lines=Lines,
                framed=Framed,
                sink=Sink,
                source=Source,
                broadcast=Chat,
            )
        }
    )
