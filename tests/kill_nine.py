"""Kill -9 of a real server under load: the promise that nothing is lost in silence, measured.

The application's own acknowledged protocol is that of examples/outbox.py, over one `TcpClient` in
this process, and examples/inbox.py, the process that is killed. It pauses before it acknowledges,
so that a kill finds messages that are kept and not acknowledged, and others that are on the way.
"""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from tests.conftest import no_leaks
from tests.test_examples import ROOT, load
from trioreactor import Backoff, ClientStatistics, ConnectAttempt, TcpClient

HOST = "127.0.0.1"
WORKERS = 20
# Seconds. Two beyond any doubt, for what waits for a server; and one that an outage always exceeds.
PATIENCE = 30.0
RESTART_PATIENCE = 20.0
IMPATIENCE = 0.02
# Before acknowledging, seconds; and most of a worker's rest between two messages.
PAUSE = 0.004
REST = 0.05
# Messages delivered to each server before it is killed. More than there can be acknowledgements of
# the server before on their way.
DELIVERED = 100
BACKOFF = Backoff(initial=0.02, maximum=0.2)


@dataclass(kw_only=True)
class Outcome:
    """What came of every message, and how long things took, in seconds."""

    sent: set[int] = field(default_factory=set)
    """By their text, which is a number of its own."""
    acknowledged: set[int] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)
    """Reported to the sender as given up."""
    patient_failed: int = 0
    """Of those, the ones that had time enough."""
    kept: list[int] = field(default_factory=list)
    """In the server's file, in its order."""
    numbers: list[int] = field(default_factory=list)
    """The same by the protocol's numbers."""
    killed: list[int] = field(default_factory=list)
    """The exit status of each killed server."""
    after_kill: list[float] = field(default_factory=list)
    """From each kill to the client's next connection."""
    after_listening: list[float] = field(default_factory=list)
    """From the moment the new server said that it listens, if the client was later than that."""
    dropped: int = 0
    """Duplicates that came to the server."""
    sent_again: int = 0
    """Messages sent at the beginning of a connection."""
    seconds: float = 0.0
    attempts: list[ConnectAttempt] = field(default_factory=list)
    statistics: ClientStatistics | None = None


def reserve_port() -> socket.socket:
    """A socket bound to a port of loopback, which keeps others off it.

    The server may listen there all the same. Until it does, connecting is refused: not even the
    kernel's own choice of a port can make the client connect to itself.
    """
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((HOST, 0))
    return sock


@asynccontextmanager
async def killed_at_the_end(*command: str) -> AsyncIterator[trio.Process]:
    """A process whose output can be read. It has ended afterwards, and so has its pipe."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = await trio.lowlevel.open_process(
        command, stdout=subprocess.PIPE, cwd=ROOT, env=environment
    )
    assert process.stdout is not None
    try:
        async with process.stdout:
            yield process
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


async def lines_of(stream: Any) -> AsyncGenerator[str]:
    text = b""
    async for chunk in stream:
        text += chunk
        *lines, text = text.split(b"\n")
        for line in lines:
            yield line.decode()


class KillNine:
    """The load, the client, and who kills and restarts the server."""

    def __init__(self, path: Path, kills: int) -> None:
        self.path = path
        self.kills = kills
        self.outcome = Outcome()
        self.outbox = load("outbox").Outbox()
        self.random = random.Random(kills)
        self.port = 0
        self.texts = iter(range(sys.maxsize))
        # Of the client's present connection.
        self.connected_at = 0.0
        # Workers begin no further message.
        self.enough = False

    async def run(self) -> Outcome:
        outcome = self.outcome
        reserved = reserve_port()
        self.port = reserved.getsockname()[1]
        try:
            async with no_leaks():
                client = TcpClient(
                    HOST,
                    self.port,
                    self.outbox.handler,
                    backoff=BACKOFF,
                    on_attempt=self.on_attempt,
                )
                begun = trio.current_time()
                async with client, trio.open_nursery() as servers:
                    await servers.start(self.serve_and_kill)
                    async with trio.open_nursery() as workers:
                        for _ in range(WORKERS):
                            workers.start_soon(self.work, PATIENCE)
                        workers.start_soon(self.work, IMPATIENCE)
                    # What was sent has been acknowledged or given up.
                    outcome.seconds = trio.current_time() - begun
                    servers.cancel_scope.cancel()
                outcome.statistics = client.statistics()
        finally:
            reserved.close()
        outcome.sent_again = self.outbox.sent_again
        for line in self.path.read_bytes().splitlines():
            _, number, text = line.split(b" ")
            outcome.numbers.append(int(number))
            outcome.kept.append(int(text))
        return outcome

    def on_attempt(self, attempt: ConnectAttempt) -> None:
        self.outcome.attempts.append(attempt)
        if attempt.error is None:
            self.connected_at = trio.current_time()

    async def work(self, patience: float) -> None:
        """Send messages, one after the other, and write down what came of each."""
        outcome = self.outcome
        while not self.enough:
            text = next(self.texts)
            outcome.sent.add(text)
            try:
                with trio.fail_after(patience):
                    await self.outbox.deliver(str(text))
            except trio.TooSlowError:
                outcome.failed.add(text)
                outcome.patient_failed += patience == PATIENCE
            else:
                outcome.acknowledged.add(text)
            await trio.sleep(self.random.random() * REST)

    async def serve_and_kill(self, *, task_status: trio.TaskStatus[None]) -> None:
        """A server after the other on the same port, each killed at a random moment."""
        outcome = self.outcome
        killed_at = None
        while True:
            command = ["examples/inbox.py", "--port", str(self.port), "--pause", str(PAUSE)]
            async with (
                killed_at_the_end(sys.executable, *command, str(self.path)) as process,
                aclosing(lines_of(process.stdout)) as lines,
            ):
                with trio.fail_after(RESTART_PATIENCE):
                    line = await anext(lines, "")
                assert line.endswith(f"{HOST}:{self.port}"), line
                listening_at = trio.current_time()
                if killed_at is None:
                    task_status.started()
                await self.wait_delivering()
                if killed_at is not None:
                    outcome.after_kill.append(self.connected_at - killed_at)
                    outcome.after_listening.append(self.connected_at - listening_at)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self.count_dropped, lines)
                    if len(outcome.killed) == self.kills:
                        self.enough = True
                        await trio.sleep_forever()
                    await trio.sleep(self.random.random() * 0.1)
                    killed_at = trio.current_time()
                    process.kill()
                    outcome.killed.append(await process.wait())
                    # Its output ends, too: what it said of the last duplicates is heard.

    async def count_dropped(self, lines: AsyncGenerator[str]) -> None:
        async for line in lines:
            assert line.endswith("has come again"), line
            self.outcome.dropped += 1

    async def wait_delivering(self) -> None:
        """Until the client delivers messages to this server: it is connected, and in use."""
        before = len(self.outcome.acknowledged)
        with trio.fail_after(RESTART_PATIENCE):
            while len(self.outcome.acknowledged) < before + DELIVERED:
                await trio.sleep(0.001)
