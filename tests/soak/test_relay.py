"""Gigabytes through the relay (examples/tcprelay.py), which is a process of its own, as are the
client and the target.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection

import pytest

from tests.soak.child import ROOT, Child
from tests.soak.conftest import Figure

pytestmark = [pytest.mark.soak, pytest.mark.timeout(300)]

# Through both modes together.
GIB = float(os.environ.get("TRIOREACTOR_SOAK_GIB", "10"))

# All have the same part of it. The even ones bring it to the target, the odd ones from there; of
# either kind the first has a receiver that is slow for a while, the second a sender that is.
CONNECTIONS = 4
PART = int(GIB * 2**30 / 2 / CONNECTIONS)
SLOW_RECEIVERS = (0, 1)
SLOW_FROM, SLOW_TO = PART // 8, PART // 4
# Seconds for each read or write of a slow one.
SLOWNESS = 0.002

BLOCK = 2**20
LARGEST_READ = 65536
LARGEST_WRITE = 262144
# A stuck end must fail the test, not hold it up.
PATIENCE = 60

# The share of the time in which the relay's memory may find its size.
WARM_UP = 0.3
MOST_GROWTH = 4 * 2**20

processes = multiprocessing.get_context("spawn")


def send(sock: socket.socket, number: int) -> str:
    """Send this connection's part in pieces of random sizes, then EOF; its digest."""
    sizes = random.Random(number)
    block = bytearray(sizes.randbytes(BLOCK))
    view = memoryview(block)
    digest = hashlib.sha256()
    sent = 0
    while sent < PART:
        size = sizes.randint(1, sizes.choice((100, 10_000, LARGEST_WRITE)))
        start = sizes.randrange(BLOCK - LARGEST_WRITE)
        # So that no stretch of the whole is like another.
        block[start : start + 8] = sent.to_bytes(8, "big")
        piece = view[start : start + min(size, PART - sent)]
        digest.update(piece)
        sock.sendall(piece)
        sent += len(piece)
        if number not in SLOW_RECEIVERS and SLOW_FROM < sent < SLOW_TO:
            time.sleep(SLOWNESS)
    sock.shutdown(socket.SHUT_WR)
    assert sock.recv(1) == b""
    return digest.hexdigest()


def receive(sock: socket.socket, number: int) -> str:
    """Receive until EOF; the digest of what came."""
    view = memoryview(bytearray(LARGEST_READ))
    digest = hashlib.sha256()
    received = 0
    while n := sock.recv_into(view):
        digest.update(view[:n])
        received += n
        if number in SLOW_RECEIVERS and SLOW_FROM < received < SLOW_TO:
            time.sleep(SLOWNESS)
    assert received == PART
    return digest.hexdigest()


def be_client(port: int, parent: Connection) -> None:
    """Connect to the relay, so many times at once, and tell the digests by connection."""

    def run(number: int) -> tuple[int, str]:
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as sock:
            sock.sendall(bytes([number]))
            return number, (receive if number % 2 else send)(sock, number)

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        parent.send(dict(pool.map(run, range(CONNECTIONS))))


def be_target(parent: Connection) -> None:
    """Tell the port, take the relay's connections, and tell the digests by connection."""

    def run(sock: socket.socket) -> tuple[int, str]:
        with sock:
            sock.settimeout(PATIENCE)
            (number,) = sock.recv(1)
            return number, (send if number % 2 else receive)(sock, number)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE)
        parent.send(listener.getsockname()[1])
        socks = [listener.accept()[0] for _ in range(CONNECTIONS)]
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        parent.send(dict(pool.map(run, socks)))


@contextmanager
def process(run: Callable[..., None], *arguments: object) -> Iterator[Connection]:
    """A function in a process of its own; gives what receives from it."""
    ours, theirs = processes.Pipe(duplex=False)
    child = processes.Process(target=run, args=(*arguments, theirs))
    child.start()
    theirs.close()
    with ours:
        try:
            yield ours
            child.join(PATIENCE)
            assert child.exitcode == 0
        finally:
            child.kill()
            child.join()


@contextmanager
def relay(mode: str, target: str) -> Iterator[tuple[Child, int, list[str]]]:
    """The example as a program: what it costs, its port, and, afterwards, the lines it printed."""
    lines: list[str] = []
    program = subprocess.Popen(
        (sys.executable, "examples/tcprelay.py", "--port=0", "--mode", mode, "--target", target),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with program:
        try:
            assert program.stdout is not None
            found = re.search(r"127\.0\.0\.1:(\d+)", program.stdout.readline())
            assert found
            yield Child(program), int(found[1]), lines
            program.send_signal(signal.SIGINT)
            lines += program.communicate(timeout=PATIENCE)[0].splitlines()
            assert program.returncode == 0
        finally:
            program.kill()


@pytest.mark.parametrize("mode", ["coroutine", "dispatch"])
def test_gigabytes(mode: str, figure: Figure) -> None:
    """Promises B and M: both sides have the same SHA-256 of each connection's bytes, the relay's
    memory does not grow after its warm-up, and each of its pauses has had its resume.
    """
    with (
        process(be_target) as target,
        relay(mode, f"127.0.0.1:{target.recv()}") as (program, port, lines),
    ):
        before = program.rss()
        begun = time.monotonic()
        resident = []
        with process(be_client, port) as client:
            while not client.poll(0.1):
                resident.append(program.rss())
            seconds = time.monotonic() - begun
            sent, received = client.recv(), target.recv()
        used = program.cpu()
    assert sent == received
    assert sorted(sent) == list(range(CONNECTIONS))

    counts = [re.fullmatch(r"(\d+) pauses, (\d+) resumes", line) for line in lines]
    assert len(counts) == CONNECTIONS
    assert all(counts), lines
    pauses, resumes = (sum(int(count[n]) for count in counts if count) for n in (1, 2))

    warm = max(1, int(len(resident) * WARM_UP))
    growth = max(resident[warm:]) - max(resident[:warm])
    gib = PART * CONNECTIONS / 2**30
    figure("GiB, connections", f"{gib:.2f}, {CONNECTIONS}")
    figure("seconds, of which the relay's CPU", f"{seconds:.1f}, {used:.1f}")
    figure("pauses, resumes", f"{pauses}, {resumes}")
    figure("MiB resident before, most", f"{before / 2**20:.2f}, {max(resident) / 2**20:.2f}")
    figure("KiB of growth after the warm-up", f"{growth / 1024:.0f}")
    assert pauses == resumes > 0
    assert growth < MOST_GROWTH
