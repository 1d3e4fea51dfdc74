"""TlsSocket: TLS between a connection's halves and its socket. What it knows of itself: `TlsInfo`.

An `ssl.SSLObject` on two memory BIOs: a system call then moves many records, and nothing of the
engine's is asked to wait inside OpenSSL. (docs/design.md has the comparison with an SSLSocket)

Layout of what is under way::

    in   kernel -> _incoming (records) -> OpenSSL -> plaintext        -> the read half
                                                     _held: peeked at
    out  the write half -> OpenSSL -> _outgoing (records) -> kernel
                                      _output: of those, what a write has left
"""

from __future__ import annotations

import errno
import ssl
from typing import TYPE_CHECKING

from trioreactor.read_half import RECEIVE_SIZE
from trioreactor.tls import TlsInfo, note_server_names
from trioreactor.tls_output import RECORD, TlsOutput

if TYPE_CHECKING:
    from trioreactor.channel import Channel
    from trioreactor.sockets import ConnectedSocket

# A read that expects a record and what comes around it: a buffer of 64 KiB would cost
# as much as a fifth of all the rest for a small one. (measured)
_FIRST_READ = RECORD + 512

# A read of a peer whose records hold next to nothing, for OpenSSL goes on until it finds data or
# has seen all: a thousand key updates in 27 kB take it tens of milliseconds. (measured)
_WARY_READ = 1024

# Reads of a call that finds nothing for its caller (session tickets, half a record).
_READS_PER_CALL = 4


