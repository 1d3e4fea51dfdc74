"""The demo's descriptor exhaustion: a server in a process that may open only a few."""

from __future__ import annotations

import io
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from subprocess import PIPE

import trio

from trioreactor.demo_report import Report, count
from trioreactor.tcp_connection import TcpConnection
from trioreactor.tcp_server import TcpServer

_HOST = "127.0.0.1"
_STATISTICS_REQUEST = b"statistics\n"
# The server's process ends by itself if ours was killed.
_CHILD_SECONDS = 30.0

# -- the demo's side

_DESCRIPTORS = 64
_CLIENTS = 200
# Of a client that is neither served nor turned away.
_PATIENCE = 4.0


async def exhaustion(report: Report) -> None:
    """The step: more clients than descriptors, and then fewer again."""
    await trio.lowlevel.checkpoint()
    if sys.platform == "win32":
        report.line("descriptor limits", "this platform has none: left out")
        return
    outcomes = Counter[str]()
    held: list[TcpConnection] = []

    async def be_client(port: int) -> None:
        outcome = "left waiting"
        with trio.move_on_after(_PATIENCE):
            conn = TcpConnection(await trio.open_tcp_stream(_HOST, port))
            held.append(conn)
            outcome = "served" if await _is_served(conn) else "turned away"
        outcomes[outcome] += 1

    async def ask(old: TcpConnection) -> dict[str, float]:
        old.send(_STATISTICS_REQUEST)
        answer: dict[str, float] = json.loads(await old.receive_some())
        return answer

    async with (
        _starved_server(_DESCRIPTORS) as port,
        TcpConnection(await trio.open_tcp_stream(_HOST, port)) as old,
    ):
        before, begun = await ask(old), trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(_CLIENTS):
                nursery.start_soon(be_client, port)
        after, seconds = await ask(old), trio.current_time() - begun
        report.check(
            f"{_CLIENTS} clients, {_DESCRIPTORS} descriptors",
            f"{outcomes['served']} served, {outcomes['turned away']} turned away, "
            f"{outcomes['left waiting']} left waiting, after {seconds:.1f} s",
            holds=0 < outcomes["served"] < _DESCRIPTORS and not outcomes["left waiting"],
        )
        failed = after["failed_accepts"] - before["failed_accepts"]
        cpu = after["cpu_seconds"] - before["cpu_seconds"]
        report.check(
            "it does not spin",
            f"{failed / seconds:.0f} failed accepts/s, {cpu * 1e3:.0f} ms of CPU in all, "
            f"{count(int(after['log_lines']), 'line')} in the log",
            holds=failed > 0 and failed / seconds < 100,
        )
        for conn in held:
            conn.force_close()
        begun = trio.current_time()
        served = False
        tries = 0
        with trio.move_on_after(_PATIENCE):
            while not served:
                tries += 1
                async with TcpConnection(await trio.open_tcp_stream(_HOST, port)) as conn:
                    served = await _is_served(conn)
        waited = trio.current_time() - begun
        report.check(
            "descriptors come free",
            f"a newcomer is served after {waited * 1e3:.0f} ms, at try {tries}",
            holds=served and waited < 1,
        )


async def _is_served(conn: TcpConnection) -> bool:
    try:
        conn.send(b"hello")
        return await conn.receive_some() == b"hello"
    except trio.BrokenResourceError:
        await trio.lowlevel.checkpoint()
        return False


@asynccontextmanager
async def _starved_server(descriptors: int) -> AsyncGenerator[int]:
    """A server in a process that may open only so many *descriptors*; gives its port."""
    command = [sys.executable, "-m", "trioreactor.demo_exhaustion", str(descriptors)]
    async with trio.open_nursery() as nursery:
        # In a session of its own, or a Ctrl-C for us would be one for it, too.
        start = partial(trio.run_process, command, stdout=PIPE, start_new_session=True)
        process = await nursery.start(start)
        try:
            line = b""
            while not line.endswith(b"\n"):
                data = await process.stdout.receive_some()
                if not data:
                    raise RuntimeError("the starved server did not start")
                line += data
            yield int(line)
        finally:
            # Ends the process, too.
            nursery.cancel_scope.cancel()


# -- the starved server's side


async def starved(descriptors: int) -> None:
    """Echo, and tell of ourselves when asked, with few descriptors."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, hard))
    log = io.StringIO()
    logging.basicConfig(stream=log)

    async def handler(conn: TcpConnection) -> None:
        async for data in conn:
            if data == _STATISTICS_REQUEST:
                errors = acceptor.statistics().errors
                answer = {
                    "failed_accepts": errors.get("EMFILE", 0) + errors.get("ENFILE", 0),
                    "cpu_seconds": time.process_time(),
                    "log_lines": log.getvalue().count("\n"),
                }
                conn.send(json.dumps(answer).encode())
            else:
                conn.send(data)

    server = TcpServer(handler, 0, host=_HOST)
    async with trio.open_nursery() as nursery:
        (acceptor,) = await nursery.start(server.serve)
        print(acceptor.address[1], flush=True)
        await trio.sleep(_CHILD_SECONDS)
        server.close()


if __name__ == "__main__":
    trio.run(starved, int(sys.argv[1]))
