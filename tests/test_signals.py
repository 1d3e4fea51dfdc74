"""Signals at the wrong moment; at the right one, `test_serve_command` sends them to programs."""

from __future__ import annotations

import os
import signal
import socket
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from tests.test_workers import HOST, PATIENCE, WHO, _importable, until
from trioreactor import ServiceNotifier, run_workers

__all__ = ["_importable"]

pytestmark = pytest.mark.program


async def test_sighup_before_it_serves(tmp_path: Path) -> None:
    """The service manager is not told that it is ready before it is; it is replaced then."""
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        manager.setblocking(False)
        notifier = ServiceNotifier(environment={"NOTIFY_SOCKET": path})
        told: list[bytes] = []

        def has_told(number: int) -> bool:
            with suppress(BlockingIOError):
                told.append(manager.recv(100).partition(b"\n")[0])
            return len(told) == number

        async def run() -> None:
            before = signal.getsignal(signal.SIGHUP)
            nursery.start_soon(work)
            await until(lambda: signal.getsignal(signal.SIGHUP) is not before)
            os.kill(os.getpid(), signal.SIGHUP)
            await until(lambda: has_told(3))
            os.kill(os.getpid(), signal.SIGTERM)

        async def work() -> None:
            assert await run_workers(WHO, f"{HOST}:0", workers=1, notifier=notifier) == 0

        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run)
        assert told == [b"READY=1", b"RELOADING=1", b"READY=1"]
