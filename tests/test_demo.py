"""The demo as a whole: it holds, it is quick, and it is honest when something does not hold."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from tests.test_cli import ENVIRONMENT
from trioreactor import demo
from trioreactor.demo_report import Report, Step
from trioreactor.demo_steps import STEPS

pytestmark = [pytest.mark.program, pytest.mark.shown]


def test_demo() -> None:
    """The real program without a tty: every step, nothing that does not hold, under 20 s."""
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "trioreactor", "demo"],
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    seconds = time.monotonic() - begun
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert seconds < 20
    out = done.stdout
    assert out.isascii()
    lines = out.splitlines()
    assert max(map(len, lines)) <= 100
    assert f"{os.environ.get('TRIOREACTOR_POLLER', '')} poller" in lines[0]
    titles = [line for line in lines if re.match(r"\d\. ", line)]
    assert titles == [f"{number}. {step.title}" for number, step in enumerate(STEPS, 1)]
    assert len(titles) == 7
    assert lines[-1] == "Everything held."
    assert "!!" not in out
    # What each step is there to show.
    assert (
        len(re.findall(r"us of server CPU a round trip, [\d,]+ round trips/s, 0 wrong", out)) == 3
    )
    assert "high mark (65,536) fired 1 time, low 0 times" in out
    assert re.search(r"high (\d+) times, low \(16,384\) \1 times", out)
    assert "5 connections closed, reason PEER_RESET" in out
    assert "20 carried on" in out
    assert re.search(r"[1-5]\d served, 1\d\d turned away, 0 left waiting", out)
    assert "reason FORCED, peer saw EOF" in out
    assert "reason FORCED, peer saw a reset" in out
    assert "9 finished, 1 forced, 0 stuck" in out
    assert re.search(r"Connection refused; the next in 0\.\d\d s", out)
    assert re.search(r"raised NotConnected [1-9]\d* times", out)
    assert re.search(r"and so is the client +after \d+ ms: \d+ answers", out)
    assert re.search(r"\d attempts, failed: \d ECONNREFUSED\n +2 connections, closed: ", out)


def children_of(pid: int) -> Iterator[str]:
    """The process's children."""
    # One that was started from a thread, only that thread knows.
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            yield from children.read_text().split()


def is_a_step(pid: str) -> bool:
    """Whether this is a step's process. (To import trio starts one, too.)"""
    try:
        return b"demo_" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def test_ctrl_c() -> None:
    """Ctrl-C in the middle of a step that has a process of its own: no traceback, 130."""
    with subprocess.Popen(
        [sys.executable, "-m", "trioreactor", "demo"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            while process.poll() is None and not any(map(is_a_step, children_of(process.pid))):
                time.sleep(0.01)
            # So that the child has come far enough to complain.
            time.sleep(0.3)
            # As a terminal does: to everybody in its session.
            os.killpg(process.pid, signal.SIGINT)
            _, errors = process.communicate(timeout=20)
        finally:
            process.kill()
    assert (process.returncode, errors) == (130, ""), errors


async def holds(report: Report) -> None:
    await trio.lowlevel.checkpoint()
    report.check("this", "is so", holds=True)


async def does_not_hold(report: Report) -> None:
    await trio.lowlevel.checkpoint()
    report.check("this", "is not so", holds=False)


async def raises(report: Report) -> None:
    await trio.lowlevel.checkpoint()
    raise ValueError("oh")


async def takes_too_long(report: Report) -> None:
    await trio.sleep_forever()


LEAKED: list[socket.socket] = []


async def leaks(report: Report) -> None:
    await trio.lowlevel.checkpoint()
    LEAKED.append(socket.socket())


@pytest.mark.parametrize(
    ("bad", "line"),
    [
        (does_not_hold, "!! this                        is not so   <-- does not hold"),
        (raises, "!! the step                    raised ValueError('oh')   <-- does not hold"),
        (takes_too_long, "!! the step                    was not done after 0.1 s"),
        (leaks, "!! open descriptors "),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_does_not_hold_is_said(
    bad: Callable[..., object],
    line: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The line is marked, the steps after it are shown all the same, and the exit code is 1."""
    monkeypatch.setattr(demo, "_STEP_SECONDS", 0.1)
    steps = [Step("Bad", bad), Step("Good", holds)]  # type: ignore[arg-type]
    try:
        assert demo.main(steps) == 1
    finally:
        while LEAKED:
            LEAKED.pop().close()
    out, errors = capsys.readouterr()
    assert line in out
    assert "\n2. Good\n   this                        is so\n" in out
    assert out.endswith("\n1 line marked !! did not hold.\n")
    assert ("ValueError: oh" in errors) == (bad is raises)


def test_what_holds(capsys: pytest.CaptureFixture[str]) -> None:
    """With nothing marked the exit code is 0."""
    assert demo.main([Step("Good", holds)]) == 0
    assert capsys.readouterr().out.endswith("\nEverything held.\n")
