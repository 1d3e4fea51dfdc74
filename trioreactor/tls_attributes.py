"""TlsAttributes: how a connection begins TLS, and what it knows of it."""

from __future__ import annotations

import errno
import math
import ssl
from typing import TYPE_CHECKING, TypedDict

import trio

from trioreactor.errors import ProtocolError
from trioreactor.state import CloseReason, ConnectionState
from trioreactor.tls_socket import TlsSocket

if TYPE_CHECKING:
    from trioreactor.lifecycle import Lifecycle
    from trioreactor.sockets import ConnectedSocket
    from trioreactor.tls import TlsInfo


class TlsOptions(TypedDict, total=False):
    """What `TcpConnection.start_tls` may be given, for those that hand it on."""

    server_hostname: str | None
    https_compatible: bool
    session: ssl.SSLSession | None


class TlsAttributes:
    """TLS, from the beginning or after a while in the open (STARTTLS)."""

    __slots__ = ()

    _life: Lifecycle
    _sock: ConnectedSocket

    @property
    def tls(self) -> TlsInfo | None:
        """What is known of its TLS; None while it is in the open. It stays after the close."""
        tls = self._life.tls
        return tls.info if tls is not None and tls.ready else None

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        *,
        server_side: bool,
        server_hostname: str | None = None,
        https_compatible: bool = False,
        session: ssl.SSLSession | None = None,
    ) -> None:
        """Send what is queued, then encrypt both ways from here on: wait for the handshake.

        The client gives the *server_hostname* that the certificate is to be for, and may give the
        *session* of an earlier connection (`TlsInfo.session`). An EOF without TLS's close_notify is
        an error, for what came may be cut off; with *https_compatible* it is an EOF, for protocols
        that know by themselves where they end.

        It takes at most `Timeouts.handshake` seconds. Meanwhile `send` and `receive_some` raise
        `trio.BusyResourceError`. Cancelling closes the connection.

        Raises `HandshakeFailed`, a `trio.BrokenResourceError`, with ssl's error as its cause, and
        `ProtocolError` if input that came in the open was read and not consumed: what came in front
        of TLS must not pass for what came in it. Both close the connection. (A handler that has
        itself taken such bytes from `receive_some` has to refuse them itself. What is still in the
        kernel is taken for the handshake, and fails it if it is none.) `ValueError` if the
        arguments do not fit each other, and `trio.BusyResourceError` if a task sends or receives;
        then nothing has changed.
        """
        if not isinstance(ssl_context, ssl.SSLContext):
            raise TypeError(f"start_tls({ssl_context!r}): pass an ssl.SSLContext")
        if self._life.tls is not None:
            raise RuntimeError("start_tls: this connection has TLS already")
        if server_side and (server_hostname is not None or session is not None):
            raise ValueError("start_tls: server_hostname and session are the client's")
        if not server_side and ssl_context.check_hostname and not server_hostname:
            # Only an SSLSocket of Python's would ask; all names would do.
            raise ValueError("start_tls: pass server_hostname=..., which the context is to check")
        tls = TlsSocket(
            self._sock,
            self._life.write.channel,
            ssl_context,
            server_side=server_side,
            server_hostname=server_hostname,
            https_compatible=https_compatible,
            session=session,
        )
        await trio.lowlevel.checkpoint_if_cancelled()
        await _start_tls(self._life, tls)


@trio.lowlevel.enable_ki_protection
async def _start_tls(life: Lifecycle, tls: TlsSocket) -> None:
    opening = life.state is ConnectionState.CONNECTING
    if not opening and life.state is not ConnectionState.CONNECTED:
        raise life.ending.error()
    read, write = life.read, life.write
    read.claim()
    try:
        write.claim()
    except BaseException:
        read.release()
        raise
    # What may have been stopped is the user's input.
    paused = not read.reading
    read.start_reading()
    seconds = life.watches.timeouts.handshake
    try:
        with trio.move_on_after(math.inf if seconds is None else seconds):
            if write.queued:
                await write.wait_drained()
            if read.buffer.size and not opening:
                raise ProtocolError(f"{read.buffer.size} bytes came in the open, in front of TLS")
            # In front of everything else (a PROXY protocol's step has read too much), it is TLS's.
            tls.feed(read.buffer.take())
            life.begin_tls(tls)
            await _shake_hands(life, tls)
            return
        text = f"not done within {seconds:g} s"
        raise life.fail_tls(TimeoutError(errno.ETIMEDOUT, text))
    except Exception as error:
        if not life.ending.closed_here:
            wrong = isinstance(error, ProtocolError)
            life.close(CloseReason.PROTOCOL_ERROR if wrong else CloseReason.HANDSHAKE_FAILED)
        raise
    except BaseException:
        if not opening:
            life.close(CloseReason.CANCELLED)
        raise
    finally:
        read.release()
        if paused:
            read.stop_reading()
        write.unclaim(hold=opening)


async def _shake_hands(  # noqa: ASYNC910 the caller has checkpoints
    life: Lifecycle, tls: TlsSocket
) -> None:
    while not life.ending.closed_here and life.state is not ConnectionState.DISCONNECTED:
        try:
            done = tls.shake_hands()
        except OSError as error:
            raise life.fail_tls(error) from error
        if done:
            # Records may have come with the peer's last message, and a half-close have been asked
            # for.
            life.write.channel.readable = True
            life.write.on_writable()
            return  # noqa: ASYNC910 as above
        if tls.unsent:
            await life.write.wait_flushed(tls)
        else:
            life.read.channel.readable = False
            await life.read.wait_readable()
    raise life.ending.error()
