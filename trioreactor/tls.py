"""What is known of a connection's TLS."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

SniCallback: TypeAlias = Callable[[ssl.SSLObject, str, ssl.SSLContext], int | None]

# What clients have asked a server for, by SNI.
_server_names: WeakKeyDictionary[ssl.SSLObject, str | None] = WeakKeyDictionary()


class TlsInfo:
    """What is known of a connection's TLS, once its handshake is done: `TcpConnection.tls`."""

    __slots__ = ("_object", "https_compatible")

    https_compatible: bool
    """Whether an EOF counts as one where the peer sent no close_notify."""

    def __init__(self, tls: ssl.SSLObject, *, https_compatible: bool) -> None:
        self._object = tls
        self.https_compatible = https_compatible

    def __repr__(self) -> str:
        return f"<TlsInfo {self.version} {self.cipher}>"

    @property
    def version(self) -> str | None:
        """The protocol: ``"TLSv1.3"``."""
        return self._object.version()

    @property
    def cipher(self) -> str | None:
        """The cipher suite: ``"TLS_AES_256_GCM_SHA384"``."""
        cipher = self._object.cipher()
        return cipher and cipher[0]

    @property
    def alpn_protocol(self) -> str | None:
        """The application's protocol that both agreed on by ALPN; None if they did not."""
        return self._object.selected_alpn_protocol()

    @property
    def peer_certificate(self) -> dict[str, Any] | None:
        """The peer's certificate as `ssl.SSLSocket.getpeercert` tells it. None if it has sent none;
        empty if it was not verified (`ssl.CERT_NONE`).
        """
        return self._object.getpeercert()

    @property
    def peer_certificate_der(self) -> bytes | None:
        """The peer's certificate, encoded; None if it has sent none. Verified or not."""
        return self._object.getpeercert(binary_form=True)

    @property
    def server_hostname(self) -> str | None:
        """The server's name: as a client, what `start_tls` was given; as a server, what the client
        has asked for (SNI), or None if it did not say.
        """
        if self._object.server_side:
            return _server_names.get(self._object)
        return self._object.server_hostname

    @property
    def session(self) -> ssl.SSLSession | None:
        """The session, for `start_tls` of a later connection to the same server, with the same
        context. In TLS 1.3 the server sends it after the handshake: ask late.
        """
        return self._object.session

    @property
    def session_reused(self) -> bool:
        """Whether the handshake resumed an earlier session."""
        return bool(self._object.session_reused)


class _NotesServerName:
    """A context's callback for SNI: keeps the name, and calls the one that was there before."""

    def __init__(self, then: SniCallback | None) -> None:
        self._then = then

    def __call__(self, tls: ssl.SSLObject, name: str, context: ssl.SSLContext, /) -> int | None:
        _server_names[tls] = name
        return None if self._then is None else self._then(tls, name, context)


def note_server_names(context: ssl.SSLContext) -> None:
    """Have the names that clients ask for kept. There is no other way to learn them."""
    if not isinstance(context.sni_callback, _NotesServerName):
        context.sni_callback = _NotesServerName(context.sni_callback)
