"""TlsOutput: the way of plaintext, and of what TLS says by itself, into the kernel."""

from __future__ import annotations

import errno
import ssl
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from trioreactor.channel import Channel
    from trioreactor.sockets import ConnectedSocket

# What a record holds at most: OpenSSL neither gives nor takes more at once. (RFC 8446, 5.1)
RECORD = 16384

# What is encrypted for one write. It waits in memory if the kernel does not take it, so it is the
# fixed overhead of a peer that does not read; more of it saves no system calls worth the name.
_PIECE = 4 * RECORD

# Pieces that a call writes before the others have their turn, as the queue's own gather writes.
_PIECES_PER_CALL = 4


class TlsOutput:
    """Encrypts what is sent, and reports it as sent when the kernel has its ciphertext: while some
    of that waits here, as many bytes count as unsent, as far as there are so many.

    So a queue above this is not empty before this is. It offers again, first, the `ahead` bytes
    that are encrypted already and were not reported, and must not drop them meanwhile.
    """

    __slots__ = (
        "_channel",
        "_closed",
        "_lost",
        "_object",
        "_outgoing",
        "_output",
        "_sock",
        "_stuck",
        "ahead",
        "ready",
    )

    _object: ssl.SSLObject

    def __init__(self, sock: ConnectedSocket, channel: Channel) -> None:
        self._sock = sock
        self._channel = channel
        self._outgoing = ssl.MemoryBIO()
        # The handshake is done.
        self.ready = False
        # Ciphertext that a write has left; what is in `_outgoing` comes behind it.
        self._output: bytes | memoryview = b""
        # Bytes of the caller's that are encrypted and were not reported as sent.
        self.ahead = 0
        # OpenSSL wants input before it encrypts more: TLS 1.2's renegotiation.
        self._stuck = False
        # What a write of TLS's own met, whose caller is nobody.
        self._lost: OSError | None = None
        # Our close_notify has gone, and the socket's EOF behind it.
        self._closed = False

    @property
    def unsent(self) -> bool:
        """Whether ciphertext waits for the kernel."""
        return bool(self._output) or self._outgoing.pending > 0

    def send(self, data: bytes | bytearray | memoryview, /) -> int:
        """How much of *data* the kernel has. Of what was offered before, the `ahead` bytes must
        come first.
        """
        size = len(data)
        if self.ahead or self._output or size > RECORD or not self.ready:
            return self._send_pieces(memoryview(data), size)
        # Most messages: a record, written at once.
        try:
            self._object.write(data)
        except ssl.SSLWantReadError:
            return self._send_pieces(memoryview(data), size)
        output = self._outgoing.read()
        try:
            sent = self._sock.send(output)
        except BlockingIOError:
            sent = 0
        if sent == len(output):
            return size
        self._output = memoryview(output)[sent:]
        self.ahead = size
        return self._report(0)

    def _send_pieces(self, view: memoryview, size: int) -> int:
        if not self.ready:
            raise BlockingIOError(errno.EAGAIN, "the TLS handshake is under way")
        sent = 0
        for _ in range(_PIECES_PER_CALL):
            if not self.flush():
                return self._report(sent)
            sent += self.ahead
            self.ahead = 0
            if sent == size:
                return sent
            self._encrypt(view[sent : sent + _PIECE])
            if self._stuck:
                break
        if self.flush():
            sent += self.ahead
            self.ahead = 0
            if sent < size and not self._stuck:
                # The kernel is not full, so it will not say that it has room again.
                self._channel.poller.call_soon(lambda: self._channel.on_writable())
        return self._report(sent)

    def sendmsg(self, buffers: Iterable[bytes | bytearray | memoryview], /) -> int:
        """`send`, of all of them together: small ones share a record."""
        return self.send(b"".join(buffers))

    def _encrypt(self, piece: memoryview) -> None:
        write = self._object.write
        done = 0
        try:
            while done < len(piece):
                done += write(piece[done : done + RECORD])
        except ssl.SSLWantReadError:
            self._stuck = True
        self.ahead = done

    def _report(self, sent: int) -> int:
        """What of the bytes `ahead` the kernel has may be forgotten, behind *sent* that it has."""
        unsent = min(self.ahead, len(self._output) + self._outgoing.pending)
        sent += self.ahead - unsent
        self.ahead = unsent
        if not sent:
            raise BlockingIOError(errno.EAGAIN, "the kernel takes no more")
        return sent

    def flush(self) -> bool:
        """Write what is encrypted. False: the kernel has left some of it."""
        while True:
            output = self._output or self._outgoing.read()
            if not output:
                return True
            self._output = output
            if self._closed:
                # Behind our EOF nothing can go.
                self._output = b""
                continue
            try:
                sent = self._sock.send(output)
            except BlockingIOError:
                return False
            if sent < len(output):
                self._output = memoryview(output)[sent:]
                return False
            self._output = b""

    def flush_by_the_way(self) -> None:
        """`flush` what nobody has sent: tickets, new keys, alerts."""
        try:
            if not self.flush():
                self._channel.want_write()
        except OSError as error:
            # Whoever reads or writes finds it, but for what the kernel tells only once.
            self._output = b""
            self._outgoing.read()
            if error.errno != errno.EPIPE:
                self._lost = error