class TlsSocket(TlsOutput):
    """Takes a connected socket's place in both halves: `sockets.DataSocket`.

    Plaintext goes in and comes out as a kernel would take and give it, by the rules that an
    edge-triggered reader lives by: a short read has left nothing behind, neither in the kernel nor
    here, and what raises BlockingIOError is followed by an event.
    """

    __slots__ = (
        "_clear",
        "_coming",
        "_ended",
        "_failure",
        "_held",
        "_incoming",
        "_left_over",
        "_most",
        "_notified",
        "_taken",
        "_trust",
        "https_compatible",
        "info",
    )

    def __init__(
        self,
        sock: ConnectedSocket,
        channel: Channel,
        ssl_context: ssl.SSLContext,
        *,
        server_side: bool,
        server_hostname: str | None,
        https_compatible: bool,
        session: ssl.SSLSession | None,
    ) -> None:
        super().__init__(sock, channel)
        self._incoming = ssl.MemoryBIO()
        if server_side:
            note_server_names(ssl_context)
        self._object = ssl_context.wrap_bio(
            self._incoming,
            self._outgoing,
            server_side=server_side,
            server_hostname=server_hostname,
            session=session,
        )
        # Take the peer's EOF for a clean one where it sent no close_notify.
        self.https_compatible = https_compatible
        self.info = TlsInfo(self._object, https_compatible=https_compatible)
        # Plaintext that was peeked at.
        self._held = b""
        # OpenSSL may have more than it was asked for.
        self._left_over = False
        # Nothing of all this is here, and we are not wary: `recv` takes a short way.
        self._clear = False
        # The reader is to be told soon that there is something to read.
        self._coming = False
        # What is read at once; what that may become; what full reads took since the last data.
        self._most = _FIRST_READ
        self._trust = RECEIVE_SIZE
        self._taken = 0
        # The peer's close_notify has come, or what counts as one; or what the connection broke by.
        # Each is told behind what came before it, and ever after.
        self._ended = False
        self._failure: OSError | None = None
        # Our close_notify is encrypted.
        self._notified = False

    # -- the handshake

    def feed(self, data: bytes) -> None:
        """Take *data*, which was read from the socket already, for the peer's next records."""
        self._incoming.write(data)

    def shake_hands(self) -> bool:
        """Go on with the handshake as far as the input goes. True when it is done.

        Raises `OSError`, an `ssl.SSLError` mostly. The peer was told then, if it listens.
        """
        while not self._go_on():
            self.flush()
            try:
                data = self._sock.recv(_FIRST_READ)
            except BlockingIOError:
                return False
            if not data:
                text = "the peer closed the connection"
                raise ConnectionResetError(errno.ECONNRESET, text)
            self._incoming.write(data)
        self.ready = self._left_over = True
        if self._incoming.pending:
            # A question came along, and its answer is likely to take these with it.
            self._channel.poller.call_soon(self._flush_soon)
        else:
            self.flush_by_the_way()
        return True

    def _flush_soon(self) -> None:
        if not self._channel.closed:
            self.flush_by_the_way()

    def _go_on(self) -> bool:
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except OSError:
            # The alert that says why.
            self.flush_by_the_way()
            raise
        return True

    # -- receiving

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        """Up to *size* bytes of plaintext; b"" at the peer's close_notify."""
        if flags:
            return self._peek()
        if not self._clear or self._stuck:
            if not self.ready:
                raise BlockingIOError(errno.EAGAIN, "the TLS handshake is under way")
            return self._recv([], size)
        # Most input is a record that came alone.
        raw = self._sock.recv(_FIRST_READ)
        n = len(raw)
        if not n:
            self._see_end()
            return self._recv([], size)
        incoming = self._incoming
        incoming.write(raw)
        # Plaintext is shorter than its record.
        room = size if size < n else n
        if room > RECORD:
            room = RECORD
        try:
            data = self._object.read(room)
        except OSError as error:
            self._note(error)
            if n == _FIRST_READ:
                self._weigh(n, 0)
            return self._recv([], size)
        short = n < _FIRST_READ
        if not (incoming.pending or self._outgoing.pending) and short:
            got = len(data)
            if 0 < got < room or (got and not self._object.pending()):
                return data
        self._left_over = True
        return self._recv([data] if data else [], size - len(data), short=short)

    def _recv(self, parts: list[bytes], room: int, *, short: bool = False) -> bytes:
        """`recv`, with *room* for so much more than *parts*. *short*: the kernel has no more."""
        if self._held:
            parts.append(self._held[:room])
            self._held = self._held[room:]
            room -= len(parts[-1])
        if self._left_over and room:
            room = self._decrypt(parts, room)
        if room and not (short and parts):
            self._receive(parts, room)
        over = self._ended or self._failure is not None
        wary = self._most < _FIRST_READ
        self._clear = not (over or wary or self._held or self._left_over)
        if not parts:
            return self._nothing()
        if over:
            # It comes behind what is read now, and no event will tell of it.
            self._channel.hangup = self._channel.readable = True
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _peek(self) -> bytes:
        """Some of the plaintext, which stays; else as `recv`."""
        if self._held or self._ended or self._failure is not None or not self.ready:
            return self._held or self._nothing()
        self._clear = False
        was_readable = self._channel.readable
        parts: list[bytes] = []
        if not self._left_over or self._decrypt(parts, 1):
            self._receive(parts, 1)
        if not was_readable and (parts or self._ended or self._failure is not None):
            # What was taken from the kernel is told of by no event.
            self._come_again()
        if not parts:
            return self._nothing()
        self._held = parts[0]
        return self._held

    def _nothing(self) -> bytes:
        """What to say where there is no plaintext."""
        if self._failure is not None:
            raise self._failure
        if self._ended:
            return b""
        raise BlockingIOError(errno.EAGAIN, "no whole record yet")

    def _receive(self, parts: list[bytes], room: int) -> None:
        """Read and decrypt, until there are *room* bytes more of *parts*, or nothing is left."""
        for _ in range(_READS_PER_CALL):
            if self._ended or self._failure is not None:
                return
            size = self._most
            try:
                data = self._sock.recv(size)
            except BlockingIOError:
                return
            except OSError as error:
                self._failure = error.with_traceback(None)
                return
            if not data:
                self._see_end()
                return
            self._incoming.write(data)
            before = room
            room = self._decrypt(parts, room)
            if not room or (len(data) < size and parts):
                return
            if len(data) == size:
                self._weigh(size, before - room)
                if self._most < _FIRST_READ:
                    break
        # The others have their turn.
        self._come_again()

    def _weigh(self, taken: int, got: int) -> None:
        """A full read *taken* held *got* bytes of data. Read less at once where that is little."""
        self._taken += taken
        if 2 * got >= self._taken:
            self._most = min(4 * self._most, self._trust)
        elif got or self._taken >= _FIRST_READ:
            # More than a record is, if it held none.
            self._most = _WARY_READ
            self._trust = _FIRST_READ
        if got:
            self._taken = 0

    def _see_end(self) -> None:
        """The socket's EOF, with no close_notify before it."""
        if self._lost is not None:
            self._failure = self._lost
        elif self.https_compatible:
            self._ended = True
        else:
            text = "the connection was cut: EOF without TLS's close_notify"
            self._failure = ssl.SSLEOFError(ssl.SSL_ERROR_EOF, text)

    def _decrypt(self, parts: list[bytes], room: int) -> int:
        """Add up to *room* bytes of plaintext to *parts*; how many are not there."""
        read = self._object.read
        incoming = self._incoming
        try:
            while True:
                size = min(room, RECORD)
                data = read(size)
                if not data:
                    self._ended = True
                    break
                parts.append(data)
                room -= len(data)
                if not room:
                    self._left_over = True
                    break
                # Less than was asked for: that was all of a record.
                if len(data) < size and not incoming.pending:
                    self._left_over = False
                    break
        except OSError as error:
            self._left_over = False
            self._note(error)
        if self._outgoing.pending:
            self.flush_by_the_way()
        if self._stuck:
            self._stuck = False
            self._channel.poller.call_soon(lambda: self._channel.on_writable())
        return room

    def _note(self, error: OSError) -> None:
        """OpenSSL has no plaintext to give, for *error* says why."""
        if isinstance(error, ssl.SSLZeroReturnError):
            self._ended = True
        elif not isinstance(error, ssl.SSLWantReadError):
            self._failure = error.with_traceback(None)

    def _come_again(self) -> None:
        """Tell the reader soon, as an event would: once, however many of those come meanwhile."""
        if self._coming:
            return
        self._coming = True

        def readable() -> None:
            self._coming = False
            if not self._channel.closed:
                self._channel.readable = True
                self._channel.on_readable()

        self._channel.poller.call_soon(readable)

    # -- the end, and what is the socket's own

    def shutdown(self, how: int, /) -> None:
        """Send close_notify, then the socket's EOF. The peer may send on, in TLS 1.2, too.

        BlockingIOError if the kernel has no room yet, or the handshake is not done: try again.
        """
        if not self.ready:
            raise BlockingIOError(errno.EAGAIN, "the TLS handshake is under way")
        if self._closed:
            return
        try:
            if not self._notified:
                self._notify()
            if not self.flush():
                raise BlockingIOError(errno.EAGAIN, "the kernel takes no more")
            self._closed = True
            self._sock.shutdown(how)
        except OSError as error:
            # A peer that has said that it will send no more is likely to be gone. It has all.
            if isinstance(error, BlockingIOError) or not self._ended:
                raise
            self._closed = True

    def _notify(self) -> None:
        """Encrypt our close_notify."""
        self._notified = True
        self._clear = False
        # Python's unwrap also asks for the peer's, and what it meets there instead would be lost.
        if waiting := self._object.pending():
            self._held += self._object.read(waiting)
        records = self._incoming.read()
        try:
            self._object.unwrap()
        except (ssl.SSLWantReadError, ssl.SSLSyscallError):
            pass
        finally:
            self._incoming.write(records)
            self._left_over = True

    def getsockopt(self, level: int, option: int, /) -> int:
        """The socket's own."""
        return self._sock.getsockopt(level, option)

    def forget(self) -> None:
        """The connection is closed: hold on to nothing but what `info` tells."""
        self._held = b""
        self._output = b""
        # Raised to whoever peeked, it has a traceback, which has them, who have this.
        self._failure = self._lost = None
