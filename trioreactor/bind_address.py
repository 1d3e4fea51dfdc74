"""Bind addresses: what a user writes to say where to listen, read into what has to be opened."""

from __future__ import annotations

from typing import TypeAlias

from trioreactor.address import LONGEST_UNIX_PATH

BindAddress: TypeAlias = tuple[str | None, int] | str | int
"""A host (None: every address) and a port, a Unix socket's path, or a descriptor's number."""

_FORMS = (
    "pass host:port, :port (every address), [IPv6 address]:port, unix:PATH, unix:@NAME (abstract) "
    "or fd://NUMBER"
)

# The largest number that a descriptor can have: the kernel's int.
_LARGEST_DESCRIPTOR = 2**31 - 1


def parse_bind_address(text: str) -> BindAddress:
    """What *text* names: ``127.0.0.1:7000``, ``localhost:7000``, ``[::1]:7000``, ``:7000``,
    ``unix:/run/x.sock``, ``unix:@abstract`` or ``fd://3``.

    Port 0 is any free one. An abstract name is given with a leading NUL, as the kernel has it.
    `TypeError` or `ValueError`, which say what to pass, for anything else.
    """
    if not isinstance(text, str):
        raise TypeError(f"bind address {text!r}: {_FORMS}")
    if text.startswith("unix:"):
        return _unix_path(text)
    if text.startswith("fd://"):
        return _descriptor(text)
    host, colon, port = text.rpartition(":")
    if not colon:
        raise ValueError(f"bind address {text!r}: {_FORMS}")
    number = _number(port, 65535)
    if number is None:
        raise ValueError(f"bind address {text!r}: pass a port from 0 to 65535 after the last colon")
    return _host(text, host), number


def _host(text: str, host: str) -> str | None:
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        if ":" not in host or "[" in host or "]" in host:
            raise ValueError(f"bind address {text!r}: pass an IPv6 address between the brackets")
        return host
    if ":" in host:
        raise ValueError(
            f"bind address {text!r}: pass an IPv6 address in brackets, as in [::1]:7000"
        )
    if any(mark in host for mark in "[]/\0") or any(map(str.isspace, host)):
        raise ValueError(f"bind address {text!r}: {_FORMS}")
    return host or None


def _unix_path(text: str) -> str:
    path = text.removeprefix("unix:")
    if path in ("", "@"):
        raise ValueError(f"bind address {text!r}: pass a path or @name after unix:")
    if "\0" in path:
        # The kernel would take what stands before it.
        raise ValueError(f"bind address {text!r}: pass a path with no NUL, or @name (abstract)")
    if len(path.encode("utf-8", "surrogateescape")) > LONGEST_UNIX_PATH:
        raise ValueError(
            f"bind address {text!r}: pass a path of at most {LONGEST_UNIX_PATH} bytes, for the "
            "kernel takes no longer one"
        )
    return f"\0{path[1:]}" if path.startswith("@") else path


def _descriptor(text: str) -> int:
    number = _number(text.removeprefix("fd://"), _LARGEST_DESCRIPTOR)
    if number is None:
        raise ValueError(
            f"bind address {text!r}: pass the number of a listening socket's descriptor, as in "
            "fd://3"
        )
    return number


def _number(text: str, most: int) -> int | None:
    """*text* as a number from 0 to *most*, or None if it is none."""
    # Not int() alone, which takes signs, spaces, underscores and other scripts' digits; and none
    # of more digits than its bound has, for leading zeros mean octal to some.
    if not (text.isascii() and text.isdigit()) or len(text) > len(str(most)):
        return None
    number = int(text)
    return number if number <= most else None
