"""The demo's client that loses its server: it comes back, and a client that is wrong is found."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import trio

from tests.conftest import no_leaks
from trioreactor import Backoff, ClientStatistics, NotConnected, TcpClient, demo_reconnect
from trioreactor.demo_report import Report

pytestmark = [pytest.mark.program, pytest.mark.shown]


async def take() -> tuple[list[str], str]:
    """The step; the labels of what did not hold, and its text."""
    report = Report(out := io.StringIO())
    handlers = list(logging.getLogger("trioreactor").handlers)
    async with no_leaks():
        with trio.fail_after(30):
            await demo_reconnect.reconnect(report)
    # What it set up for the log is gone.
    assert logging.getLogger("trioreactor").handlers == handlers
    text = out.getvalue()
    failed = [line[3:30].strip() for line in text.splitlines() if line.startswith("!!")]
    assert len(failed) == report.failures
    return failed, text


async def test_reconnect() -> None:
    """Attempts are refused while the server is away; then the client is back, and all adds up."""
    failed, text = await take()
    assert not failed, text
    refused = len(re.findall(r"attempt \d+ .*: Connection refused; the next in 0\.\d\d s", text))
    assert refused > 1
    assert re.search(rf"attempt {refused + 1} .*connected in", text)
    assert f"{refused + 2} attempts, failed: {refused} ECONNREFUSED\n" in text
    assert re.search(r"2 connections, closed: (2 [A-Z_]+|1 [A-Z_]+, 1 [A-Z_]+)\n", text)


def with_another_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that does not wait as long as it was told."""

    def make(*args: Any, **options: Any) -> TcpClient:
        return TcpClient(*args, **(options | {"backoff": Backoff(initial=0.05, maximum=0.05)}))

    monkeypatch.setattr(demo_reconnect, "TcpClient", make)


def with_silent_send(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that drops what it cannot send."""
    send = TcpClient.send

    def drop(client: TcpClient, data: bytes) -> bool:
        with suppress(NotConnected):
            return send(client, data)
        return True

    monkeypatch.setattr(TcpClient, "send", drop)


def with_another_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that does not find the server again."""
    serve = demo_reconnect._serve
    monkeypatch.setattr(demo_reconnect, "_PATIENCE", 0.5)
    monkeypatch.setattr(demo_reconnect, "_serve", lambda nursery, _port: serve(nursery, 0))


def with_wrong_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that forgets an attempt."""
    statistics = TcpClient.statistics

    def wrong(client: TcpClient) -> ClientStatistics:
        right = statistics(client)
        return replace(right, attempts=right.attempts - 1)

    monkeypatch.setattr(TcpClient, "statistics", wrong)


@pytest.mark.parametrize(
    ("break_it", "lines"),
    [
        (with_another_backoff, ["the delays"]),
        (with_silent_send, ["send() meanwhile"]),
        (with_another_port, ["and so is the client", "its statistics", ""]),
        (with_wrong_statistics, ["its statistics"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
async def test_what_is_wrong_is_said(
    break_it: Callable[[pytest.MonkeyPatch], None],
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each line is marked if what it shows is not so."""
    break_it(monkeypatch)
    failed, text = await take()
    assert failed == lines, text


async def test_a_client_that_does_not_return(monkeypatch: pytest.MonkeyPatch) -> None:
    """One without another attempt leaves the step by an error, which the demo reports."""
    monkeypatch.setattr(demo_reconnect, "TcpClient", partial(TcpClient, retry=False))
    with pytest.raises(ExceptionGroup) as caught:
        await take()
    assert caught.group_contains(trio.ClosedResourceError)
