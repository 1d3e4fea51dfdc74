"""ProxyAttributes: whom a connection is for, where a proxy has said so."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trioreactor.address import SocketAddress
    from trioreactor.proxy_header import ProxyHeader


class ProxyAttributes:
    """The PROXY protocol header that a connection began with."""

    __slots__ = ()

    # The header, and the address that the connection came from. One slot, for most have neither.
    _proxied: tuple[ProxyHeader, SocketAddress] | None

    @property
    def proxy_header(self) -> ProxyHeader | None:
        """What the proxy in front said of the client; None without a header."""
        return None if self._proxied is None else self._proxied[0]

    @property
    def proxy_address(self) -> SocketAddress | None:
        """The proxy's own address; None without a header."""
        return None if self._proxied is None else self._proxied[1]
