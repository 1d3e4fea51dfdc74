"""Kill -9 of a server under load, fifty times: nothing is lost in silence."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kill_nine import KillNine
from tests.soak.conftest import Figure
from tests.test_kill_nine import assert_none_lost

pytestmark = [pytest.mark.soak, pytest.mark.timeout(240)]

KILLS = 50


async def test_fifty_kills(tmp_path: Path, figure: Figure) -> None:
    """After each kill the client is connected again, each message of the application's own
    acknowledged protocol arrives exactly once or is reported as failed, and nothing leaks.
    """
    outcome = await KillNine(tmp_path / "inbox", KILLS).run()
    assert_none_lost(outcome, KILLS)
    # Of so many kills some came between keeping and acknowledging.
    assert outcome.dropped > 0
    statistics = outcome.statistics
    assert statistics is not None
    figure("kills", f"{len(outcome.killed)} in {outcome.seconds:.1f} s")
    figure(
        "messages",
        f"{len(outcome.sent):,}: {len(outcome.acknowledged):,} acknowledged and kept once, "
        f"{len(outcome.failed):,} reported as failed",
    )
    figure(
        "of those reported as failed",
        f"{len(outcome.failed & set(outcome.kept))} had arrived all the same, once",
    )
    up = outcome.seconds - sum(outcome.after_kill)
    figure("messages a second, while connected", f"{len(outcome.acknowledged) / up:,.0f}")
    figure("sent at the beginning of a connection", f"{outcome.sent_again:,}")
    figure("duplicates that the server dropped", f"{outcome.dropped:,}")
    figure(
        "attempts to connect",
        f"{statistics.attempts}, {sum(statistics.failures.values())} failed",
    )
    figure(
        "connected again after the kill",
        f"at most {max(outcome.after_kill):.3f} s, "
        f"{sum(outcome.after_kill) / KILLS:.3f} s on average",
    )
    figure(
        "of that after the server listened again", f"at most {max(outcome.after_listening):.3f} s"
    )
