"""Endpoints: where a connector may connect to, and which of them comes next."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from trioreactor.address import LONGEST_UNIX_PATH, SocketAddress, format_address
from trioreactor.exception_groups import members

Endpoint: TypeAlias = tuple[str, int] | str
"""A host and a port, or the path of a Unix socket."""

Chooser: TypeAlias = Literal["in_order", "random"] | Callable[[Sequence[Endpoint]], Endpoint]
"""Which endpoint comes next, of those that this round has not tried yet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConnectAttempt:
    """One attempt to connect to one endpoint, as it ended."""

    number: int
    """Counted from 1 in each `connect`."""
    endpoint: Endpoint
    """What was asked for."""
    address: SocketAddress | None
    """What it is connected to; None if it failed."""
    duration: float
    """How long it took, seconds."""
    error: Exception | None
    """Why it failed; None if it did not. An `ExceptionGroup` if every address of the host failed
    in its own way."""
    delay: float | None
    """Seconds until the next attempt; None if none follows."""

    def __str__(self) -> str:
        where = format_address(self.endpoint)
        if self.error is None:
            return f"{where}: connected in {self.duration:.3f} s"
        text = _describe(self.error)
        return text if text.startswith(where) else f"{where}: {text}"


def attempts_text(number: int) -> str:
    """``1 attempt``, ``2 attempts``."""
    return f"{number} attempt{'' if number == 1 else 's'}"


def _describe(error: BaseException) -> str:
    """*error* in a line; a group as what is in it."""
    if (inner := members(error)) is not None:
        return "; ".join(map(_describe, inner))
    strerror = error.strerror if isinstance(error, OSError) else None
    return strerror or str(error) or repr(error)


def check_endpoint(endpoint: object) -> Endpoint:
    """*endpoint* if it can be one; else raise, and say what can."""
    if isinstance(endpoint, str):
        if "/" not in endpoint and not endpoint.startswith("\0"):
            raise ValueError(
                f"endpoint {endpoint!r}: pass (host, port), or a Unix socket's path with a slash"
            )
        if "\0" in endpoint[1:]:
            # The kernel would take what stands before it.
            raise ValueError(f"endpoint {endpoint!r}: a NUL can only be its first character")
        if len(endpoint.encode("utf-8", "surrogateescape")) > LONGEST_UNIX_PATH:
            raise ValueError(
                f"endpoint {endpoint!r}: a Unix socket's path has at most {LONGEST_UNIX_PATH} bytes"
            )
        return endpoint
    if not isinstance(endpoint, tuple) or len(endpoint) != 2:  # pyright: ignore[reportUnknownArgumentType]
        raise TypeError(f"endpoint {endpoint!r}: pass (host, port), or a Unix socket's path")
    host, port = endpoint  # pyright: ignore[reportUnknownVariableType]
    if not isinstance(host, str) or isinstance(port, bool) or not isinstance(port, int):
        raise TypeError(f"endpoint {endpoint!r}: pass the host as text, the port as a number")
    if not host or "\0" in host:
        raise ValueError(f"endpoint {endpoint!r}: pass a host name or an IP address")
    if not 1 <= port <= 65535:
        raise ValueError(f"endpoint {endpoint!r}: pass a port from 1 to 65535")
    return host, port


class Rounds:
    """Goes through the endpoints in rounds: each is tried once before any is tried again.

    One that cannot be reached, however often it is tried, is given up until `restart`.
    """

    __slots__ = ("_alive", "_all", "_choose", "_left")

    def __init__(self, endpoints: Iterable[object], chooser: Chooser) -> None:
        # Each once, if it is named twice.
        self._all = tuple(dict.fromkeys(map(check_endpoint, endpoints)))
        if not self._all:
            raise ValueError("endpoints=[]: pass at least one (host, port) or Unix path")
        if chooser == "in_order":
            self._choose: Callable[[Sequence[Endpoint]], Endpoint] = _first
        elif chooser == "random":
            self._choose = random.choice
        elif callable(chooser):
            self._choose = chooser
        else:
            raise ValueError(f'chooser={chooser!r}: pass "in_order", "random" or a function')
        self.restart()

    def restart(self) -> None:
        """Begin a new round with all of them."""
        self._alive = list(self._all)
        # Not yet tried in this round; empty between rounds.
        self._left: list[Endpoint] = []

    @property
    def complete(self) -> bool:
        """Whether every endpoint of this round has been tried."""
        return not self._left

    @property
    def exhausted(self) -> bool:
        """Whether every endpoint has been given up."""
        return not self._alive

    def next(self) -> Endpoint:
        """The endpoint to try now."""
        if not self._left:
            self._left = list(self._alive)
        endpoint = self._choose(tuple(self._left))
        if endpoint not in self._left:
            raise ValueError(f"the chooser gave {endpoint!r}, which is none of {self._left!r}")
        self._left.remove(endpoint)
        return endpoint

    def give_up(self, endpoint: Endpoint) -> None:
        """Do not try *endpoint* again."""
        self._alive.remove(endpoint)


def _first(endpoints: Sequence[Endpoint]) -> Endpoint:
    return endpoints[0]
