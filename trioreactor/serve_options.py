"""ServeOptions: what a command line can say of a server, in values that another process can be
told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from trioreactor.loop_watchdog import check_threshold
from trioreactor.options import Limits, check_count
from trioreactor.proxy_protocol import ProxyProtocol
from trioreactor.serve_tls import server_context

LogLevel = Literal["debug", "info", "warning", "error"]

LOG_LEVELS: tuple[LogLevel, ...] = ("debug", "info", "warning", "error")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeOptions:
    """What a command line can say of the server in each process; None leaves it to the target.

    Plain values, for a worker process is told them as text. What more there is to say of a server
    is said by a target that makes it.
    """

    max_connections: int | None = None
    """`Limits.connections`, in each process: N workers hold N times as many."""
    max_per_peer: int | None = None
    """`Limits.per_peer`, in each process."""
    accept_rate: float | None = None
    """`Limits.accept_rate`, in each process."""
    when_full: Literal["wait", "reject"] | None = None
    """`Limits.when_full`."""
    threads: int | None = None
    """Serve in so many threads, each with a loop of its own (`EventLoopThreadPool`), in each
    process."""
    tls_cert: str | None = None
    """A PEM file with the server's certificate chain, and its private key unless that is in
    `tls_key`. Read when a server begins: a worker that replaces another reads it anew."""
    tls_key: str | None = None
    """A PEM file with the private key, not encrypted."""
    tls_ca: str | None = None
    """A PEM file with the authorities that clients' certificates must be signed by."""
    proxy_protocol: Sequence[str] | None = None
    """Whose PROXY protocol headers are believed, each connection's being wanted: networks; "unix"
    for whoever connects by a Unix socket; or "any" alone. See `ProxyProtocol`."""
    watchdog: float | None = None
    """`TcpServer`'s *watchdog*, seconds; 0 for none."""
    log_level: LogLevel | None = None
    """Set up logging to stderr, of what is at least so grave. None sets up nothing: the target
    does."""

    def __post_init__(self) -> None:
        self._plain_texts()
        self._limits()
        check_count("ServeOptions", "threads", self.threads, least=1, unit="threads")
        self._proxy_protocol()
        if self.watchdog != 0:
            check_threshold("ServeOptions", "watchdog", self.watchdog, off=True)
        if self.tls_cert is None and (self.tls_key or self.tls_ca):
            raise ValueError("ServeOptions: tls_key and tls_ca want a tls_cert")
        if self.log_level is not None and self.log_level not in LOG_LEVELS:
            raise ValueError(
                f"ServeOptions(log_level={self.log_level!r}): pass one of {', '.join(LOG_LEVELS)}"
            )

    def _plain_texts(self) -> None:
        for name in ("tls_cert", "tls_key", "tls_ca"):
            value = getattr(self, name)
            if not isinstance(value, str | None):
                raise TypeError(f"ServeOptions({name}={value!r}): pass the file's name as a str")
        given: object = self.proxy_protocol
        if given is not None and (
            not isinstance(given, list | tuple) or not all(isinstance(each, str) for each in given)
        ):
            raise TypeError(
                f"ServeOptions(proxy_protocol={given!r}): pass a list of texts, such as "
                '["10.0.0.0/8"], ["unix"] or ["any"]'
            )

    def _limits(self) -> Limits:
        # Its own checks say what to pass.
        return Limits(
            connections=self.max_connections,
            per_peer=self.max_per_peer,
            accept_rate=self.accept_rate,
            when_full=self.when_full or "wait",
        )

    def _proxy_protocol(self) -> ProxyProtocol | None:
        if self.proxy_protocol is None:
            return None
        # Said twice, it is said.
        trusted = [each for each in dict.fromkeys(self.proxy_protocol) if each != "unix"]
        if "any" in trusted and trusted != ["any"]:
            raise ValueError(
                f"ServeOptions(proxy_protocol={self.proxy_protocol!r}): pass networks or "
                '"any", which has all networks in it'
            )
        return ProxyProtocol(
            trusted="any" if trusted == ["any"] else trusted, unix="unix" in self.proxy_protocol
        )

    def server_arguments(self) -> dict[str, Any]:
        """What `TcpServer` is to be called with: the arguments that are asked for, and no others,
        so that those of the target's own stay. `ValueError` for a certificate that is of no use.
        """
        arguments: dict[str, Any] = {}
        limits = self._limits()
        if limits != Limits():
            arguments["limits"] = limits
        if self.tls_cert is not None:
            arguments["ssl_context"] = server_context(self.tls_cert, self.tls_key, self.tls_ca)
        if self.proxy_protocol is not None:
            arguments["proxy_protocol"] = self._proxy_protocol()
        if self.watchdog is not None:
            arguments["watchdog"] = self.watchdog or None
        return arguments

    def as_plain(self) -> dict[str, Any]:
        """Its fields, for another process to make it from."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
