"""``trioreactor serve --threads``: several loops in a process, inspected and ended as one is."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from tests.conftest import no_leaks
from tests.test_cli import read_to_eof
from tests.test_serve_command import SERVED, _environment, answers, serving
from trioreactor import EventLoopThreadPool, ServeOptions
from trioreactor.server_target import TargetError, open_server

__all__ = ["_environment"]


@pytest.mark.program
@pytest.mark.parametrize("way", [[], ["--workers", "1"]], ids=["here", "workers"])
def test_threads(way: list[str], tmp_path: Path) -> None:
    """Connections live in the loops of both threads, the log says where each is, and SIGTERM
    drains them all.
    """
    with serving(tmp_path, "echo", "--threads", "2", *way) as served:
        with served.connect() as one, served.connect() as other:
            assert answers(one)
            assert answers(other)
            served.send_signal(signal.SIGUSR1)
            for number in (1, 2):
                served.wait_log(rf"connection echo-.*#{number} from .*; CONNECTED; 5 bytes")
                served.wait_log(rf"task [. ]*echo-.*#{number}: .*< echo \(served.py:\d+\)")
            served.wait_log("2 opened, 2 active; closed: none; 10 bytes received")
            # The server's own loop, and two more.
            until_all = r"(?s)(task <init>.*){3}"
            assert re.search(until_all, served.wait_log(until_all)[0])
            served.send_signal(signal.SIGTERM)
            served.wait_log("draining")
            for sock in (one, other):
                assert answers(sock)
                sock.shutdown(1)
                assert read_to_eof(sock) == b""
        # On a busy machine they may have ended before the drain began to count.
        assert re.search(r"[012] connections ended, 0 were closed by force", served.ended(0))


async def test_a_target_that_fails_beside_threads() -> None:
    """Its own error comes out, and the threads have ended."""
    async with no_leaks():
        with pytest.raises(TargetError, match=r"calling .* failed: RuntimeError: out of order"):
            async with open_server(f"{SERVED}:raising", [], ServeOptions(threads=2)):
                pytest.fail("there is no server")


async def test_the_pool_is_the_servers() -> None:
    """It is made for the server, and runs as long."""
    async with open_server(f"{SERVED}:factory", [], ServeOptions(threads=2)) as server:
        assert isinstance(server.loops, EventLoopThreadPool)
        assert len(server.loops.loops) == 2


def test_refused() -> None:
    """At once."""
    with pytest.raises(ValueError, match="pass at least 1 threads"):
        ServeOptions(threads=0)
