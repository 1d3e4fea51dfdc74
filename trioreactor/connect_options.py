"""The options of `Connector`, for all that take them: their types, and what they mean."""

from __future__ import annotations

import inspect
import ipaddress
import os
from collections.abc import Callable, Iterable, Mapping
from typing import TypedDict

from trioreactor.backoff import Backoff
from trioreactor.endpoints import Chooser, ConnectAttempt, Endpoint
from trioreactor.options import SocketOptions

Place = Endpoint | os.PathLike[str]
OnAttempt = Callable[[ConnectAttempt], object]


class ConnectOptions(TypedDict, total=False):
    """The options of `Connector`, for those that hand them on to one."""

    path: str | os.PathLike[str] | None
    endpoints: Iterable[Place] | None
    chooser: Chooser
    connect_timeout: float | None
    local_address: str | tuple[str, int] | None
    socket_options: SocketOptions
    on_attempt: OnAttempt | None


class RetryOptions(ConnectOptions, total=False):
    """The same with those that concern another attempt."""

    backoff: Backoff | Iterable[float]
    max_attempts: int | None
    retry: bool


def check_on_attempt(on_attempt: object) -> None:
    """Raise unless it is None, or a function that returns at once."""
    if on_attempt is None:
        return
    if not callable(on_attempt) or inspect.iscoroutinefunction(on_attempt):
        raise TypeError(f"on_attempt={on_attempt!r}: pass a plain function, or None")


def check_known(owner: str, options: Mapping[str, object], kind: type[ConnectOptions]) -> None:
    """Raise for an option that *kind* does not have: it may be caught here only."""
    # A TypedDict has this, but its type does not say so.
    unknown = options.keys() - getattr(kind, "__optional_keys__")  # noqa: B009
    if unknown:
        raise TypeError(f"{owner} has no option {', '.join(sorted(unknown))}")


def places(
    host: str | None,
    port: int | None,
    path: str | os.PathLike[str] | None,
    endpoints: Iterable[Place] | None,
) -> list[Endpoint]:
    """Where to, from the three ways to say it."""
    ways = (host is not None or port is not None) + (path is not None) + (endpoints is not None)
    if ways == 1:
        if host is not None and port is not None:
            return [(host, port)]
        if path is not None:
            return [_unix_path(path)]
        if isinstance(endpoints, (str, bytes)):
            raise TypeError(f"endpoints={endpoints!r}: pass a list of (host, port) and Unix paths")
        if endpoints is not None:
            return [_unix_path(at) if isinstance(at, os.PathLike) else at for at in endpoints]
    raise TypeError("pass both host and port, or path=..., or endpoints=[...]: one of the three")


def _unix_path(given: str | os.PathLike[str]) -> str:
    path: object = os.fspath(given)
    if not isinstance(path, str) or given == "":
        raise TypeError(f"path={given!r}: pass a Unix socket's path as text")
    # In a list of endpoints, without a slash it could as well be a host's name.
    return path if "/" in path or path.startswith("\0") else os.path.join(os.curdir, path)


def local_end(given: str | tuple[str, int] | None) -> tuple[str, int] | None:
    """*given* as an IP address and a port, 0 for any; None if it is."""
    if given is None:
        return None
    text = f"local_address={given!r}: pass an IP address, or (IP address, port)"
    pair = given if isinstance(given, tuple) else (given, 0)
    if len(pair) != 2 or not isinstance(pair[0], str) or type(pair[1]) is not int:
        raise TypeError(text)
    host, port = pair
    try:
        # Only an IPv6 address may have a scope.
        ipaddress.ip_address(host)
    except ValueError:
        raise ValueError(text) from None
    if not 0 <= port <= 65535:
        raise ValueError(f"local_address={given!r}: pass a port from 0 (any) to 65535")
    return host, port
