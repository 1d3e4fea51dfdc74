"""The demo's steps: each is broken on purpose, and says so."""

from __future__ import annotations

import io
from functools import partial
from typing import Any

import pytest
import trio

from tests.conftest import no_leaks
from trioreactor import CloseReason, DrainReport, TcpConnection, TcpServer, Watermarks, demo_steps
from trioreactor.demo_report import Report

pytestmark = [pytest.mark.program, pytest.mark.shown]

STEPS = {step.title.partition(":")[0].partition(" of ")[0]: step for step in demo_steps.STEPS}


async def take(title: str) -> tuple[int, str]:
    """One step; how many lines of it did not hold, and its text."""
    report = Report(out := io.StringIO())
    async with no_leaks():
        with trio.fail_after(20):
            await STEPS[title].run(report)
    return report.failures, out.getvalue()


async def test_echo_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that are not the question are counted."""

    async def measured(_port: int, seconds: float) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        return {"round_trips": 100, "seconds": seconds, "wrong": 3}

    monkeypatch.setattr(demo_steps, "make_load", measured)
    failures, text = await take("Echo")
    assert failures == 3
    assert text.count("3 wrong") == 3


async def test_marks_that_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that queues far more than the default marks allow does not hold."""
    monkeypatch.setattr(
        demo_steps,
        "TcpServer",
        partial(TcpServer, watermarks=Watermarks(high=1_000_000, low=16384)),
    )
    failures, text = await take("A reader that stops reading")
    assert failures == 1
    assert "!! it reads, and stops 3 times" in text


async def test_peers_that_do_not_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resets are counted by the reasons that the server saw."""

    async def close(port: int) -> None:
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(b"hello")
            await stream.receive_some()

    monkeypatch.setattr(demo_steps, "_say_hello_and_reset", close)
    failures, text = await take("Peers that reset while others carry on")
    assert failures == 1
    assert "!! 5 peers reset               0 connections closed, reason PEER_RESET" in text
    # Nor does plain trio end without a reset.
    assert "one such reset, and it still serves" in text


async def test_force_close_without_a_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the peer saw is what it saw."""
    force_close = TcpConnection.force_close

    def without(
        conn: TcpConnection, reason: CloseReason = CloseReason.FORCED, *, reset: bool = False
    ) -> None:
        force_close(conn, reason)

    monkeypatch.setattr(TcpConnection, "force_close", without)
    failures, text = await take("force_close()")
    assert failures == 1
    assert "!! force_close(reset=True) " in text


async def test_drain_without_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A drain that cuts off the one at work is found by the report and by its client."""
    drain = TcpServer.drain

    async def at_once(server: TcpServer, _grace: float) -> DrainReport:
        return await drain(server, 0)

    monkeypatch.setattr(TcpServer, "drain", at_once)
    failures, text = await take("drain()")
    assert failures == 2
    assert "!! its report " in text
    assert "!! the one at work             its client got no answer" in text
