"""The demo's descriptor exhaustion: the shortage is real, and its absence is found out."""

from __future__ import annotations

import io
import re

import pytest

from tests.conftest import no_leaks
from trioreactor import demo_exhaustion
from trioreactor.demo_report import Report

pytestmark = [pytest.mark.program, pytest.mark.shown]


async def test_more_clients_than_descriptors() -> None:
    """The server's process runs short at the limit that it was given, and all of it holds."""
    report = Report(out := io.StringIO())
    async with no_leaks():
        await demo_exhaustion.exhaustion(report)
    assert report.failures == 0, out.getvalue()
    served = re.search(r"(\d+) served, (\d+) turned away", out.getvalue())
    assert served
    # Some are the process's own: its standard ones, trio's, the listening one, the reserve.
    assert 40 < int(served[1]) < 60
    assert int(served[1]) + int(served[2]) == 200


async def test_no_shortage(monkeypatch: pytest.MonkeyPatch) -> None:
    """With descriptors for all there is nothing to show, and the report says so."""
    monkeypatch.setattr(demo_exhaustion, "_CLIENTS", 20)
    report = Report(out := io.StringIO())
    async with no_leaks():
        await demo_exhaustion.exhaustion(report)
    assert report.failures == 1
    assert "20 served, 0 turned away" in out.getvalue()
    assert "!! it does not spin            0 failed accepts/s" in out.getvalue()
