"""A network of a test's own: a namespace of the kernel's, in which only loopback is (Linux, root).

Only the thread that asks is in it, and the processes that it starts. The kernel takes the namespace
away with the last socket in it, so there is nothing to clean up.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

CLONE_NEWNET = 0x40000000
THIS_THREADS = "/proc/thread-self/ns/net"


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@contextmanager
def network_namespace() -> Iterator[None]:
    """Within, every socket of this thread is made in a new network whose loopback is up."""
    # Python has these two calls since 3.12.
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open(THIS_THREADS, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(libc.unshare(CLONE_NEWNET))
        try:
            ip("link", "set", "lo", "up")
            yield
        finally:
            _check(libc.setns(before, CLONE_NEWNET))
    finally:
        os.close(before)


def ip(*arguments: str) -> None:
    """Run `ip` in this thread's network."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=10)


def black_hole(network: str) -> None:
    """Nobody answers there: loopback takes the packets and drops them on their return."""
    ip("route", "add", network, "dev", "lo")


def local_ports(first: int, last: int) -> None:
    """Which ports the kernel may choose for our ends, in this thread's network."""
    Path("/proc/sys/net/ipv4/ip_local_port_range").write_text(f"{first} {last}")


@cache
def why_none() -> str | None:
    """What stands in the way of namespaces here; None if nothing does."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if shutil.which("ip") is None:
        return "needs the ip command"
    try:
        with network_namespace():
            local_ports(40000, 40001)
            black_hole("198.18.0.0/15")
    except (OSError, subprocess.SubprocessError) as error:
        return f"no network namespaces here: {error}"
    return None


@pytest.fixture
def own_network() -> Iterator[None]:
    """The test runs in a network of its own."""
    if (reason := why_none()) is not None:
        pytest.skip(reason)
    with network_namespace():
        yield
