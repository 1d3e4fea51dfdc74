"""The demo's client that loses its server and returns."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager

import trio

from trioreactor.backoff import Backoff
from trioreactor.buffer import Buffer
from trioreactor.classic import SERVICES
from trioreactor.demo_report import Report, count
from trioreactor.endpoints import ConnectAttempt
from trioreactor.errors import NotConnected
from trioreactor.tcp_client import TcpClient
from trioreactor.tcp_connection import TcpConnection
from trioreactor.tcp_server import TcpServer

_HOST = "127.0.0.1"
_BACKOFF = Backoff(initial=0.1, maximum=0.4, jitter="equal")
# How long the server is away, and for how long its return is waited for, seconds.
_AWAY = 0.8
_PATIENCE = 5.0
# A connection is in use when there were so many answers. Each question is one byte.
_ANSWERS = 20
_BETWEEN_QUESTIONS = 0.005


async def reconnect(report: Report) -> None:
    """The step: a server that closes, the attempts while it is away, and its return."""
    async with trio.open_nursery() as nursery:
        server, port = await _serve(nursery, 0)
        asker = _Asker(report, port)
        with _logging_to_nobody():
            async with asker.client, trio.open_nursery() as asking:
                asking.start_soon(asker.ask)
                heard = await asker.hear()
                report.check("at first", count(heard, "answer"), holds=heard >= _ANSWERS)
                server.close()
                lost = trio.current_time()
                await trio.sleep(_AWAY)
                _report_absence(report, asker)
                back = trio.current_time()
                server, _ = await _serve(nursery, port)
                report.line("the server is back", f"after {back - lost:.1f} s")
                heard = await asker.hear()
                waited = asker.connected_at - back
                report.check(
                    "and so is the client",
                    f"after {waited * 1e3:.0f} ms: {count(heard, 'answer')}",
                    # The next attempt finds it, which is at most the longest delay away. The rest
                    # is for a slow machine.
                    holds=heard >= _ANSWERS and 0 <= waited < _BACKOFF.maximum + 1,
                )
                asking.cancel_scope.cancel()
        server.close()
    _report_statistics(report, asker)


async def _serve(nursery: trio.Nursery, port: int) -> tuple[TcpServer, int]:
    server = TcpServer(SERVICES["echo"].handlers["dispatch"], port, host=_HOST)
    (acceptor,) = await nursery.start(server.serve)
    return server, acceptor.address[1]


@contextmanager
def _logging_to_nobody() -> Generator[None]:
    """The report tells of every attempt; with nobody to log to, so would the log, on stderr."""
    logger, nobody = logging.getLogger("trioreactor"), logging.NullHandler()
    logger.addHandler(nobody)
    try:
        yield
    finally:
        logger.removeHandler(nobody)


def _report_absence(report: Report, asker: _Asker) -> None:
    delays = [attempt.delay for attempt in asker.failed]
    # The first delay is the one before the first of these attempts.
    ceilings = [min(_BACKOFF.maximum, _BACKOFF.initial * 2**n) for n in range(1, len(delays) + 1)]
    report.check(
        "the delays",
        f"double, up to {_BACKOFF.maximum:g} s; chance takes away half at most",
        holds=len(delays) > 1
        and all(
            delay is not None and ceiling / 2 <= delay <= ceiling
            for delay, ceiling in zip(delays, ceilings, strict=True)
        ),
    )
    report.check(
        "send() meanwhile",
        f"raised NotConnected {count(asker.turned_away, 'time')}",
        holds=asker.turned_away > 0,
    )


def _report_statistics(report: Report, asker: _Asker) -> None:
    statistics = asker.client.statistics()
    failures = ", ".join(f"{number} {name}" for name, number in statistics.failures.items())
    closed = ", ".join(f"{number} {reason.name}" for reason, number in statistics.closed.items())
    report.check(
        "its statistics",
        f"{count(statistics.attempts, 'attempt')}, failed: {failures}",
        holds=sum(statistics.failures.values()) == len(asker.failed) == statistics.attempts - 2,
    )
    report.check(
        "",
        f"{count(statistics.opened, 'connection')}, closed: {closed}",
        holds=statistics.opened == sum(statistics.closed.values()) == 2,
    )


class _Asker:
    """Asks an echo server all the time, whether it is there or not, by a client that reconnects."""

    def __init__(self, report: Report, port: int) -> None:
        self.client = TcpClient(
            _HOST, port, self._handler, backoff=_BACKOFF, on_attempt=self._on_attempt
        )
        self.connected_at = 0.0
        self.failed: list[ConnectAttempt] = []
        self.turned_away = 0
        self._report = report
        # Since `hear` was called.
        self._answers = 0
        self._enough = trio.Event()

    async def ask(self) -> None:
        while True:
            try:
                self.client.send(b"?")
            except NotConnected:
                self.turned_away += 1
            except trio.BrokenResourceError:
                # Lost a moment ago, which the client is about to find.
                pass
            await trio.sleep(_BETWEEN_QUESTIONS)

    async def hear(self) -> int:
        """Wait for enough answers, but not for ever; how many there were."""
        self._answers = 0
        self._enough = trio.Event()
        with trio.move_on_after(_PATIENCE):
            await self._enough.wait()
        return self._answers

    async def _handler(self, conn: TcpConnection) -> None:
        await conn.dispatch(self._on_message)

    def _on_message(self, _conn: TcpConnection, buffer: Buffer) -> None:
        self._answers += len(buffer.take())
        if self._answers >= _ANSWERS:
            self._enough.set()

    def _on_attempt(self, attempt: ConnectAttempt) -> None:
        if attempt.error is None:
            self.connected_at = trio.current_time()
        else:
            self.failed.append(attempt)
        then = "" if attempt.delay is None else f"; the next in {attempt.delay:.2f} s"
        self._report.line(f"attempt {attempt.number}", f"{attempt}{then}")
